"""From a training checkpoint to a folder that stock open_clip loads, with a model card."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.config import fingerprint
from common.errors import ConfigError
from common.lake import Lake, now
from common.models.convert import save_tensors
from common.models.files import TOKENIZER_FILES, file_sha256, tokenizer_folder
from common.models.load import load_model
from common.models.open_clip import find_files
from common.models.spec import ModelSpec
from common.models.tokenizing import loadable_folder
from common.storage import Storage, address_within
from common.version import VERSION
from trainer.checkpoint import MODEL, Checkpoint, load_checkpoint
from trainer.model_card import published_card, write_model_card

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


def export_model(spec: ModelSpec, out: str, *, force: bool = False) -> str:
    """Write a published model (UniMed-CLIP, MMKD-CLIP, any of the open_clip family) as a stock open_clip folder.

    Args:
        spec: The entry, with its files in reach.
        out: The folder to write, local or any fsspec address.
        force: Write into a folder that holds something else.

    Returns:
        The address of the folder.

    Raises:
        ConfigError: The folder holds something that is not an export, or the model is not open_clip's kind.
        ModelError: The weights do not fit.
    """
    if spec.family not in ("open_clip", "unimed"):
        raise ConfigError(
            f"{spec.name} is of the {spec.family} family, which stock open_clip cannot hold; only the open_clip and "
            "unimed families can be exported."
        )
    target = Storage(out.rstrip("/"))
    stale = _stale_files(target, force)
    with tempfile.TemporaryDirectory(prefix="mmkd-export-") as temporary:
        folder = Path(temporary)
        write_published_files(spec, folder)
        sha256 = file_sha256(folder / WEIGHTS)
        (folder / "README.md").write_text(published_card(spec, sha256), encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
        for file in stale:
            target.remove(file)
        for file in names:
            target.upload(folder / file, file)
    facts = {"published_model": spec.name, "weights_sha256": sha256, "files": [*names, EXPORT_MANIFEST]}
    target.write_json(EXPORT_MANIFEST, {"exported_by": f"mmkd {VERSION}", "created_at": now(), **facts})
    return target.uri


def write_published_files(spec: ModelSpec, folder: Path) -> None:
    """Weights by stock open_clip's names, configuration with the preprocessing spelt out, and the tokenizer's files."""
    encoder: Any = load_model(spec)
    description, found = encoder.description, find_files(spec, weights=False)
    save_tensors(encoder.model.state_dict(), folder / WEIGHTS)
    preprocess = {
        "mean": list(description.mean),
        "std": list(description.std),
        "interpolation": description.geometry.interpolation,
        "resize_mode": description.geometry.resize,
    }
    config = {"model_cfg": found.model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    named = found.text_cfg.get("hf_tokenizer_name")
    if named is not None and found.files is not None:
        tokenizer = loadable_folder(tokenizer_folder(spec, found.files, named))
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                (folder / name).write_bytes((tokenizer / name).read_bytes())


def _write_manifest(target: Storage, checkpoint: Checkpoint, weights_sha256: str, names: list[str]) -> None:
    target.write_json(
        EXPORT_MANIFEST,
        {
            "exported_by": f"mmkd {VERSION}",
            "created_at": now(),
            "checkpoint": _written_in(target, checkpoint.uri),
            "checkpoint_fingerprint": fingerprint(checkpoint.manifest),
            "weights_sha256": weights_sha256,
            "files": [*names, EXPORT_MANIFEST],
        },
    )


def _written_in(target: Storage, checkpoint_uri: str) -> str:
    """A checkpoint's address as an export names it: relative to the lake if both lie in it, for lakes are moved."""
    lake = lake_of(checkpoint_uri)
    is_inside = lake is not None and address_within(target.uri, lake.uri) != target.uri
    return address_within(checkpoint_uri, lake.uri) if lake is not None and is_inside else checkpoint_uri


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
