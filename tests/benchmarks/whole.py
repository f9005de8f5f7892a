"""Whole commands, start to end, with what all of their processes took; two sizes of one job cancel the start."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
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


def insist(run: WholeRun) -> WholeRun:
    """Refuse to measure what failed."""
    if run.status:
        raise SystemExit(f"{run.said[-4000:]}\nA command ended with status {run.status}.")
    return run


def make_peer(program: str, packages: list[str], place: Path | None = None) -> Path:
    """An environment of its own for another program, with the torch and Pillow of ours; made once and kept.

    Args:
        program: Its name.
        packages: What pip installs. Old releases need a setuptools that still has ``pkg_resources``.
        place: Where; by default in the user's cache.
    """
    place = place or Path.home() / ".cache" / "mmkd-bench" / program
    if not (place / "made").exists():
        print(f"making {place} (about three minutes) ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        same = [f"{name}=={version(name)}" for name in ("torch", "torchvision", "pillow")]
        pip = [str(place / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "setuptools<81", *packages, *same], check=True)
        (place / "made").touch()
    return place


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
