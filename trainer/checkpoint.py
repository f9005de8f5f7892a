"""Checkpoints: safetensors and JSON in one folder per step, whole or not at all, on any storage.

``<run>/checkpoints/step-00000500/`` holds the model, the objective and the optimizer as safetensors, ``state.json``,
the architecture's files and, written last, ``checkpoint.json`` with the size and sha256 of each. A folder without a
manifest that holds is torn and is ignored. Each folder is also an open_clip model folder: stock open_clip loads it.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import MmkdError, TrainError
from common.logs import logger
from common.storage import Storage, absolute_address
from trainer.architecture import Architecture, read_architecture

if TYPE_CHECKING:
    import torch

MANIFEST = "checkpoint.json"
STATE = "state.json"
MODEL = "model.safetensors"
OBJECTIVE = "objective.safetensors"
OPTIMIZER = "optimizer.safetensors"
BEST = "best.json"
FOLDER = "checkpoints"
_STEP_NAME = re.compile(r"^step-(\d{8})$")


def step_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimiser steps."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint folder. Construct with :func:`load_checkpoint` or :func:`newest_checkpoint`."""

    folder: Storage
    manifest: dict[str, Any]

    @property
    def uri(self) -> str:
        """Address of the folder."""
        return self.folder.uri

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.manifest["step"])

    def read(self, name: str) -> bytes:
        """One file's content, checked against the manifest.

        Raises:
            TrainError: It is missing or was changed after it was written.
        """
        try:
            data = self.folder.read_bytes(name)
            expected = self.manifest["files"][name]["sha256"]
        except (FileNotFoundError, KeyError) as error:
            raise TrainError(f"The checkpoint {self.uri} lacks {name}.") from error
        if hashlib.sha256(data).hexdigest() != expected:
            raise TrainError(f"{self.uri}/{name} is not what was written (sha256 differs). Use another checkpoint.")
        return data

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one safetensors file."""
        from safetensors.torch import load

        return load(self.read(name))

    def state(self) -> dict[str, Any]:
        """Step, epoch, configuration, fingerprints and metrics at the time of writing."""
        self.read(STATE)
        return dict(self.folder.read_json(STATE))

    def architecture(self) -> Architecture:
        """What the model is built from."""
        return read_architecture(self.folder)


def save_checkpoint(
    run: Storage,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    architecture: Architecture,
) -> Checkpoint:
    """Write a checkpoint; it exists once the manifest does.

    Args:
        run: The run's folder.
        step: Optimiser steps done.
        tensors: File name -> tensors, one entry each for MODEL, OBJECTIVE and OPTIMIZER.
        state: JSON-able facts beside them.
        architecture: Of the student.
    """
    from safetensors.torch import save

    folder = run.child(f"{FOLDER}/{step_name(step)}")
    folder.remove(MANIFEST)  # of an earlier attempt at the same step: it must not vouch for the new files
    files = {name: save(values, metadata={"format": "pt"}) for name, values in tensors.items()}
    files.update(architecture.files())
    listing = {name: _write(folder, name, data) for name, data in files.items()}
    folder.write_json(STATE, state)
    listing[STATE] = _entry(folder.read_bytes(STATE))
    manifest = {"step": step, "files": listing}
    folder.write_json(MANIFEST, manifest)
    return Checkpoint(folder, manifest)


def _write(folder: Storage, name: str, data: bytes) -> dict[str, Any]:
    folder.write_bytes(name, data)
    return _entry(data)


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def checkpoint_steps(run: Storage) -> list[int]:
    """Steps of all checkpoint folders of a run, whole or torn, ascending."""
    matches = (_STEP_NAME.match(name) for name in run.list_folders(FOLDER))
    return sorted(int(match.group(1)) for match in matches if match)


def open_step(run: Storage, step: int) -> Checkpoint | None:
    """The checkpoint of a step, or None if it is torn: every file is read and compared with the manifest."""
    return _open(run.child(f"{FOLDER}/{step_name(step)}"))


def _open(folder: Storage) -> Checkpoint | None:
    try:
        manifest = folder.read_json(MANIFEST)
        found = Checkpoint(folder, manifest)
        for name in manifest["files"]:
            found.read(name)
    except (FileNotFoundError, KeyError, TypeError, MmkdError) as error:
        logger.debug("%s is not a whole checkpoint: %s", folder.uri, error)
        return None
    return found


def newest_checkpoint(run: Storage) -> Checkpoint | None:
    """The newest whole checkpoint of a run; torn ones are passed over."""
    for step in reversed(checkpoint_steps(run)):
        found = open_step(run, step)
        if found is not None:
            return found
        logger.info("checkpoint %s of %s is torn and is ignored", step_name(step), run.uri)
    return None


def best_checkpoint(run: Storage) -> Checkpoint | None:
    """The checkpoint with the least validation loss; None without validation or if it is not whole."""
    try:
        return open_step(run, int(run.read_json(BEST)["step"]))
    except FileNotFoundError:
        return None


def record_best(run: Storage, step: int, value: float) -> bool:
    """Note a checkpoint's validation loss; returns whether it is the run's least so far, which NaN never is."""
    if not math.isfinite(value):
        return False
    try:
        least = run.read_json(BEST)
    except FileNotFoundError:
        least = None
    if least is not None and least["validation"] <= value and least["step"] != step:
        return False
    run.write_json(BEST, {"step": step, "validation": value})
    return True


def prune(run: Storage, keep: int) -> None:
    """Delete all but the ``keep`` newest whole checkpoints and the best one; torn folders go too."""
    steps = checkpoint_steps(run)
    whole = [step for step in steps if run.exists(f"{FOLDER}/{step_name(step)}/{MANIFEST}")]
    try:
        best = int(run.read_json(BEST)["step"])
    except FileNotFoundError:
        best = -1
    for step in steps:
        if step != best and step not in whole[-keep:]:
            run.remove(f"{FOLDER}/{step_name(step)}/{MANIFEST}")  # first, so that half a deletion is a torn folder
            run.remove(f"{FOLDER}/{step_name(step)}")


def load_checkpoint(uri: str) -> Checkpoint:
    """Open a checkpoint: a step's folder, or a run's folder for its best (or, without validation, newest) one.

    Raises:
        TrainError: There is none, or it is torn.
    """
    folder = Storage(absolute_address(uri.rstrip("/")))
    if folder.exists(MANIFEST):
        found = _open(folder)
        if found is None:
            raise TrainError(f"The checkpoint at {uri} is torn: a file is missing or differs from {MANIFEST}.")
        return found
    found = best_checkpoint(folder) or newest_checkpoint(folder)
    if found is None:
        raise TrainError(
            f"There is no checkpoint at {uri}. Give a run's folder (LAKE/runs/NAME) or one of its "
            f"{FOLDER}/step-... folders; `mmkd train stage1 LAKE` makes one."
        )
    return found
