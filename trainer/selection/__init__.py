"""Which teachers may speak for a sample: scored from stored embeddings, decided by an explicit rule, kept as a table.

For each teacher and modality: how well the image and its main caption match (cosine), where that lies among the
teacher's other pairs of the modality (quantile), and how many sampled captions of the same modality the true one beats
(rank). ``skill`` is the mean share of captions beaten: 0.5 is guessing.
"""
