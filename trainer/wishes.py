"""What the workers of a run decide together between two steps: whether to save, and whether to end.

A wish comes to the first worker alone: from its clock, or from a file that the driver writes after a signal. All must
follow it after the same step, or those that go on would wait for the others for ever.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from types import TracebackType
from typing import NamedTuple

import torch
from torch import distributed

from common.errors import MmkdError
from common.storage import Storage
from trainer.loop import LOOK_BACK, StepNumbers

STOP = "stop.json"
"""In a run's folder: the driver wants the run to end in good order."""
LOOK_SECONDS = 0.5


class Wishes(NamedTuple):
    """Of one worker, or of all."""

    stop: bool = False
    save: bool = False


class Wisher:
    """The first worker's wishes.

    Args:
        run: The run's folder, in which the driver's file is looked for, in the background.
        save_seconds: Between two checkpoints.
    """

    def __init__(self, run: Storage, save_seconds: float) -> None:
        self._run, self._save_seconds = run, save_seconds
        self._saved = time.monotonic()
        self._stop, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="mmkd-stop", daemon=True)

    def __enter__(self) -> Wisher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def wishes(self) -> Wishes:
        """Of this moment; a checkpoint is wished for once each time."""
        save = time.monotonic() - self._saved >= self._save_seconds
        if save:
            self.saved()
        return Wishes(self._stop.is_set(), save)

    def saved(self) -> None:
        """A checkpoint was written; its clock begins anew."""
        self._saved = time.monotonic()

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            try:
                if self._run.exists(STOP):
                    self._stop.set()
                    return
            except (MmkdError, OSError):
                continue  # the storage is out of reach for a moment; what matters is said by those that write there


class Agreement:
    """Takes each worker's wishes to one decision, the same on all, without keeping a GPU waiting for it.

    Args:
        workers: How many take part.
        device: Where they compute; on a GPU a wish is followed some steps later, when it has arrived anyway.
    """

    def __init__(self, workers: int, device: torch.device) -> None:
        self._workers, self._device = workers, device
        self._look_back = LOOK_BACK if device.type == "cuda" else 0
        self._waiting: deque[StepNumbers] = deque()

    def decide(self, wishes: Wishes) -> Wishes:
        """What all do after this step; called by each worker after each step."""
        if self._workers == 1:
            return wishes
        wished = torch.zeros(len(wishes), device=self._device)
        for place, wish in enumerate(wishes):
            if wish:
                wished[place].fill_(1)  # a kernel, not a copy from here
        distributed.all_reduce(wished, op=distributed.ReduceOp.MAX)
        self._waiting.append(StepNumbers(Wishes._fields, list(wished)))
        if len(self._waiting) <= self._look_back:
            return Wishes()
        return Wishes(**{name: value > 0 for name, value in self._waiting.popleft().fetch().items()})
