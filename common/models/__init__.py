"""Models behind one interface: what they are (spec, catalog), where they lie (files), one file per family."""
