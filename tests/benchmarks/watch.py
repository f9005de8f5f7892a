"""What a run takes, looked at again and again: memory and CPU time of all its processes, Ray's object store."""

import contextlib
import threading
import time
from typing import Any, Self

import numpy as np
import psutil

LOOK_SECONDS = 0.25
MEMORY_LOOK_SECONDS = 1.0
"""Reading a process's shared pages costs the kernel milliseconds."""


class _Onlooker:
    """Looks at something again and again, on a thread of its own, while the context is open."""

    def __init__(self, every: float = LOOK_SECONDS) -> None:
        self.every = every
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.look()

    def _look_on(self) -> None:
        while not self._stopped.wait(self.every):
            self.look()

    def look(self) -> None:
        """Look once."""
        raise NotImplementedError


class CpuMeter(_Onlooker):
    """CPU time of this process and all its descendants, those among them that come and go.

    A process that ends takes at most ``LOOK_SECONDS`` of its time out of the account.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[psutil.Process, float] = {}
        self._seen: list[tuple[float, float]] = []
        self._own: list[float] = []
        self.look()

    @property
    def seconds(self) -> float:
        """Used between the first look and the last."""
        return self._seen[-1][1] - self._seen[0][1]

    def seconds_at(self, moment: float) -> float:
        """Used until a moment (seconds since 1970), interpolated between the looks."""
        times, used = zip(*self._seen, strict=True)
        return float(np.interp(moment, times, used))

    def own_share(self, start: float, stop: float) -> float:
        """Of this process alone between two moments, as a share of what all used."""
        times, used = zip(*self._seen, strict=True)
        own, together = (np.diff(np.interp([start, stop], times, column))[0] for column in (self._own, used))
        return float(own / together) if together else 0.0

    def look(self) -> None:
        """Note what every process has used so far."""
        for process in tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                self._last[process] = used.user + used.system
        self._seen.append((time.time(), sum(self._last.values())))
        mine = psutil.Process().cpu_times()
        self._own.append(mine.user + mine.system)


class MemoryWatch(_Onlooker):
    """Greatest memory of this process and all its descendants. Ray must be initialised.

    Attributes:
        peaks: ``rss`` (pages of the object store count once for each process that has touched them), ``pss`` (shared
            pages count once) and ``uss`` (pages of one process alone), sums over the processes; ``object_store``: what
            it held. All in bytes.
    """

    def __init__(self) -> None:
        super().__init__(MEMORY_LOOK_SECONDS)
        self.peaks = dict.fromkeys(("rss", "pss", "uss", "object_store"), 0.0)

    def look(self) -> None:
        """Note what is greater than before."""
        seen = {**memory_of_tree(), "object_store": float(store_statistics().object_store_bytes_used)}
        self.peaks = {name: max(peak, seen[name]) for name, peak in self.peaks.items()}


def tree() -> list[psutil.Process]:
    """This process and all its descendants."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def memory_of_tree() -> dict[str, float]:
    """RSS, PSS and USS of this process and its descendants, summed, in bytes."""
    total = dict.fromkeys(("rss", "pss", "uss"), 0.0)
    for process in tree():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            found = process.memory_full_info()
            for name in total:
                total[name] += getattr(found, name)
    return total


def store_statistics() -> Any:
    """Ray's own account of the object store: bytes used and capacity now, bytes spilled since it started."""
    from ray._private.internal_api import get_memory_info_reply
    from ray._private.state import state

    return get_memory_info_reply(state).store_stats
