"""A wish to stop (SIGTERM of a preempted node or ``ray job stop``, Ctrl-C) as a flag that the run looks at."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from common.logs import logger

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While inside, the first SIGTERM or SIGINT only sets ``asked``; a second one acts as it did before."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """Name of the signal that came, such as ``SIGTERM``."""
        self._before: dict[signal.Signals, Any] = {}
        self._displaced: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.catch()
        return self

    def catch(self) -> None:
        """Take the signals, also from whoever took them meanwhile; what was there at first is put back at the end."""
        if self.asked is None and threading.current_thread() is threading.main_thread():  # elsewhere Python cannot
            found = {number: signal.signal(number, self._note) for number in _SIGNALS}
            self._displaced |= {number: handler for number, handler in found.items() if handler != self._note}
            self._before = self._displaced | self._before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before, self._before = self._before, {}
        _put_back(before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        logger.info("%s: ending in good order; once more ends at once", self.asked)
        _put_back(self._displaced)


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
