"""Where a model's files lie: a local folder, an fsspec address (copied to a cache once), or the hub at a revision."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common.config import fingerprint
from common.errors import ModelError
from common.models.spec import ModelSpec
from common.storage import Storage

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def cache_folder() -> Path:
    """Where copies of remote model folders are kept; ``MMKD_CACHE`` moves it."""
    return Path(os.environ.get("MMKD_CACHE", Path.home() / ".cache" / "mmkd")) / "models"


def local_copy(spec: ModelSpec) -> Path:
    """The model's folder (or checkpoint file) on this machine, fetched first if it is elsewhere.

    Raises:
        ModelError: It is not there, or cannot be fetched.
    """
    if spec.hub_id is not None:
        return _from_hub(spec, spec.hub_id)
    if spec.path is None:
        raise ModelError(f"Model {spec.name!r} has no folder: it is the built-in {spec.architecture}.")
    storage = Storage(spec.path)
    if not storage.exists():
        raise ModelError(
            f"Model {spec.name!r}: nothing at {spec.path}. Check the path in the command line or in the catalog YAML."
        )
    return Path(storage.path()) if storage.is_local else _from_address(storage)


def _from_address(storage: Storage) -> Path:
    # Keyed by what the store says of each file (ETag, time of change), so that replaced files are fetched again:
    # new weights of the same architecture have the same size.
    storage.fs.invalidate_cache(storage.path())
    marks = [[name, str(storage.fs.ukey(storage.path(name)))] for name in storage.list_files()]
    target = cache_folder() / fingerprint([storage.uri, marks])
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent))
        for name in storage.list_files():
            (partial / name).write_bytes(storage.read_bytes(name))
        try:
            partial.rename(target)
        except OSError:  # another worker on this machine was first; its copy is as good
            shutil.rmtree(partial)
    return target


def _from_hub(spec: ModelSpec, hub_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors", "open_clip*.bin", "pytorch_model.bin"]
        folder = huggingface_hub.snapshot_download(hub_id, revision=spec.revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at revision {spec.revision}" if spec.revision else ""
        raise ModelError(
            f"Model {spec.name!r}: {hub_id}{at} could not be fetched from the model hub "
            f"({type(error).__name__}). Check the network and the name; a gated repository also needs HF_TOKEN in the "
            "environment. With no network, put the files in a folder and use NAME=FOLDER."
        ) from error
    return Path(folder)


def family_of_folder(path: str) -> str:
    """Which family a model folder belongs to, from the configuration file it holds.

    Raises:
        ModelError: There is no such folder, or it holds neither kind of configuration.
    """
    storage = Storage(path)
    names = storage.list_files()
    if "open_clip_config.json" in names:
        return "open_clip"
    if "config.json" in names:
        return "hf_clip"
    raise ModelError(
        f"{path} is not a model folder: expected open_clip_config.json or config.json in it, found "
        f"{', '.join(names[:8]) or 'no files'}. Give an exported student, an open_clip folder or a transformers folder."
    )


def read_model_json(folder: Path, name: str, model: str) -> dict[str, Any]:
    """Read one of a model's JSON files.

    Raises:
        ModelError: It is missing or not JSON.
    """
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"Model {model!r}: {folder} holds no {name}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"Model {model!r}: {folder / name} is not valid JSON ({error}).") from error


def find_weights(folder: Path, preferred: tuple[str, ...], model: str) -> Path:
    """The checkpoint file of a folder: the first preferred name that is there, else the only candidate.

    Raises:
        ModelError: There is none, or there are several and none is preferred.
    """
    for name in preferred:
        if (folder / name).is_file():
            return folder / name
    found = [path for path in sorted(folder.iterdir()) if path.suffix in CHECKPOINT_SUFFIXES]
    if len(found) != 1:
        listing = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"Model {model!r}: expected one checkpoint in {folder}, found {listing}. Keep one of them.")
    return found[0]


def file_sha256(path: Path) -> str:
    """Sha256 of a file, remembered per path, size and modification time."""
    stat = path.stat()
    return _hash_file(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hash_file(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tokenizer_sha256(folder: Path, extra: Any = None) -> str:
    """One hash over a folder's tokenizer files and any settings that change the token ids."""
    hashes = {name: file_sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    return fingerprint([hashes, extra])
