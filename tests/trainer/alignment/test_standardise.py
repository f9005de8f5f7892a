"""PHI-S: mean 0, variance 1 in every dimension, no direction's share changed; the same in pieces as at once."""

import numpy as np
import pytest

from common.errors import TrainError
from trainer.alignment.standardise import Moments


def vectors(rows=4000, width=12, seed=0):
    draw = np.random.default_rng(seed)
    skewed = draw.normal(size=(rows, width)) * np.linspace(0.01, 3, width) @ draw.normal(size=(width, width))
    return (skewed + draw.normal(size=width)).astype(np.float32)


def fitted(given, pieces=1):
    moments = Moments()
    for piece in np.array_split(given, pieces):
        moments.add(piece)
    return moments.standardising("teacher 'a'")


def test_every_dimension_has_mean_0_and_variance_1():
    given = vectors()
    mapped = fitted(given)(given)
    np.testing.assert_allclose(mapped.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(mapped.var(axis=0), 1, rtol=1e-3)
    assert not np.allclose(given.var(axis=0), given.var(axis=0).mean(), rtol=0.5)


def test_distances_are_all_scaled_by_one_factor():
    given = vectors()
    mapped = fitted(given)(given)
    pairs = [(0, 1), (2, 3), (10, 500), (7, 1999)]
    ratios = [np.linalg.norm(mapped[a] - mapped[b]) / np.linalg.norm(given[a] - given[b]) for a, b in pairs]
    assert ratios == pytest.approx([ratios[0]] * len(pairs), rel=1e-4)


def test_pieces_and_repetition_change_nothing():
    given = vectors()
    whole, pieces, again = fitted(given), fitted(given, 7), fitted(given)
    np.testing.assert_allclose(whole.matrix_TW, pieces.matrix_TW, atol=1e-4)
    np.testing.assert_array_equal(whole.matrix_TW, again.matrix_TW)


@pytest.mark.parametrize(
    ("given", "said"),
    [(vectors(1), "There are 1 vectors of teacher 'a'"), (np.ones((9, 4), np.float32), "all the same")],
)
def test_too_little_to_fit_to_is_refused(given, said):
    with pytest.raises(TrainError, match=said):
        fitted(given)
