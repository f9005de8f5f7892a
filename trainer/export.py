"""From a training checkpoint to a folder that stock open_clip loads, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.config import fingerprint
from common.errors import ConfigError, ModelError, TrainError
from common.lake import Lake, now
from common.models.files import TOKENIZER_FILES, file_sha256
from common.models.load import load_model
from common.models.spec import ModelSpec
from common.storage import Storage
from common.version import VERSION
from trainer.model_card import write_model_card

EXPORT_MANIFEST = "mmkd_export.json"
"""Marks a folder as written by export, and lists what export wrote there."""
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
LEARNED_SCALARS = ("logit_scale", "logit_bias")


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
        checkpoint_uri: A checkpoint's folder, or a run's (its newest checkpoint is taken).
        out: The folder to write, local or any fsspec address; a previous export there is replaced.
        lake: Where the card's facts on data and teachers come from; None looks for the one the checkpoint lies in.
        scores: Shown in the card; None takes those of these very weights from the lake, if there are any.
        name: The model's name in the card; None takes the folder's.
        force: Write into a folder that holds something else.

    Returns:
        The address of the folder.

    Raises:
        ConfigError: The folder holds something that is not an export.
        ModelError: There is no whole checkpoint, or its weights do not fit its architecture.
        TrainError: The run has no checkpoint yet.
    """
    target = Storage(out.rstrip("/"))
    _make_room(target, force)
    checkpoint_uri = find_checkpoint(checkpoint_uri)
    name = name or target.path().rsplit("/", 1)[-1]
    with tempfile.TemporaryDirectory(prefix="mmkd-export-") as temporary:
        folder = Path(temporary)
        manifest = write_model_files(checkpoint_uri, folder)
        load_model(ModelSpec(name="export", family="open_clip", path=temporary))  # raises if stock open_clip would
        sha256 = file_sha256(folder / WEIGHTS)
        lake = lake or lake_of(checkpoint_uri)
        write_model_card(folder, name, checkpoint_uri, manifest, sha256, lake, scores)
        names = sorted(path.name for path in folder.iterdir())
        for file in names:
            target.write_bytes(file, (folder / file).read_bytes())
    target.write_json(
        EXPORT_MANIFEST,
        {
            "exported_by": f"mmkd {VERSION}",
            "created_at": now(),
            "checkpoint": checkpoint_uri,
            "checkpoint_fingerprint": fingerprint(manifest),
            "weights_sha256": sha256,
            "files": [*names, EXPORT_MANIFEST],
        },
    )
    return target.uri


def _make_room(target: Storage, force: bool) -> None:
    names = [*target.list_files(), *target.list_folders()]
    if EXPORT_MANIFEST in names:
        # Files of an older export that the new one does not write, such as a tokenizer, would change how it loads.
        for name in target.read_json(EXPORT_MANIFEST)["files"]:
            if "/" not in name:
                target.remove(name)
    elif names and not force:
        raise ConfigError(
            f"{target.uri} holds {len(names)} entries ({', '.join(names[:5])}) and is no earlier export. "
            "Choose an empty or new folder, or add --force to write into it all the same."
        )


def find_checkpoint(uri: str) -> str:
    """The checkpoint folder meant by the address of a checkpoint or of a run.

    Raises:
        ModelError: Neither lies there.
        TrainError: The run has no checkpoint yet.
    """
    storage = Storage(uri.rstrip("/"))
    if storage.exists("checkpoint.json"):
        return storage.uri
    if storage.exists("checkpoints"):
        return newest_checkpoint(storage.uri)
    found = ", ".join([*storage.list_files(), *storage.list_folders()][:8]) or "nothing"
    raise ModelError(
        f"{uri} is neither a checkpoint (a folder with checkpoint.json) nor a run (a folder with checkpoints/); it "
        f"holds {found}. Give LAKE/runs/RUN, or one of the folders in its checkpoints/."
    )


def newest_checkpoint(run_uri: str) -> str:
    """The newest whole checkpoint of a run.

    Raises:
        TrainError: There is none yet.
    """
    storage = Storage(f"{run_uri.rstrip('/')}/checkpoints")
    # checkpoint.json is written last, so a folder without it is torn or still being written.
    whole = [name for name in storage.list_folders() if storage.exists(f"{name}/checkpoint.json")]
    if not whole:
        raise TrainError(f"The run {run_uri} has no whole checkpoint yet; let it train further, then try again.")
    return storage.child(max(whole)).uri


def lake_of(checkpoint_uri: str) -> Lake | None:
    """The lake a checkpoint lies in, as ``<lake>/runs/<run>/checkpoints/<step>``; None if it lies elsewhere."""
    uri, mark, _ = checkpoint_uri.rstrip("/").rpartition("/runs/")
    return Lake(uri) if mark and Storage(uri).exists("lake.json") else None


def write_model_files(checkpoint_uri: str, folder: Path) -> dict[str, Any]:
    """Lay a checkpoint out as an open_clip model folder; equal checkpoints give equal bytes.

    The scalars learned by the objective go into the model's tensors of the same name.

    Returns:
        The content of the checkpoint's manifest.

    Raises:
        ModelError: A file of the checkpoint is missing or not what it should be.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, save_file

    source = Storage(checkpoint_uri)
    try:
        manifest = dict(source.read_json("checkpoint.json"))
        tensors = load(source.read_bytes("model.safetensors"))
        learned = load(source.read_bytes("objective.safetensors"))
        (folder / CONFIG).write_bytes(source.read_bytes(CONFIG))
    except FileNotFoundError as error:
        raise ModelError(
            f"{checkpoint_uri} is not a whole checkpoint: {error.filename or error} is missing. "
            "Take another one of the run's checkpoints."
        ) from error
    except SafetensorError as error:
        raise ModelError(f"{checkpoint_uri} holds a torn weights file ({error}); take an older checkpoint.") from error
    for scalar in LEARNED_SCALARS:
        if scalar in learned and scalar in tensors:
            tensors[scalar] = learned[scalar].reshape(tensors[scalar].shape).to(tensors[scalar].dtype)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS)
    present = source.list_files()
    for file in TOKENIZER_FILES:
        if file in present:
            (folder / file).write_bytes(source.read_bytes(file))
    return manifest
