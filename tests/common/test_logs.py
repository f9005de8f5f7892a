"""Lines for people: lengths of time, sizes, and how far a stage is."""

import pytest

from common import logs
from common.logs import Progress, duration, size_text


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.moment = 1000.0

    def monotonic(self):
        return self.moment


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_rate_is_of_the_last_minute_and_so_is_what_is_left(clock, caplog):
    caplog.set_level("INFO", "mmkd")
    progress = Progress("stage", 1000, "rows", every=50)
    for _ in range(600):  # slow at first
        clock.moment += 1
        progress.advance(0)
    for _ in range(100):  # then five rows a second
        clock.moment += 1
        progress.advance(5)
    assert lines(caplog)[-1] == "stage: 500/1000 rows (50 %), 5.0 rows/s, about 1 min 40 s left"


def test_what_an_earlier_run_did_is_in_no_rate(clock, caplog):
    caplog.set_level("INFO", "mmkd")
    progress = Progress("stage", 100, "steps", done=90)
    clock.moment += 10
    progress.advance(1)
    assert lines(caplog) == ["stage: 91/100 steps (91 %), 0.1 steps/s, about 90 s left"]


def test_large_pieces_are_counted_by_the_minute_and_notes_come_last(clock, caplog):
    caplog.set_level("INFO", "mmkd")
    progress = Progress("ingest", 8, "parts")
    clock.moment += 100
    progress.advance(1, lambda: "512 rows")
    assert lines(caplog) == ["ingest: 1/8 parts (12 %), 0.6 parts/min, about 11 min 40 s left; 512 rows"]


def test_lengths_and_sizes():
    assert [duration(seconds) for seconds in (42, 185, 7800)] == ["42 s", "3 min 05 s", "2 h 10 min"]
    assert [size_text(count) for count in (512, 1.8e6, 47.2e12)] == ["512 B", "1.8 MB", "47.20 TB"]
