"""What an alignment changes: whether teachers agree on what resembles what, and whether each finds its captions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from trainer.alignment.maps import SIDES, Maps

Sample = dict[str, dict[str, np.ndarray]]
"""Teacher -> side -> vectors of the same rows, float32 [N, T]; NaN rows where it may not speak."""
LEAST_ROWS = 3
"""Fewer rows have no correlation to speak of."""


def describe_agreement(sample: Sample, maps: Maps) -> dict[str, Any]:
    """Figures before and after, for ``alignment.json`` and for people.

    Returns:
        ``pairs``: for each two teachers and side the mean ``cosine`` between their vectors of the same row (where the
        widths are equal) and the ``correlation`` of their similarity matrices off the diagonal. ``retrieval``: for each
        teacher the share of pictures whose own caption is nearest among the sample's. Each as ``[before, after]``.
    """
    after = {
        name: {side: maps[name][side](vectors) if side in maps[name] else vectors for side, vectors in sides.items()}
        for name, sides in sample.items()
    }
    pairs: dict[str, dict[str, Any]] = {}
    for left, right in itertools.combinations(sorted(sample), 2):
        for side in SIDES:
            if side in sample[left] and side in sample[right]:
                both = [_compare(which[left][side], which[right][side]) for which in (sample, after)]
                pairs.setdefault(f"{left} | {right}", {})[side] = {
                    "cosine": [cosine for cosine, _ in both],
                    "correlation": [correlation for _, correlation in both],
                }
    retrieval = {name: [_retrieval(which[name]) for which in (sample, after)] for name in sorted(sample)}
    return {"pairs": pairs, "retrieval": retrieval}


def _compare(left_NT: np.ndarray, right_NT: np.ndarray) -> tuple[float | None, float | None]:
    both_N = np.isfinite(left_NT[:, 0]) & np.isfinite(right_NT[:, 0])
    if both_N.sum() < LEAST_ROWS:
        return None, None
    left, right = _unit(left_NT[both_N]), _unit(right_NT[both_N])
    cosine = float(np.einsum("nd,nd->n", left, right).mean()) if left.shape == right.shape else None
    upper = np.triu_indices(len(left), 1)
    similarities = [(one @ one.T)[upper] for one in (left, right)]
    correlation = float(np.corrcoef(*similarities)[0, 1]) if all(np.ptp(one) > 0 for one in similarities) else None
    return (None if cosine is None else round(cosine, 4)), (None if correlation is None else round(correlation, 4))


def _retrieval(sides: dict[str, np.ndarray]) -> float | None:
    if set(sides) != set(SIDES) or sides["image"].shape != sides["text"].shape:
        return None
    both_N = np.isfinite(sides["image"][:, 0]) & np.isfinite(sides["text"][:, 0])
    if not both_N.any():
        return None
    image, text = (_unit(sides[side][both_N]) for side in SIDES)
    cosine_NN = image @ text.T
    # Captions repeat: one that is as near as the true one is not in its way.
    return round(float((cosine_NN.max(axis=1) <= np.diag(cosine_NN) + 1e-6).mean()), 4)


def _unit(vectors_NT: np.ndarray) -> np.ndarray:
    return vectors_NT / np.maximum(np.linalg.norm(vectors_NT, axis=1, keepdims=True), 1e-12)


def format_agreement(agreement: dict[str, Any]) -> str:
    """Two aligned text tables."""
    width = max([len(name) for name in [*agreement["pairs"], *agreement["retrieval"]]] + [len("teachers")]) + 2
    lines = ["teachers".ljust(width) + "side   cosine before, after   correlation before, after"]
    for teachers, sides in agreement["pairs"].items():
        for side, figures in sides.items():
            cells = [f"{_shown(figures[kind][0])}, {_shown(figures[kind][1])}" for kind in ("cosine", "correlation")]
            lines.append(teachers.ljust(width) + side.ljust(7) + cells[0].ljust(24) + cells[1])
    lines.append("")
    lines.append("teacher".ljust(width) + "finds the caption first: before, after")
    for teacher, (before, after) in agreement["retrieval"].items():
        lines.append(teacher.ljust(width) + f"{_shown(before)}, {_shown(after)}")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
