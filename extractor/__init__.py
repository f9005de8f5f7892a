"""From image-caption sources to pairs, and from pairs to teacher embeddings."""
