"""What a run of extract did and is doing: the report, the live display, Ray's metrics."""
