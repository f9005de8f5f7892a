"""What a model is worth: zero-shot classification and retrieval with intervals, and the pictures of the report."""
