import threading

import numpy as np
import pytest
import torch

from extractor.passes import MicroBatches

INPUTS = np.arange(1, 12, dtype=np.float32).reshape(11, 1).repeat(3, axis=1)


def tower(batch: torch.Tensor) -> torch.Tensor:
    """Two numbers whose ratio tells the input."""
    return torch.stack([batch[:, 0], torch.full((len(batch),), 10.0)], dim=1)


def expected() -> np.ndarray:
    raw = np.stack([INPUTS[:, 0], np.full(11, 10.0)], axis=1)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def test_every_pass_has_one_shape_and_every_input_its_vector():
    shapes = []

    def watched(batch):
        shapes.append(tuple(batch.shape))
        return tower(batch)

    passes = MicroBatches("cpu", 4)
    vectors, norms, failures = passes.run(watched, INPUTS, 2)
    assert shapes == [(4, 3)] * 3
    assert passes.count == 3
    assert not failures
    np.testing.assert_allclose(vectors, expected(), atol=1e-3)
    np.testing.assert_allclose(norms, np.hypot(INPUTS[:, 0], 10), rtol=1e-6)
    assert (vectors == vectors.astype(np.float16)).all()  # rounded to half precision


def test_another_precision():
    vectors, _, _ = MicroBatches("cpu", 4, precision=torch.bfloat16).run(tower, INPUTS, 2)
    np.testing.assert_allclose(vectors, expected(), rtol=2**-8)
    np.testing.assert_array_equal(vectors, torch.from_numpy(vectors).bfloat16().float().numpy())
    assert not (vectors == expected().astype(np.float16)).all()


def test_nothing_in_gives_nothing():
    vectors, norms, failures = MicroBatches("cpu", 4).run(tower, INPUTS[:0], 2)
    assert (vectors.shape, norms.shape, failures) == ((0, 2), (0,), {})


def test_out_of_memory_halves_the_micro_batch_and_goes_on():
    tried = []

    def hungry(batch):
        tried.append(len(batch))
        if len(batch) > 2 and len(tried) > 1:  # the first pass still fits
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tower(batch)

    passes = MicroBatches("cpu", 8)
    vectors, _, failures = passes.run(hungry, INPUTS, 2)
    assert tried[:4] == [8, 8, 4, 2]
    assert passes.rows == 2
    assert not failures
    np.testing.assert_allclose(vectors, expected(), atol=1e-3)
    passes.run(tower, INPUTS, 2)
    assert passes.rows == 2  # for good: what did not fit once will not fit later


def test_when_not_even_one_row_fits_the_error_comes_through():
    def never(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        MicroBatches("cpu", 4).run(never, INPUTS, 2)


def test_rows_a_tower_fails_on_are_named_and_the_others_survive():
    def picky(batch):
        if (batch[:, 0] == 6).any() or (batch[:, 0] == 7).any():
            raise IndexError("token out of range")
        return tower(batch)

    vectors, norms, failures = MicroBatches("cpu", 4).run(picky, INPUTS, 2)
    assert failures == {5: "IndexError: token out of range", 6: "IndexError: token out of range"}
    good = [row for row in range(11) if row not in failures]
    np.testing.assert_allclose(vectors[good], expected()[good], atol=1e-3)
    assert np.isnan(norms[[5, 6]]).all()
    assert (vectors[[5, 6]] == 0).all()


def test_a_row_is_not_to_blame_for_a_gpu_that_is_full():
    """Out of memory while rows are tried one by one halves the micro-batch too; it rejects nobody."""
    failed = []

    def picky_and_hungry(batch):
        if failed and len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (batch[:, 0] == 6).any():
            failed.append(True)
            raise IndexError("token out of range")
        return tower(batch)

    passes = MicroBatches("cpu", 4)
    vectors, _, failures = passes.run(picky_and_hungry, INPUTS, 2)
    assert failures == {5: "IndexError: token out of range"}
    assert passes.rows == 2
    good = [row for row in range(11) if row != 5]
    np.testing.assert_allclose(vectors[good], expected()[good], atol=1e-3)


def test_vectors_that_are_not_numbers_are_zero_and_their_norms_say_so():
    def broken(batch):
        out = tower(batch)
        out[batch[:, 0] == 3] = float("nan")
        out[batch[:, 0] == 4] = float("inf")
        return out

    vectors, norms, _ = MicroBatches("cpu", 4).run(broken, INPUTS, 2)
    assert np.flatnonzero(~np.isfinite(norms)).tolist() == [2, 3]
    assert np.isfinite(vectors).all()


def test_a_pass_whose_rows_all_fail_alike_is_not_the_rows_fault():
    def broken(batch):
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    with pytest.raises(RuntimeError, match="all 8 rows of a pass fail alike: RuntimeError: CUBLAS_STATUS_ALLOC_FAILED"):
        MicroBatches("cpu", 8).run(broken, INPUTS, 2)


def test_lanes_run_side_by_side_and_give_what_one_pass_after_the_other_gives():
    together = threading.Barrier(2, timeout=30)

    def met(batch):
        together.wait()  # a lone pass would wait for ever
        return tower(batch)

    passes = MicroBatches("cpu", 2, threads=2)
    inputs = np.concatenate([INPUTS, INPUTS[:1]])
    vectors, norms, failures = passes.run(met, inputs, 2)
    alone = MicroBatches("cpu", 2).run(tower, inputs, 2)
    np.testing.assert_array_equal(vectors, alone[0])
    np.testing.assert_array_equal(norms, alone[1])
    assert (passes.count, failures) == (6, {})


def test_a_row_that_fails_in_a_lane_is_alone_in_it():
    def picky(batch):
        if (batch[:, 0] == 6).any():
            raise ValueError("six")
        return tower(batch)

    vectors, norms, failures = MicroBatches("cpu", 2, threads=3).run(picky, INPUTS, 2)
    assert failures == {5: "ValueError: six"}
    assert np.isnan(norms[5])
    rest = np.delete(np.arange(11), 5)
    np.testing.assert_allclose(vectors[rest], expected()[rest], atol=1e-3)


def test_a_single_pass_has_all_threads():
    names = []

    def named(batch):
        names.append(threading.current_thread().name)
        return tower(batch)

    MicroBatches("cpu", 16, threads=2).run(named, INPUTS, 2)
    assert names == [threading.main_thread().name]
