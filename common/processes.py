"""A process and its machine: the cores it may use, and a name by which others there tell whether it still runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process's name that is never given twice.

    Attributes:
        machine: This boot of this machine, and the container's space of process ids; empty where the system has none.
        pid: Its process id.
        started: When it began, in clock ticks since boot: process ids are used again.
    """

    machine: str
    pid: int
    started: int

    def has_ended(self) -> bool:
        """Whether it certainly runs no more; False where that cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)  # asks, sends nothing
        except ProcessLookupError:
            return True
        except OSError:
            return False
        state, started = _state(self.pid)
        # A zombie waits only for its parent to notice its end.
        return state in ("Z", "X") or (started is not None and started != self.started)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


FEW_CORES = 4
"""Threads of one process keep so many busy; of a larger machine Python's lock would leave some idle."""


def has_few_cores() -> bool:
    """Whether threads of this process do what further processes would do elsewhere."""
    return usable_cores() <= FEW_CORES


def this_process() -> Process:
    """The calling process."""
    return Process(_machine(), os.getpid(), _state(os.getpid())[1] or 0)


def _machine() -> str:
    # A container sees the boot of its host but only process ids of its own: their space belongs to the name.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, int | None]:
    """A process's state letter and when it began; unknown where the system does not show it."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", None
    # The name in parentheses may hold spaces and parentheses of its own; after it come the state and 18 others.
    fields = line.rpartition(")")[2].split()
    return fields[0], int(fields[19])
