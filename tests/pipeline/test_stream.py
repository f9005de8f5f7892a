"""Prepared shards through Ray Data: what reaches the driver, and when it takes long."""

import time

import numpy as np
import pyarrow as pa
import pytest

from common.errors import StorageError
from extractor.stream import Feeder, PreparedShards

pytestmark = pytest.mark.ray


class Preparing:
    """Prepares a shard slowly, or not at all."""

    todo = {4: ("a",), 2: ("a",), 9: ("a",)}

    def __init__(self, seconds: float = 0.0, broken: int | None = None) -> None:
        self.seconds, self.broken = seconds, broken

    def __call__(self, batch):
        (shard,) = batch["shard"]
        time.sleep(self.seconds)
        if shard == self.broken:
            raise StorageError(f"Could not read shard {shard}.")
        rows = 0 if shard == 2 else 3
        return pa.table({"shard": pa.array(np.full(rows, shard, np.int32))})


def taken(prepare) -> list:
    import ray

    prepared = PreparedShards(prepare, 1)
    prepared.allow(len(prepare.todo))
    return [(shard, ray.get(block).num_rows) for shard, block in prepared]


def test_a_block_is_a_shard_in_the_order_asked_for_also_when_it_is_empty(ray_local):
    assert taken(Preparing()) == [(4, 3), (2, 0), (9, 3)]


def test_no_clock_of_ray_data_runs_and_its_settings_are_left_alone(ray_local):
    import ray

    settings = ray.data.DataContext.get_current()
    before = settings.execution_no_progress_timeout_s, settings.target_max_block_size
    settings.execution_no_progress_timeout_s = 1.0
    try:
        assert len(taken(Preparing(seconds=2.5))) == 3
        assert settings.execution_no_progress_timeout_s == 1.0
        assert settings.target_max_block_size == before[1] is not None
    finally:
        settings.execution_no_progress_timeout_s = before[0]


def test_no_more_is_prepared_than_is_allowed(ray_local, tmp_path):
    import ray

    class Counting:
        """Notes which shards were prepared; each is of a megabyte."""

        todo = dict.fromkeys(range(24), ("a",))

        def __call__(self, batch):
            (shard,) = batch["shard"]
            (tmp_path / str(shard)).touch()
            return pa.table({"pixels": pa.array(np.zeros(1_000_000, np.uint8))})

    prepared = PreparedShards(Counting(), 2)
    prepared.allow(3)
    prepared.allow(2)  # less than before changes nothing
    ahead = []
    for taken_shards, (_, block) in enumerate(prepared, start=1):
        time.sleep(0.25)  # long enough to prepare a dozen
        ahead.append(len(list(tmp_path.iterdir())) - taken_shards)
        assert ray.get(block).num_rows == 1_000_000
        prepared.allow(taken_shards + 3)
    assert len(ahead) == 24
    assert max(ahead) == 2, "the third is let in after it was counted"


def test_a_gate_whose_process_dies_is_told_again(ray_local, monkeypatch):
    monkeypatch.setattr("common.gate.REPEAT_SECONDS", 0.2)
    prepared = PreparedShards(Preparing(), 1)
    prepared.allow(1)
    shards = iter(prepared)
    assert next(shards)[0] == 4
    prepared.allow(3)
    ray_local.kill(prepared._keeper.actor, no_restart=False)
    assert [shard for shard, _ in shards] == [2, 9]


def test_who_was_let_in_is_let_in_again_after_the_end(ray_local):
    """Ray does a task again whose product was lost with its machine, also when the last shard was taken long ago."""
    prepared = PreparedShards(Preparing(), 1)
    prepared.allow(3)
    assert len(list(prepared)) == 3
    passes = prepared._keeper.actor.passes.remote
    assert ray_local.get([passes(2), passes(3)], timeout=20) == [True, False]


def test_a_stream_that_is_closed_while_everybody_waits_ends(ray_local):
    prepared = PreparedShards(Preparing(), 1)
    feeder = Feeder(prepared, on_stop=prepared.close)
    time.sleep(1)
    assert feeder.next() is None
    feeder.stop()
    feeder._thread.join(timeout=20)
    assert not feeder._thread.is_alive()


def test_an_error_keeps_its_class_and_its_words(ray_local):
    with pytest.raises(StorageError) as caught:
        taken(Preparing(broken=9))
    assert str(caught.value) == "Could not read shard 9."
