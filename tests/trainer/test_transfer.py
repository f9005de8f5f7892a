"""Batches on their way to the device: the same numbers, in one piece."""

import numpy as np
import torch

from trainer.data import Batch, TeacherRows
from trainer.transfer import Sender


def make_batch(seed: int, rows: int = 3, teachers: int = 2) -> Batch:
    draw = np.random.default_rng(seed)
    said = {
        f"t{k}": TeacherRows(
            draw.random((rows, 5 + k), np.float32),
            draw.random((rows, 1), np.float32),
            draw.random(rows) < 0.5,
            draw.random(rows) < 0.5,
        )
        for k in range(teachers)
    }
    return Batch(
        place_B=draw.integers(0, 1 << 40, rows),
        sample_ids=[str(i) for i in range(rows)],
        pixels_BHWC=draw.integers(0, 256, (rows, 7, 7, 3), np.uint8),
        tokens_BL=draw.integers(0, 9, (rows, 11), np.int32),
        teachers=said,
        draws_BK=draw.random((rows, 1 + teachers if teachers else 0), np.float32),
    )


def same(tensor: torch.Tensor, array: np.ndarray) -> bool:
    return tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)


def test_every_array_arrives_with_its_type_and_shape_also_when_the_next_is_sent():
    sender, batches = Sender(torch.device("cpu")), [make_batch(seed) for seed in range(3)]
    for batch, found in zip(batches, [sender.send(batch) for batch in batches], strict=True):
        assert same(found.pixels_BHWC, batch.pixels_BHWC)
        assert same(found.tokens_BL, batch.tokens_BL)
        assert same(found.draws_NK, batch.draws_BK)
        assert same(found.places_N, batch.place_B)
        for name, rows in batch.teachers.items():
            theirs = (rows.image_BT, rows.text_BT, rows.image_mask_B, rows.text_mask_B)
            assert all(same(part, array) for part, array in zip(found.teachers[name], theirs, strict=True))


def test_without_teachers_nothing_is_told():
    found = Sender(torch.device("cpu")).send(make_batch(0, teachers=0))
    assert (found.teachers, found.draws_NK, found.places_N) == ({}, None, None)


def test_what_ranks_tell_each_other_stands_in_rank_order(monkeypatch):
    """Two ranks' bytes as an exchange would bring them; the exchange itself is in the tests of two processes."""
    batches, told = [make_batch(0), make_batch(1)], []
    monkeypatch.setattr("trainer.transfer.gather_constant", lambda local: told.append(local.clone()) or local)
    sender = Sender(torch.device("cpu"))
    for batch in batches:
        sender.send(batch)
    monkeypatch.setattr("trainer.transfer.gather_constant", lambda local: torch.cat(told))
    found = sender.send(batches[0])
    assert same(found.pixels_BHWC, batches[0].pixels_BHWC)
    assert same(found.places_N, np.concatenate([batch.place_B for batch in batches]))
    assert same(found.draws_NK, np.concatenate([batch.draws_BK for batch in batches]))
    assert same(found.teachers["t1"].image_NT, np.concatenate([batch.teachers["t1"].image_BT for batch in batches]))
    assert same(
        found.teachers["t0"].text_mask_N, np.concatenate([batch.teachers["t0"].text_mask_B for batch in batches])
    )
