"""Cross-modal retrieval: recall at 1, 5 and 10 in both directions, per modality and over everything.

Candidates are distinct captions and pictures; every picture that carries a caption is a right answer to it, so
identical captions and several captions per picture all count.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from common.logs import logger
from common.seeding import rng
from trainer.evaluation.embed import EmbeddedData
from trainer.evaluation.metrics import Score, best_ranks, mean_score, recall_at
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.scores import ALL, MEAN, Measured

TASK = "retrieval"
CUTOFFS = (1, 5, 10)


def caption_counts(embedded: EmbeddedData) -> dict[str, int]:
    """Modality -> distinct captions that its pictures carry."""
    return {
        modality: len(np.unique(embedded.pairs_P2[np.isin(embedded.pairs_P2[:, 0], embedded.of_modality(modality)), 1]))
        for modality in sorted(set(embedded.modalities))
    }


def retrieval(
    model: LoadedModel, embedded: EmbeddedData, *, batch_size: int, resamples: int, seed: int
) -> Iterator[Measured]:
    """Metrics ``image_to_text_recall@k`` and ``text_to_image_recall@k`` of one model.

    A modality's candidates are those of the modality; "all" mixes them; "mean" averages over modalities. A
    modality with fewer than two pictures or two distinct captions is skipped.
    """
    captions_MD = model.embed_texts(embedded.captions, batch_size)
    images_ND = embedded.images[model.name]
    modalities = sorted(set(embedded.modalities))
    by_metric: dict[str, list[Score]] = {}
    for modality in (*modalities, ALL):
        rows = np.arange(len(images_ND)) if modality == ALL else embedded.of_modality(modality)
        pairs_P2 = embedded.pairs_P2[np.isin(embedded.pairs_P2[:, 0], rows)]
        columns = np.unique(pairs_P2[:, 1])
        if len(rows) < 2 or len(columns) < 2:
            logger.info("retrieval: %s is skipped: %d pictures, %d captions", modality, len(rows), len(columns))
            continue
        # Positions among this modality's pictures and captions; both lists are sorted.
        matches_P2 = np.stack([np.searchsorted(rows, pairs_P2[:, 0]), np.searchsorted(columns, pairs_P2[:, 1])], 1)
        ranks = {
            "image_to_text": best_ranks(images_ND[rows], captions_MD[columns], matches_P2),
            "text_to_image": best_ranks(captions_MD[columns], images_ND[rows], matches_P2[:, ::-1]),
        }
        for direction, ranks_Q in ranks.items():
            for k in CUTOFFS:
                metric = f"{direction}_recall@{k}"
                score = recall_at(ranks_Q, k, resamples, rng(seed, TASK, modality, metric))
                if modality != ALL:
                    by_metric.setdefault(metric, []).append(score)
                yield Measured(TASK, modality, metric, score)
    for metric, found in by_metric.items():
        yield Measured(TASK, MEAN, metric, mean_score(found))
