"""Augmented views: seeded crops that are the same for every teacher and can be replayed in training."""

from __future__ import annotations

import numpy as np
from PIL import Image

from common.seeding import rng


def view_boxes(sample_id: str, count: int, least_area: float, seed: int) -> np.ndarray:
    """Where a sample's crops lie, as a function of its id: no flips, no stretching, since both mean something here.

    Args:
        sample_id: Of the pair.
        count: Crops.
        least_area: Smallest share of the picture's area.
        seed: Another seed gives other crops.

    Returns:
        float32 [count, 4]: left, top, right and bottom as shares of the upright picture's width and height.
    """
    area_K, across_K, down_K = rng("view", seed, sample_id).random((3, count))
    side_K = np.sqrt(least_area + (1 - least_area) * area_K)
    left_K, top_K = (1 - side_K) * across_K, (1 - side_K) * down_K
    return np.stack([left_K, top_K, left_K + side_K, top_K + side_K], axis=1).astype(np.float32)


def cut_view(image: Image.Image, box: np.ndarray) -> Image.Image:
    """The part of an upright picture that a box of :func:`view_boxes` names; at least one pixel."""
    left, top = round(float(box[0]) * image.width), round(float(box[1]) * image.height)
    right, bottom = round(float(box[2]) * image.width), round(float(box[3]) * image.height)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
