"""Metric rows for the tools people watch trainings with; ``metrics.jsonl`` stays the record.

Rows are given whenever the run saves, all of them up to that step. A run that goes on from a checkpoint does the steps
behind it again; TensorBoard's file is then written anew, the others keep what they were given last for a step.
"""

from __future__ import annotations

import importlib.util
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

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


def open_tracker(
    kind: str,
    run: Storage,
    key: str,
    stage: str,
    identity: dict[str, Any],
    write: Callable[[str, bytes], None] | None = None,
) -> Tracker:
    """A tracker of a run.

    Args:
        kind: ``tensorboard``, ``mlflow`` or ``wandb``.
        run: The run's folder, whose name is the run's.
        key: By which a tool that keeps what it was given knows the run again, wherever its folder lies by then.
        stage: For people.
        identity: What the run is; becomes its parameters.
        write: Stores a file in the run's folder; by default at once.
    """
    name = run.uri.rstrip("/").rsplit("/", 1)[-1]
    if kind == "tensorboard":
        return TensorBoard(write or run.write_bytes)
    return (MLflow if kind == "mlflow" else WeightsAndBiases)(name, key, stage, identity)


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row that make a curve."""
    return {name: float(value) for name, value in row.items() if name not in UNTRACKED and value is not None}


class _Continued:
    """A tool that keeps what it was given: only rows behind the last one are new to it."""

    def __init__(self) -> None:
        self.last_step = 0

    def new(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that this process has not given yet."""
        found = [row for row in rows if row["step"] > self.last_step]
        self.last_step = max((row["step"] for row in found), default=self.last_step)
        return found


class TensorBoard(_Continued):
    """An event file in the run's folder, wherever that is; TensorBoard itself is needed only to look at it.

    Args:
        write: Stores a file, by its name in the run's folder.
    """

    def __init__(self, write: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._write = write
        self._records = b""

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the file with the new rows behind those that it has; only they cost time."""
        more = _as_records(self.new(rows))
        self._records += more[_first_length(more) :] if self._records else more
        self._write(EVENTS, self._records)

    def close(self) -> None:
        """Nothing is open."""


def _as_records(rows: Sequence[dict[str, Any]]) -> bytes:
    """Rows as an event file has them, behind the record that begins every such file."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for row in rows:
                for name, value in scalars(row).items():
                    writer.add_scalar(name, value, row["step"], row.get("at"))
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


def _first_length(records: bytes) -> int:
    """Bytes of the first record: its length, a checksum, the event, a checksum."""
    return 8 + 4 + int(struct.unpack_from("<Q", records)[0]) + 4


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
    """A run of the project ``mmkd`` (or of WANDB_PROJECT) whose id is the run's own."""

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
