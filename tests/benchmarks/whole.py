"""Whole commands, start to end, with what all of their processes took; two sizes of one job cancel the start."""

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

CPU_LOOK_SECONDS = 0.2
MEMORY_LOOK_SECONDS = 1.0
GIB = 1 << 30


@dataclass(frozen=True)
class WholeRun:
    """What one command took."""

    seconds: float
    cpu_seconds: float
    """Of all processes; one that ends takes at most a fifth of a second out of the account."""
    driver_cpu_seconds: float
    """Of the command's own process."""
    pss: float
    """Greatest memory of all processes in bytes, shared pages counted once."""
    status: int
    said: str


def run_whole(
    command: list[str], environment: dict[str, str] | None = None, kill_when: Callable[[], bool] | None = None
) -> WholeRun:
    """Run a command to its end and watch it.

    Args:
        command: What to run.
        environment: Beside that of this process.
        kill_when: When it gives true, the command is killed with all its processes.
    """
    log = Path(tempfile.gettempdir()) / f"mmkd-bench-{os.getpid()}-{time.monotonic_ns()}.log"
    started = time.perf_counter()
    used: dict[psutil.Process, float] = {}
    peak, over = 0.0, threading.Event()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=stream, stderr=stream, start_new_session=True
        )
        root = psutil.Process(process.pid)

        def look_at_memory() -> None:
            nonlocal peak
            while not over.wait(MEMORY_LOOK_SECONDS):
                peak = max(peak, _pss(root))

        watcher = threading.Thread(target=look_at_memory, daemon=True)
        watcher.start()
        try:
            while process.poll() is None:
                _note_cpu(root, used)
                if kill_when is not None and kill_when():
                    for one in reversed(_tree(root)):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            one.kill()
                time.sleep(CPU_LOOK_SECONDS)
        finally:
            over.set()
            if process.poll() is None:
                process.kill()
    said = log.read_text(errors="replace")
    log.unlink()
    seconds = time.perf_counter() - started
    return WholeRun(seconds, sum(used.values()), used.get(root, 0.0), peak, process.returncode, said)


def _tree(root: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [root, *root.children(recursive=True)]
    return []


def _note_cpu(root: psutil.Process, used: dict[psutil.Process, float]) -> None:
    for one in _tree(root):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = one.cpu_times()
            used[one] = times.user + times.system


def _pss(root: psutil.Process) -> float:
    total = 0.0
    for one in _tree(root):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += one.memory_full_info().pss
    return total
