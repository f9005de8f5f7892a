"""From a training checkpoint to a folder that stock open_clip loads, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa

from common.config import fingerprint
from common.errors import ConfigError
from common.lake import Lake, now
from common.models.files import file_sha256
from common.models.load import load_model
from common.models.spec import ModelSpec
from common.storage import Storage
from common.version import VERSION
from trainer.checkpoint import MODEL, Checkpoint, load_checkpoint
from trainer.model_card import write_model_card

EXPORT_MANIFEST = "mmkd_export.json"
"""Marks a folder as written by export, and lists what export wrote there."""
WEIGHTS = "open_clip_model.safetensors"


def export_checkpoint(
    checkpoint_uri: str,
    out: str,
    *,
    lake: Lake | None = None,
    scores: pa.Table | None = None,
    name: str | None = None,
    force: bool = False,
) -> str:
    """Write a model folder: weights, configuration, tokenizer files, README.md and a manifest.

    Args:
        checkpoint_uri: A checkpoint's folder, or a run's (its best checkpoint is taken, else its newest).
        out: The folder to write, local or any fsspec address; a previous export there is replaced.
        lake: Where the card's facts on data and teachers come from; None looks for the one the checkpoint lies in.
        scores: Shown in the card; None takes those of these very weights from the lake, if there are any.
        name: The model's name in the card; None takes the folder's.
        force: Write into a folder that holds something else.

    Returns:
        The address of the folder.

    Raises:
        ConfigError: The folder holds something that is not an export.
        ModelError: The weights do not fit the architecture.
        TrainError: There is no whole checkpoint.
    """
    target = Storage(out.rstrip("/"))
    checkpoint = load_checkpoint(checkpoint_uri)
    stale = _stale_files(target, force)
    name = name or target.path().rsplit("/", 1)[-1]
    with tempfile.TemporaryDirectory(prefix="mmkd-export-") as temporary:
        folder = Path(temporary)
        write_model_files(checkpoint, folder)
        load_model(ModelSpec(name="export", family="open_clip", path=temporary))  # raises if stock open_clip would
        sha256 = file_sha256(folder / WEIGHTS)
        write_model_card(folder, name, checkpoint, sha256, lake or lake_of(checkpoint.uri), scores)
        names = sorted(path.name for path in folder.iterdir())
        for file in stale:
            target.remove(file)
        for file in names:
            target.write_bytes(file, (folder / file).read_bytes())
    _write_manifest(target, checkpoint, sha256, names)
    return target.uri


def _write_manifest(target: Storage, checkpoint: Checkpoint, weights_sha256: str, names: list[str]) -> None:
    target.write_json(
        EXPORT_MANIFEST,
        {
            "exported_by": f"mmkd {VERSION}",
            "created_at": now(),
            "checkpoint": checkpoint.uri,
            "checkpoint_fingerprint": fingerprint(checkpoint.manifest),
            "weights_sha256": weights_sha256,
            "files": [*names, EXPORT_MANIFEST],
        },
    )


def _stale_files(target: Storage, force: bool) -> list[str]:
    """What an earlier export wrote there: a tokenizer, say, that the new one lacks would change how it loads."""
    names = [*target.list_files(), *target.list_folders()]
    if EXPORT_MANIFEST in names:
        return [name for name in target.read_json(EXPORT_MANIFEST)["files"] if name in names]
    if names and not force:
        raise ConfigError(
            f"{target.uri} holds {len(names)} entries ({', '.join(names[:5])}) and is no earlier export. "
            "Choose an empty or new folder, or add --force to write into it all the same."
        )
    return []


def lake_of(checkpoint_uri: str) -> Lake | None:
    """The lake a checkpoint lies in, as ``<lake>/runs/<run>/checkpoints/<step>``; None if it lies elsewhere."""
    uri, mark, _ = checkpoint_uri.rstrip("/").rpartition("/runs/")
    return Lake(uri) if mark and Storage(uri).exists("lake.json") else None


def write_model_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Lay a checkpoint out as an open_clip model folder; equal checkpoints give equal bytes.

    A checkpoint's model already holds the learned logit scale, so its weights file is taken as it is.

    Raises:
        TrainError: A file of the checkpoint is missing or was changed.
    """
    (folder / WEIGHTS).write_bytes(checkpoint.read(MODEL))
    for name, data in checkpoint.architecture().files().items():
        (folder / name).write_bytes(data)
