"""What is in a lake: coverage, norms, cosines, near-duplicates and outliers, as text and as a page."""
