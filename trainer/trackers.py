"""Metric rows for the tools people watch trainings with; ``metrics.jsonl`` stays the record.

Rows are given whenever the run saves, all of them up to that step. A run that goes on from a checkpoint does the steps
behind it again; TensorBoard's file is then written anew, the others keep what they were given last for a step.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from common.config import fingerprint
from common.errors import TrainError
from common.storage import Storage

EVENTS = "tensorboard/events.out.tfevents.0000000000.mmkd"
"""One file, written anew each time: its records keep their places, so that a running TensorBoard reads on."""
PROJECT = "mmkd"
UNTRACKED = ("step", "epoch", "batch", "content", "at")


class Tracker(Protocol):
    """Takes metric rows."""

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take all rows so far, oldest first; those that were there before may come again."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


def check_trackers(kinds: Sequence[str]) -> None:
    """Insist that what the trackers need is installed, before anything is trained.

    Raises:
        TrainError: A package is missing.
    """
    missing = [kind for kind in kinds if kind != "tensorboard" and importlib.util.find_spec(kind) is None]
    if missing:
        raise TrainError(
            f"scale.track names {', '.join(missing)}, which is not installed. Install it beside mmkd "
            f"(`pip install {' '.join(missing)}`, on every machine), or leave it out of scale.track."
        )


def open_tracker(kind: str, run: Storage, stage: str, identity: dict[str, Any]) -> Tracker:
    """A tracker of a run.

    Args:
        kind: ``tensorboard``, ``mlflow`` or ``wandb``.
        run: The run's folder, whose address names the run.
        stage: For people.
        identity: What the run is; becomes its parameters.
    """
    name = run.uri.rstrip("/").rsplit("/", 1)[-1]
    if kind == "tensorboard":
        return TensorBoard(run)
    return (MLflow if kind == "mlflow" else WeightsAndBiases)(name, fingerprint(run.uri), stage, identity)


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row that make a curve."""
    return {name: float(value) for name, value in row.items() if name not in UNTRACKED and value is not None}


class TensorBoard:
    """An event file in the run's folder, wherever that is; TensorBoard itself is needed only to look at it."""

    def __init__(self, run: Storage) -> None:
        self.run = run

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the file anew."""
        from tensorboardX import SummaryWriter

        with tempfile.TemporaryDirectory() as folder:
            with SummaryWriter(folder) as writer:
                for row in rows:
                    for name, value in scalars(row).items():
                        writer.add_scalar(name, value, row["step"], row.get("at"))
            (file,) = Path(folder).iterdir()
            self.run.write_bytes(EVENTS, file.read_bytes())

    def close(self) -> None:
        """Nothing is open."""


class _Continued:
    """A tool that keeps what it was given: only rows behind the last one are new to it."""

    def __init__(self) -> None:
        self.last_step = 0

    def new(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that this process has not given yet."""
        found = [row for row in rows if row["step"] > self.last_step]
        self.last_step = max((row["step"] for row in found), default=self.last_step)
        return found


class MLflow(_Continued):
    """A run of the experiment ``mmkd`` (or of MLFLOW_EXPERIMENT_NAME); going on finds it by its tag."""

    def __init__(self, name: str, key: str, stage: str, identity: dict[str, Any]) -> None:
        super().__init__()
        import os

        import mlflow

        self.mlflow: Any = mlflow
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(PROJECT)
        found = mlflow.search_runs(filter_string=f"tags.mmkd_run = '{key}'", output_format="list")
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=name, tags={"mmkd_run": key, "stage": stage})
            mlflow.log_dict(identity, "run.json")

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Give the new rows."""
        for row in self.new(rows):
            self.mlflow.log_metrics(scalars(row), step=row["step"])

    def close(self) -> None:
        """End the run."""
        self.mlflow.end_run()


class WeightsAndBiases(_Continued):
    """A run of the project ``mmkd`` (or of WANDB_PROJECT) whose id follows from its address."""

    def __init__(self, name: str, key: str, stage: str, identity: dict[str, Any]) -> None:
        super().__init__()
        import os

        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.session: Any = wandb.init(project=project, id=key, name=name, group=stage, config=identity, resume="allow")

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Give the new rows."""
        for row in self.new(rows):
            self.session.log(scalars(row), step=row["step"])

    def close(self) -> None:
        """End the run."""
        self.session.finish()
