import threading
import time

import pytest

from common.errors import ClusterError
from extractor.stream import Feeder


def take_all(feeder: Feeder, taken: list) -> None:
    while not feeder.is_done:
        if (item := feeder.next()) is None:
            time.sleep(0.01)
        else:
            taken.append(item)


def test_a_feeder_gives_everything_once_in_order():
    items = [(shard, f"table {shard}") for shard in range(50)]
    taken: list = []
    take_all(Feeder(iter(items)), taken)
    assert taken == items


def test_what_ends_a_stream_early_comes_after_what_it_gave():
    def broken():
        yield 0, "table"
        raise ValueError("the pairs cannot be read")

    feeder, taken = Feeder(broken()), []
    with pytest.raises(ValueError, match="the pairs cannot be read"):
        take_all(feeder, taken)
    assert taken == [(0, "table")]
    assert not feeder.is_done


def test_a_stopped_feeder_closes_its_stream():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0, "table"
        finally:
            closed.set()

    feeder = Feeder(endless())
    feeder.stop()
    assert closed.wait(10)


def test_a_stream_that_gives_nothing_while_it_is_asked_is_an_error():
    over = threading.Event()

    def silent():
        over.wait()
        yield 0, "table"

    feeder = Feeder(silent(), stall_seconds=0.2)
    with pytest.raises(ClusterError, match="No shard was prepared"):
        take_all(feeder, [])
    over.set()


def test_time_in_which_nobody_asks_does_not_count(monkeypatch):
    """Teachers may load or work for hours before they want another shard."""
    over = threading.Event()

    def slow():
        over.wait()
        yield 0, "table"

    feeder = Feeder(slow(), stall_seconds=0.2)
    monkeypatch.setattr("extractor.stream._PAUSE_SECONDS", 0.3)
    for _ in range(3):
        assert feeder.next() is None
        time.sleep(0.4)  # longer than a stall, and nobody was waiting
    over.set()
    while (item := feeder.next()) is None:
        time.sleep(0.01)
    assert item == (0, "table")
