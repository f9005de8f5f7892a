"""Rotations that spread evenly."""

import numpy as np
import pytest

from trainer.alignment.hadamard import spreading_rotation


@pytest.mark.parametrize("size", [1, 2, 4, 12, 16, 20, 24, 48, 512, 640, 768, 1024, 1152])
def test_entries_are_of_one_size_and_rows_orthogonal(size):
    rotation = spreading_rotation(size)
    np.testing.assert_allclose(np.abs(rotation), 1 / np.sqrt(size), atol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(size), atol=1e-10)


@pytest.mark.parametrize("size", [3, 5, 10, 18, 77])
def test_other_sizes_still_get_a_rotation(size):
    rotation = spreading_rotation(size)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(size), atol=1e-10)
    assert np.abs(rotation).max() <= np.sqrt(2 / size) + 1e-12
