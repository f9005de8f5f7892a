"""Cross-modal retrieval: recall at 1, 5 and 10 in both directions, per modality and over everything.

Candidates are distinct captions and pictures; every picture that carries a caption is a right answer to it, so
identical captions and several captions per picture all count. A picture without captions is no candidate.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import gammaln

from common.logs import logger
from common.seeding import rng
from trainer.evaluation.embed import EmbeddedData
from trainer.evaluation.metrics import best_ranks, recall_at
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.scores import ALL, Measured, mean_over_modalities

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
    modality with fewer than two pictures with captions or two distinct captions is skipped.
    """
    captions_MD = model.embed_texts(embedded.captions, batch_size)
    images_ND = embedded.images[model.name]
    modalities = sorted(set(embedded.modalities))
    with_captions = np.unique(embedded.pairs_P2[:, 0])
    by_metric: dict[str, list[Measured]] = {}
    for modality in (*modalities, ALL):
        rows = with_captions
        if modality != ALL:
            rows = rows[np.isin(rows, embedded.of_modality(modality))]
        pairs_P2 = embedded.pairs_P2[np.isin(embedded.pairs_P2[:, 0], rows)]
        columns = np.unique(pairs_P2[:, 1])
        if len(rows) < 2 or len(columns) < 2:
            logger.info(
                "retrieval: %s is skipped: %d pictures with captions, %d distinct captions",
                modality,
                len(rows),
                len(columns),
            )
            continue
        # Positions among this modality's pictures and captions; both lists are sorted.
        matches_P2 = np.stack([np.searchsorted(rows, pairs_P2[:, 0]), np.searchsorted(columns, pairs_P2[:, 1])], 1)
        sides = {
            "image_to_text": (images_ND[rows], captions_MD[columns], matches_P2),
            "text_to_image": (captions_MD[columns], images_ND[rows], matches_P2[:, ::-1]),
        }
        for direction, (queries, candidates, matches) in sides.items():
            ranks_Q = best_ranks(queries, candidates, matches)
            right_Q = np.bincount(matches[:, 0])
            for k in CUTOFFS:
                metric = f"{direction}_recall@{k}"
                score = recall_at(ranks_Q, k, resamples, rng(seed, TASK, modality, metric))
                one = Measured(TASK, modality, metric, score, chance=recall_by_chance(right_Q, len(candidates), k))
                if modality != ALL:
                    by_metric.setdefault(metric, []).append(one)
                yield one
    for found in by_metric.values():
        yield mean_over_modalities(found)


def recall_by_chance(right_Q: np.ndarray, candidates: int, k: int) -> float:
    """Recall at ``k`` of a model that orders the candidates at random: k / candidates with one right answer each.

    Args:
        right_Q: Right answers of each query.
        candidates: How many there are to choose from.
        k: The cut-off.
    """
    wrong_Q = candidates - right_Q
    # The chance that k draws without replacement are all wrong, wrong! (M - k)! / ((wrong - k)! M!), by logarithms.
    possible_Q = wrong_Q >= k
    at_Q = np.where(possible_Q, wrong_Q, k)
    rest = max(candidates - k, 0)
    logs_Q = gammaln(at_Q + 1) + gammaln(rest + 1) - gammaln(at_Q - k + 1) - gammaln(candidates + 1)
    return float(np.mean(1 - np.where(possible_Q, np.exp(logs_Q), 0)))
