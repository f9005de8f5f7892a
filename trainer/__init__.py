"""From teacher embeddings to a distilled, evaluated and exported student."""
