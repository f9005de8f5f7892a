"""Logging and progress for people: one logger name, one format, progress lines that also work in a job log."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger("mmkd")


def configure_logs(verbose: bool = False) -> None:
    """Send the project's log to stderr, once; other libraries' loggers are left alone."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


def duration(seconds: float) -> str:
    """A length of time as people say it: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size_text(count: float) -> str:
    """Bytes in decimal units, as storage is sold: ``512 B``, ``1.8 MB``, ``47.20 TB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


RECENT_SECONDS = 60.0
"""Rates are of so long: what went slowly at first says nothing of the rest."""


class Progress:
    """Say how far a stage is, how fast it was lately, and how long is left; at most one line per ``every`` seconds.

    ``done`` units were done before: they count, but not in the rate.
    """

    def __init__(self, what: str, total: int, unit: str, every: float = 5.0, done: int = 0) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.done = done
        self.note: str | Callable[[], str] = ""
        self.begin()

    def begin(self) -> None:
        """Count time from now on: what came before was preparation."""
        self.last = time.monotonic()
        self._marks = deque([(self.last, self.done)])
        """When how many were done, of the last minute; the first of them is a little older."""

    def advance(self, count: int, note: str | Callable[[], str] = "") -> None:
        """Count ``count`` more units as done; ``note``, or what it gives, is shown at the end of the line."""
        self.done += count
        self.note = note or self.note
        moment = time.monotonic()
        if moment - self._marks[-1][0] >= 1:  # a mark a second is enough
            self._marks.append((moment, self.done))
            while len(self._marks) > 2 and moment - self._marks[1][0] >= RECENT_SECONDS:
                self._marks.popleft()
        if moment - self.last >= self.every:
            self.say()

    def say(self) -> None:
        """Print the line now."""
        self.last = time.monotonic()
        began, before = self._marks[0]
        rate = (self.done - before) / max(self.last - began, 1e-9)
        note = self.note() if callable(self.note) else self.note
        left = f", about {duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        logger.info(
            "%s: %d/%d %s (%.0f %%), %s%s%s",
            self.what,
            self.done,
            self.total,
            self.unit,
            100 * self.done / max(self.total, 1),
            # Of large pieces, few a second say "0.0".
            f"{rate:.1f} {self.unit}/s" if rate >= 0.1 or not rate else f"{60 * rate:.1f} {self.unit}/min",
            left,
            f"; {note}" if note else "",
        )
