"""A teacher's temperature is the one at which its softmax is as sure as it is right."""

import numpy as np
import pytest
import torch

from common.lake import open_lake
from trainer import temperature
from trainer.losses import clip_loss
from trainer.temperature import best_scale, fitted_scales


def pairs(rows, noise, seed=0):
    draw = np.random.default_rng(seed)

    def unit(vectors):
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    image = draw.normal(size=(rows, 16))
    return unit(image), unit(image + noise * draw.normal(size=image.shape))


def loss(image, text, scale):
    return clip_loss(torch.from_numpy(image), torch.from_numpy(text), torch.tensor(scale)).item()


def test_no_other_factor_is_better():
    image, text = pairs(64, 2.0)
    best = best_scale(image, text, 64)
    assert 1 < best < 200
    assert all(loss(image, text, best) <= loss(image, text, best * change) for change in (0.5, 0.95, 1.05, 2))


def test_a_teacher_that_knows_less_is_made_softer():
    assert best_scale(*pairs(256, 3.0), 32) < best_scale(*pairs(256, 1.0), 32)


def test_fewer_pairs_than_a_batch_are_one_batch():
    image, text = pairs(10, 2.0)
    assert best_scale(image, text, 64) == best_scale(image, text, 10)


def test_memory_does_not_grow_with_the_batch(monkeypatch):
    monkeypatch.setattr(temperature, "MOST_AT_ONCE", 16)
    image, text = pairs(64, 2.0)
    assert best_scale(image, text, 64) == best_scale(image, text, 16)


def test_a_useless_teacher_ends_at_the_bound():
    image, text = pairs(64, 1.0)
    assert best_scale(image, -text, 64) == pytest.approx(1, rel=1e-3)


def test_it_is_fitted_to_the_admitted_train_pairs_by_the_seed(tiny_lake):
    lake = open_lake(tiny_lake)
    found = fitted_scales(lake, "sel", ("alpha", "beta"), 16, 0)
    assert found == fitted_scales(lake, "sel", ("alpha", "beta"), 16, 0)
    assert all(1 <= scale <= 200 for scale in found.values())
    assert found["alpha"] != found["beta"]
