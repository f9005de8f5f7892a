"""Augmentation: seeded, within its bounds, and off when asked."""

import numpy as np
from PIL import Image

from common.images import fit
from common.models.spec import Geometry
from common.seeding import rng
from trainer.transforms import random_crop, training_view

GEOMETRY = Geometry(size=32)


def picture(width=60, height=40):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_crop_keeps_the_aspect_ratio_and_at_least_the_asked_area():
    for seed in range(50):
        crop = random_crop(picture(600, 400), 0.25, rng(seed))
        assert abs(crop.width / crop.height - 1.5) < 0.02
        assert 0.24 < crop.width * crop.height / (600 * 400) <= 1


def test_the_same_seed_gives_the_same_view_and_another_seed_another():
    views = [training_view(picture(), GEOMETRY, 0.3, rng(seed)) for seed in (1, 1, 2)]
    assert views[0].shape == (32, 32, 3)
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_without_augmentation_a_view_is_what_evaluation_sees():
    assert np.array_equal(training_view(picture(), GEOMETRY, 1.0, rng(0)), fit(picture(), GEOMETRY))
