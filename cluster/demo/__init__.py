"""The embedded demo: a drawn corpus, specialists trained on the spot, and the whole pipeline on them."""
