"""What a run leaves behind: metric rows, validation, checkpoints and the result, written by the first worker."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from common.config import fingerprint
from common.errors import MmkdError
from common.lake import now
from common.logs import Progress, logger
from common.storage import Storage
from trainer.checkpoint import (
    FOLDER,
    MODEL,
    OBJECTIVE,
    OPTIMIZER,
    Checkpoint,
    best_checkpoint,
    prune,
    record_best,
    save_checkpoint,
    step_name,
)
from trainer.config import OptimConfig, ScaleConfig
from trainer.data import TrainData, validation_batches
from trainer.late_writes import LateWrites
from trainer.loop import StepReport, validation_loss
from trainer.objectives import Objective
from trainer.optim import load_optimizer_tensors, optimizer_tensors
from trainer.student import Student
from trainer.trackers import open_tracker

RUN = "run.json"
METRICS = "metrics.jsonl"
METRICS_SECONDS = 60.0
"""Metric rows are stored with every checkpoint, and so often between two."""
RESULT = "result.json"
ERROR = "error.json"


@dataclass(frozen=True)
class Job:
    """A run, as the driver hands it to the workers beside its :class:`TrainData`."""

    stage: str
    run_uri: str
    optim: OptimConfig
    scale: ScaleConfig
    tasks: int
    total_steps: int
    objective: Callable[[], Objective]
    start: Callable[[Student], None]
    """Fills in the first weights; not called when the run goes on from a checkpoint."""
    validation_places: np.ndarray
    identity: dict[str, Any]
    """What the run is, as in run.json; goes into every checkpoint."""
    asked: dict[str, str] = field(default_factory=dict)
    """For people: the names and addresses behind the hashes of the identity, relative to the lake if inside it."""
    first_weights: dict[str, str] = field(default_factory=dict)
    """Name -> licence of what the student was started from, also by the stage before."""
    extended: tuple[dict[str, Any], ...] = ()
    """When the run was given more epochs, as in run.json."""
    key: str = ""
    """By which trackers know the run; the driver finds it in run.json."""
    gpu: bool = False
    threads: int = 0
    """Of torch in each worker on a CPU; 0 leaves Ray's choice."""


class Parts(NamedTuple):
    """What learns, and what makes it learn."""

    student: Student
    objective: Objective
    optimizer: torch.optim.AdamW


def restore(parts: Parts, checkpoint: Checkpoint) -> None:
    """Put weights, learned scalars and the optimizer's state back as they were after the checkpoint's step."""
    parts.student.load_tensors(checkpoint.tensors(MODEL), checkpoint.uri)
    parts.objective.load_state_dict(checkpoint.tensors(OBJECTIVE), strict=True)
    load_optimizer_tensors(parts.optimizer, checkpoint.tensors(OPTIMIZER))


@dataclass
class Pace:
    """Samples and waiting of the steps so far, for the progress line."""

    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, report: StepReport, samples: int) -> None:
        """Count a step."""
        self.samples += samples
        self.seconds += report.seconds
        self.waited += report.wait_seconds

    def describe(self) -> str:
        """As it ends the line; empty before the first step."""
        if not self.seconds:
            return ""
        rate, share = self.samples / self.seconds, self.waited / self.seconds
        return f"; {rate:.0f} samples/s, {share:.0%} of the time waiting for data"


def describe_terms(terms: dict[str, float]) -> str:
    """The loss, and its unweighted terms where it has several."""
    parts = {name: value for name, value in terms.items() if name != "total" and value}
    listing = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
    return f"loss {terms['total']:.3f}" + (f" ({listing})" if len(parts) > 1 else "")


class Recorder:
    """Keeps the account of a run; only the first worker has one."""

    def __init__(self, run: Storage, job: Job, data: TrainData, parts: Parts, first_step: int) -> None:
        self.run, self.job, self.data, self.parts = run, job, data, parts
        # Rows of steps after the checkpoint are written again, by the same steps done again.
        self.rows = [row for row in read_metrics(run) if row["step"] <= first_step]
        self.progress = Progress(job.stage, job.total_steps, "steps", done=first_step)
        self.late = LateWrites(run)
        facts = {**job.identity, "asked": job.asked}
        self.trackers = [
            open_tracker(kind, run, job.key, job.stage, facts, self.late.write) for kind in job.scale.track
        ]
        self.lines = b""
        """What metrics.jsonl holds of the rows, or soon will."""
        self.told = 0
        """Rows that are in it."""
        self.seconds = self.waited = 0.0
        self.samples = 0
        self.shown = Pace()
        self.has_begun = False
        self.written = time.monotonic()
        # In the background: the first batches are being waited for meanwhile.
        load = functools.partial(validation_batches, data, job.validation_places)
        self.validation = ThreadPoolExecutor(1).submit(lambda: list(load()))

    def add(self, report: StepReport, seen: np.ndarray | None, saves: bool, validates: bool = True) -> None:
        """Account for one step, save if asked.

        Args:
            report: What the step did.
            seen: For a metric row: the place and the digest of each row of the global batch, int64 [N, 2].
            saves: Whether to save a checkpoint.
            validates: Whether to validate before that; what is saved for the case of an accident need not be.
        """
        self.seconds += report.seconds
        self.waited += report.wait_seconds
        self.samples += self.data.order.batch_size
        if not self.has_begun:
            self.has_begun = True
            # The wait for the first batch would spoil the rate.
            self.progress.begin()
        else:
            self.shown.add(report, self.data.order.batch_size)
        # Only a line that is printed waits for the device.
        self.progress.advance(1, lambda: describe_terms(report.terms) + self.shown.describe())
        if seen is not None:
            self.rows.append(self._row(report, seen))
        if saves:
            self._save(report, validates)
        elif seen is not None and time.monotonic() - self.written > METRICS_SECONDS:
            self._write_metrics()

    def __enter__(self) -> Recorder:
        """For the length of the training."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error store the rows since the last checkpoint, which say what led to it."""
        if kind is None:
            return
        try:
            self._write_metrics()
            self.late.wait()
        except (MmkdError, OSError) as error:
            logger.warning("%s: the last metric rows are lost: %s", self.job.stage, error)

    def _row(self, report: StepReport, seen: np.ndarray) -> dict[str, Any]:
        row = {
            "step": report.step,
            "epoch": report.epoch,
            **report.terms,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "skipped": report.skipped,
            "samples_per_s": self.samples / max(self.seconds, 1e-9),
            "data_wait": self.waited / max(self.seconds, 1e-9),
            # Which samples, in order, and what of them the student and its teachers saw: two runs can be compared.
            "batch": fingerprint(seen[:, 0].tolist()),
            "content": fingerprint(seen[:, 1].tolist()),
            "at": time.time(),
        }
        self.seconds, self.waited, self.samples = 0.0, 0.0, 0
        return row

    def _save(self, report: StepReport, validates: bool) -> None:
        row = self.rows[-1]
        if validates and len(self.job.validation_places):
            row["validation"] = validation_loss(
                self.validation.result(), self.parts.student, float(self.parts.objective.scale().detach())
            )
        tensors = {
            MODEL: self.parts.student.tensors(float(self.parts.objective.scale.log.detach())),
            OBJECTIVE: {name: value.detach().cpu() for name, value in self.parts.objective.state_dict().items()},
            OPTIMIZER: optimizer_tensors(self.parts.optimizer),
        }
        state = {
            "step": report.step,
            "total_steps": self.job.total_steps,
            "epoch": report.epoch,
            "step_in_epoch": report.step % self.data.order.steps_per_epoch,
            "stage": self.job.stage,
            "identity": self.job.identity,
            "asked": self.job.asked,
            "first_weights": self.job.first_weights,
            "extended": list(self.job.extended),
            "metrics": row,
            # Order, crops, caption draws and dropout are functions of these, so there is no generator to save.
            "randomness": {"seed": self.data.order.seed, "keys": "purpose, epoch or step, sample or position"},
            "created_at": now(),
        }
        # The checkpoint comes last of the three: after a kill between them its step is done, and noted, once more.
        self._write_metrics()
        self.late.wait()
        if "validation" in row:
            record_best(self.run, report.step, row["validation"])
        save_checkpoint(self.run, report.step, tensors, state, self.data.architecture)
        prune(self.run, self.job.scale.keep_checkpoints)

    def _write_metrics(self) -> None:
        # All workers would wait with this one for the storage. Only the version before must be there: where the storage
        # is slower than the training, they would gather.
        self.late.wait()
        self.lines += "".join(json.dumps(row) + "\n" for row in self.rows[self.told :]).encode()
        self.told = len(self.rows)
        self.late.write(METRICS, self.lines)
        for tracker in self.trackers:
            tracker.log(self.rows)
        self.written = time.monotonic()

    def finish(self) -> None:
        """Write the metrics and, last, the result: its presence means the run is done."""
        self.progress.say()
        for tracker in self.trackers:
            tracker.close()
        self.late.wait()
        best = best_checkpoint(self.run)
        if best is None:
            lacks = "validation loss that is a number" if len(self.job.validation_places) else "validation rows"
            logger.info("%s: no %s, so the newest checkpoint counts as the best", self.job.stage, lacks)
        last = step_name(self.job.total_steps)
        self.run.write_json(
            RESULT,
            {
                "checkpoint": f"{FOLDER}/{last if best is None else step_name(best.step)}",
                "last": f"{FOLDER}/{last}",
                "steps": self.job.total_steps,
                "metrics": self.rows[-1],
                "finished_at": now(),
            },
        )


def read_metrics(run: Storage) -> Iterator[dict[str, Any]]:
    """The metric rows of a run, oldest first; none if it has not saved yet."""
    try:
        text = run.read_bytes(METRICS).decode()
    except FileNotFoundError:
        return
    yield from (json.loads(line) for line in text.splitlines())
