"""First pass over a teacher's shards: in each modality a sketch of its matched cosines and a sample of its pairs.

Memory does not grow with the lake: a sketch keeps some thousands of numbers, a sample as many pairs as a rank is among.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.selection.read import ShardRows, ShardVectors

SKETCH_SIZE = 4000
"""K of the KLL sketch: ranks are within 0.1 % of the exact ones, and exact up to so many values."""


def _sketch() -> Any:
    from datasketches import kll_floats_sketch

    return kll_floats_sketch(SKETCH_SIZE)


@dataclass
class Modality:
    """What one teacher says about one modality. C sampled pairs, of width D."""

    sketch: Any = field(default_factory=_sketch)
    count: int = 0
    total: float = 0.0
    order_C: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    keys_C: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    image_CD: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    text_CD: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def add(self, rows: ShardRows, vectors: ShardVectors, here: np.ndarray, limit: int) -> None:
        """Account for some rows of a shard, and keep the ``limit`` pairs that come first by ``order``."""
        cosines = np.einsum("nd,nd->n", vectors.image_ND[here], vectors.text_ND[here])
        self.sketch.update(cosines.astype(np.float32))
        self.count += len(here)
        self.total += float(cosines.sum())
        if len(self.order_C) == limit:
            here = here[rows.order_N[here] < self.order_C.max()]
        if not len(here):
            return
        parts = (rows.order_N, rows.caption_key_N, vectors.image_ND, vectors.text_ND)
        kept = (self.order_C, self.keys_C, self.image_CD, self.text_CD)
        joined = [
            part[here] if not len(old) else np.concatenate([old, part[here]])
            for old, part in zip(kept, parts, strict=True)
        ]
        first = np.argsort(joined[0], kind="stable")[:limit]
        self.order_C, self.keys_C, self.image_CD, self.text_CD = (one[first] for one in joined)

    def quantiles(self, cosine_N: np.ndarray) -> np.ndarray:
        """Share of the teacher's pairs that match no better, float32 [N]."""
        return np.array([self.sketch.get_rank(float(cosine), True) for cosine in cosine_N], np.float32)

    def ranks(
        self, image_ND: np.ndarray, cosine_N: np.ndarray, keys_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the true caption stands among the sampled ones; equal captions are not counted against it.

        Returns:
            Its rank (int32 [N], 1 is best), among how many it is (int32 [N]), and the share of the others that it beats
            (float [N], ties counting half; 0.5 where there are no others).
        """
        cosine_NC = image_ND @ self.text_CD.T
        other_NC = self.keys_C[None, :] != keys_N[:, None]
        above = ((cosine_NC > cosine_N[:, None]) & other_NC).sum(1)
        level = ((cosine_NC == cosine_N[:, None]) & other_NC).sum(1)
        count = other_NC.sum(1)
        beaten = np.where(count > 0, 1 - (above + level / 2) / np.maximum(count, 1), 0.5)
        return (above + 1).astype(np.int32), (count + 1).astype(np.int32), beaten


def survey_teacher(shards: Iterable[tuple[ShardRows, ShardVectors]], candidates: int) -> dict[str, Modality | None]:
    """Modality -> what the teacher says there; None where it has no pair of vectors.

    Train rows alone count, so that test rows do not shape what the student learns; where a modality has none, all do.
    """
    train: dict[str, Modality] = {}
    others: dict[str, Modality] = {}
    seen: set[str] = set()
    for rows, vectors in shards:
        scored_N = vectors.scored
        for modality in np.unique(rows.modality_N):
            seen.add(modality)
            here_N = scored_N & (rows.modality_N == modality)
            for into, which_N in ((train, here_N & rows.is_train_N), (others, here_N & ~rows.is_train_N)):
                if which_N.any() and (into is train or modality not in train):
                    into.setdefault(modality, Modality()).add(rows, vectors, np.flatnonzero(which_N), candidates)
            if modality in train:
                others.pop(modality, None)
    return {modality: train.get(modality) or others.get(modality) for modality in sorted(seen)}
