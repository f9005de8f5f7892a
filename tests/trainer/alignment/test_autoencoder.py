"""The shared autoencoder: the published error, learning, repeatability."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from trainer.alignment.autoencoder import SharedAutoencoder, fit_autoencoder
from trainer.config import AutoencoderConfig

SMALL = AutoencoderConfig(latent_dim=6, hidden_dim=32, dropout=0, noise=0, lr=5e-3)
DIMS = {"a.v2": 5, "b": 8}


def unit(rows, width, seed):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def batch(rows=32, seed=0):
    return {
        "a.v2": (unit(rows, 5, seed), unit(rows, 5, seed + 1)),
        "b": (unit(rows // 2, 8, seed + 2), unit(rows // 2, 8, seed + 3)),
    }


def test_the_error_is_the_mean_over_every_teachers_every_rows_both_sides():
    torch.manual_seed(0)
    model = SharedAutoencoder(DIMS, SMALL).eval()
    given = {name: tuple(map(torch.from_numpy, pair)) for name, pair in batch(4).items()}
    errors = []
    for number, (name, width) in enumerate(DIMS.items()):
        for side, vectors in zip(("image", "text"), given[name], strict=True):
            for row in vectors:  # one by one, as the published code does
                latent = model.into[number](row)
                rebuilt = model.out_of[number](model.decoders[side](model.encoders[side](latent)))
                assert rebuilt.shape == (width,)
                errors.append(F.mse_loss(rebuilt, row))
    torch.testing.assert_close(model(given), torch.stack(errors).mean())


def test_it_learns_and_both_sides_share_a_teachers_map():
    maps, course = fit_autoencoder([[batch()] for _ in range(60)], DIMS, SMALL, seed=0)
    assert course[-1] < 0.5 * course[0]
    assert maps["b"]["image"].matrix_TW.shape == (8, 6)
    assert maps["a.v2"]["image"] is maps["a.v2"]["text"]


def test_equal_seeds_give_equal_maps_and_the_callers_generator_is_left_alone():
    noisy = SMALL.model_copy(update={"noise": 0.01, "dropout": 0.2})
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    one, other, third = (fit_autoencoder([[batch()]] * 3, DIMS, noisy, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.rand(1) == before
    np.testing.assert_array_equal(one["b"]["text"].matrix_TW, other["b"]["text"].matrix_TW)
    assert not np.array_equal(one["b"]["text"].matrix_TW, third["b"]["text"].matrix_TW)


def test_a_teacher_without_rows_in_a_batch_is_passed_over():
    empty = {"a.v2": (unit(0, 5, 0), unit(0, 5, 1)), "b": batch()["b"]}
    maps, course = fit_autoencoder(
        [[empty, {name: (pair[0][:0], pair[1][:0]) for name, pair in empty.items()}]], DIMS, SMALL, 0
    )
    assert len(course) == 1
    assert course[0] > 0
    assert set(maps) == set(DIMS)
