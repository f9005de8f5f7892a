"""Finding this test's own Ray processes, and no one else's, to kill or pause them."""

import time
from collections.abc import Callable

import psutil


def workers(root: int, title: str) -> list[psutil.Process]:
    """Processes below ``root`` whose command line starts with a title, such as ``ray::Teacher_a``."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> object:
    """The first true answer of a condition; fails loudly when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds:g} s")
