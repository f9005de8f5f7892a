"""Augmentation of training pictures: a seeded crop, then the very preparation that evaluation uses."""

from __future__ import annotations

import numpy as np
from PIL import Image

from common.images import fit
from common.models.spec import Geometry


def random_crop(image: Image.Image, least_area: float, generator: np.random.Generator) -> Image.Image:
    """Cut out a random part of the picture's own aspect ratio.

    No flips, since left and right mean something in medicine, and no stretching, since shape does.

    Args:
        image: An RGB picture.
        least_area: Smallest share of the area that is kept; 1 returns the picture as it is.
        generator: Decides size and place; three numbers are drawn whatever the picture.
    """
    area, across, down = generator.random(3)
    side = (least_area + (1 - least_area) * area) ** 0.5
    width, height = (max(1, round(length * side)) for length in image.size)
    if (width, height) == image.size:
        return image
    left, top = round((image.width - width) * across), round((image.height - height) * down)
    return image.crop((left, top, left + width, top + height))


def training_view(
    image: Image.Image, geometry: Geometry, least_area: float, generator: np.random.Generator
) -> np.ndarray:
    """A random crop in the student's geometry: uint8 [size, size, 3]."""
    return fit(random_crop(image, least_area, generator), geometry)
