"""Cosines of sampled embeddings: matched and mismatched, near-duplicates, and what is unlike everything else.

N = vectors, D = width; vectors are of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from extractor.pages.charts import Histogram

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MISMATCHES = 16
"""Captions of other pictures that each picture is compared with."""
FEWEST_NEIGHBOURS = 3
"""Pictures of a modality below which none of them can be called unlike the others."""
BINS = 40
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Spread:
    """How values are distributed."""

    count: int
    low: float
    quantiles: tuple[float, ...]
    """At ``QUANTILES``."""
    high: float


class NearPair(NamedTuple):
    """Two vectors that lie close together; ``left`` comes before ``right``."""

    left: int
    right: int
    cosine: float


def spread_of(values_N: np.ndarray) -> Spread | None:
    """Least, quantiles and greatest; None where there are no values."""
    if not len(values_N):
        return None
    quantiles = tuple(float(value) for value in np.quantile(values_N, QUANTILES))
    return Spread(len(values_N), float(values_N.min()), quantiles, float(values_N.max()))


def histograms_of(series: dict[str, np.ndarray]) -> dict[str, Histogram]:
    """Histograms over one common range; series without values are left out."""
    full = {name: values for name, values in series.items() if len(values)}
    if not full:
        return {}
    low, high = min(float(v.min()) for v in full.values()), max(float(v.max()) for v in full.values())
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    counts = {name: np.histogram(values, BINS, (low, high))[0] for name, values in full.items()}
    return {name: Histogram(low, high, found.tolist()) for name, found in counts.items()}


def mismatched_cosines(
    images_ND: np.ndarray, texts_ND: np.ndarray, captions: Sequence[str], draw: np.random.Generator
) -> tuple[np.ndarray, float | None]:
    """Cosines of pictures with captions of other pictures, drawn at random; equal captions are not mismatched.

    Returns:
        The cosines, and the share of them that lie below the picture's own matched cosine (ties count half; 0.5 is
        guessing), None where there are none.
    """
    count = len(images_ND)
    if count < 2:
        return np.empty(0, np.float32), None
    # A shift of 1 .. N-1 never hits the picture's own caption.
    others_NK = (np.arange(count)[:, None] + draw.integers(1, count, (count, min(MISMATCHES, count - 1)))) % count
    names = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    codes_N = np.array([names[caption] for caption in captions])
    is_other_NK = codes_N[others_NK] != codes_N[:, None]
    cosines_NK = np.stack(
        [np.einsum("nd,nd->n", images_ND, texts_ND[column]) for column in others_NK.T], axis=1, dtype=np.float32
    )
    matched_N1 = np.einsum("nd,nd->n", images_ND, texts_ND)[:, None]
    wins_NK = (matched_N1 > cosines_NK) + 0.5 * (matched_N1 == cosines_NK)
    found = cosines_NK[is_other_NK]
    return found, float(wins_NK[is_other_NK].mean()) if len(found) else None


def near_pairs(
    vectors_ND: np.ndarray, digests_N: np.ndarray, threshold: float, most: int
) -> tuple[int, list[NearPair]]:
    """Pairs of vectors whose cosine is above a threshold: how many, and the closest of them, closest first.

    Pairs of equal digests, which are the same picture twice, do not count.
    """
    count, best = 0, list[NearPair]()
    for start in range(0, len(vectors_ND), _CHUNK_ROWS):
        cosines = vectors_ND[start : start + _CHUNK_ROWS] @ vectors_ND[start:].T
        # Each pair once: only what lies to the right of the diagonal.
        left, right = np.nonzero(np.triu(cosines > threshold, k=1))
        differ = digests_N[left + start] != digests_N[right + start]
        left, right = left[differ], right[differ]
        count += len(left)
        values = cosines[left, right]
        closest = np.argsort(-values, kind="stable")[:most]
        best += [NearPair(int(left[i]) + start, int(right[i]) + start, float(values[i])) for i in closest]
        best = sorted(best, key=lambda pair: -pair.cosine)[:most]
    return count, best


def mean_similarity(vectors_ND: np.ndarray) -> np.ndarray:
    """Each vector's mean cosine with all others, [N]; NaN for fewer than ``FEWEST_NEIGHBOURS`` vectors."""
    count = len(vectors_ND)
    if count < FEWEST_NEIGHBOURS:
        return np.full(count, np.nan)
    return (vectors_ND @ vectors_ND.sum(0) - 1.0) / (count - 1)
