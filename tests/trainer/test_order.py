"""The sample order: each row at most once an epoch, another order each epoch, the same for any number of workers."""

import numpy as np
import pytest

from trainer.order import Order, Segment, split_places, worker_lanes


def make_order(batch_size=16, lanes=4, shuffle_shards=2, seed=0, sizes=(50, 0, 37, 64, 21, 60)):
    rows = tuple(np.sort(np.random.default_rng(k).permutation(100)[:size]) for k, size in enumerate(sizes))
    return Order(tuple(range(3, 3 + len(sizes))), rows, batch_size, lanes, shuffle_shards, seed)


def global_sequence(order: Order, workers: int, first_step: int, total_steps: int) -> list[np.ndarray]:
    """Global batches, put together from what each worker would read."""
    shares = []
    for rank in range(workers):
        lanes = worker_lanes(order.lanes, rank, workers)
        shares.append(np.concatenate([order.segment_places(s, lanes) for s in order.segments(first_step, total_steps)]))
    return list(np.concatenate(shares, axis=1))


@pytest.mark.parametrize("shuffle_shards", [1, 2, 5])
@pytest.mark.parametrize(("batch_size", "lanes"), [(16, 4), (32, 8), (20, 1), (232, 4)])
def test_an_epoch_visits_each_eligible_row_at_most_once(batch_size, lanes, shuffle_shards):
    order = make_order(batch_size, lanes, shuffle_shards)
    for epoch in range(3):
        first = epoch * order.steps_per_epoch
        places = np.concatenate(global_sequence(order, 1, first, first + order.steps_per_epoch))
        assert len(places) == order.steps_per_epoch * batch_size
        assert len(np.unique(places)) == len(places)
        shards, rows = split_places(places)
        for shard in np.unique(shards):
            assert set(rows[shards == shard]) <= set(order.rows[order.shards.index(shard)])


def test_epochs_differ_in_order_and_in_what_they_leave_out():
    order = make_order(batch_size=32, lanes=8)
    epochs = [
        np.concatenate(global_sequence(order, 1, e * order.steps_per_epoch, (e + 1) * order.steps_per_epoch))
        for e in range(6)
    ]
    assert order.eligible % 32 > 0
    assert len({tuple(places) for places in epochs}) == 6
    assert len({frozenset(places) for places in epochs}) > 1


def test_the_order_follows_from_the_seed():
    same, other = (global_sequence(make_order(seed=seed), 1, 0, 20) for seed in (0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(same, global_sequence(make_order(), 1, 0, 20), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(same, other, strict=True))


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_sees_the_same_global_batches(workers):
    order = make_order()
    total = 3 * order.steps_per_epoch - 2
    alone, together = global_sequence(order, 1, 0, total), global_sequence(order, workers, 0, total)
    assert len(alone) == total
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_resuming_anywhere_goes_on_with_the_same_batches():
    order = make_order()
    total = 2 * order.steps_per_epoch + 3
    whole = global_sequence(order, 1, 0, total)
    for start in range(total):
        rest = global_sequence(order, 2, start, total)
        assert all(np.array_equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    assert np.array_equal(order.step_places(order.steps_per_epoch + 1), whole[order.steps_per_epoch + 1])


def test_a_window_mixes_about_as_many_shards_as_asked():
    order = make_order(batch_size=4, lanes=1, shuffle_shards=2, sizes=(40,) * 10)
    shards, _ = split_places(order.segment_places(Segment(0, 1, 0, order.steps_per_window), range(1)))
    assert order.steps_per_window == 20
    assert 2 <= len(np.unique(shards)) <= 3
    assert len(np.unique(shards[:5])) > 1  # mixed from the first steps on


def test_too_few_rows_make_no_step():
    assert make_order(batch_size=400).steps_per_epoch == 0
