"""Keeping a lake's embeddings whole: the full check, the ledger of what passed it, packs of shards."""
