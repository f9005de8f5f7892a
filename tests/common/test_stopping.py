"""The first signal is a wish, the second acts as it would have before."""

import os
import signal

import pytest

from common.stopping import StopSignals


@pytest.fixture
def noted():
    """A handler of somebody else's for SIGTERM, and what it saw."""
    seen: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("first"))
    yield seen
    signal.signal(signal.SIGTERM, before)


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_second_signal_goes_to_who_had_it_before(noted):
    with StopSignals() as stop:
        stop.catch()  # nobody took it meanwhile
        send()
        assert (stop.asked, noted) == ("SIGTERM", [])
        send()
        assert noted == ["first"]


def test_who_takes_the_signals_meanwhile_gets_the_second_and_the_first_owner_has_them_back(noted):
    later: list[str] = []
    with StopSignals() as stop:
        signal.signal(signal.SIGTERM, lambda *_: later.append("Ray"))
        stop.catch()
        send()
        assert (stop.asked, later) == ("SIGTERM", [])
        send()
        assert later == ["Ray"]
    send()
    assert noted == ["first"]
