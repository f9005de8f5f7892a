"""The student's architecture as files: open_clip's configuration and the tokenizer, to travel with every checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import fingerprint
from common.errors import ModelError, TrainError
from common.models.architectures import read_architecture as packaged_architecture
from common.models.files import TOKENIZER_FILES, cache_folder, hub_snapshot
from common.models.open_clip import load_tokenizer as open_clip_tokenizer
from common.models.spec import OPENAI_MEAN, OPENAI_STD, Geometry, ModelSpec
from common.models.tokenizing import loadable_folder
from common.storage import Storage

CONFIG_FILE = "open_clip_config.json"


@dataclass(frozen=True)
class Architecture:
    """What is needed, beside the weights, to rebuild a student anywhere."""

    config: dict[str, Any]
    """Content of ``open_clip_config.json``: ``model_cfg`` and ``preprocess_cfg``."""
    tokenizer_files: dict[str, bytes]
    """Name -> content; empty for open_clip's own byte-pair tokenizer."""

    @property
    def identity(self) -> dict[str, Any]:
        """The architecture as JSON-able values, for fingerprints."""
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.tokenizer_files.items())}
        return {"config": self.config, "tokenizer": hashes}

    @property
    def geometry(self) -> Geometry:
        """How pictures are prepared for this student."""
        preprocess = self.config["preprocess_cfg"]
        size = self.config["model_cfg"]["vision_cfg"]["image_size"]
        return Geometry(
            size=size if isinstance(size, int) else size[0],
            resize=preprocess["resize_mode"],
            interpolation=preprocess["interpolation"],
        )

    def files(self) -> dict[str, bytes]:
        """All files by name, as they lie in a model folder."""
        config = (json.dumps(self.config, indent=2) + "\n").encode()
        return {CONFIG_FILE: config, **self.tokenizer_files}

    def local_folder(self) -> Path:
        """A folder on this machine that holds these files (and nothing else), made on first use."""
        target = cache_folder().parent / "students" / fingerprint(self.identity)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=target.parent))
            for name, data in self.files().items():
                (partial / name).write_bytes(data)
            try:
                os.rename(partial, target)
            except OSError:  # another process on this machine was first, with the same content
                shutil.rmtree(partial)
        return target


def read_architecture(folder: Storage) -> Architecture:
    """Read a model folder's ``open_clip_config.json`` and tokenizer files.

    Raises:
        TrainError: There is no usable configuration.
    """
    try:
        config = folder.read_json(CONFIG_FILE)
    except FileNotFoundError as error:
        raise TrainError(
            f"{folder.uri} holds no {CONFIG_FILE}. Give an open_clip architecture name, or a model folder."
        ) from error
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config.get("model_cfg", {})):
        raise TrainError(f"{folder.uri}/{CONFIG_FILE} has no model_cfg with embed_dim, vision_cfg and text_cfg.")
    names = set(folder.list_files()) & set(TOKENIZER_FILES)
    found = Architecture(_complete(config), {name: folder.read_bytes(name) for name in sorted(names)})
    if found.config["model_cfg"]["text_cfg"].get("hf_tokenizer_name") and not names:
        raise TrainError(f"{folder.uri} names an HF tokenizer but holds none of its files (such as tokenizer.json).")
    return found


def resolve_architecture(name: str, tokenizer: str | None = None) -> Architecture:
    """Turn an architecture's name (open_clip's or a packaged one), or the address of a model folder, into files.

    Args:
        name: What the configuration says.
        tokenizer: Folder with the tokenizer's files, for an architecture that does not bring its own.

    Raises:
        TrainError: No such architecture, or its tokenizer cannot be kept in a folder.
    """
    if not name.endswith(".json") and ("/" in name or Path(name).is_dir()):
        return read_architecture(Storage(name))
    import open_clip

    try:
        config = packaged_architecture(name, "student")
    except ModelError as error:
        raise TrainError(str(error)) from error
    if config is not None and "model_cfg" in config:
        named = config["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
        return Architecture(_complete(config), _tokenizer_files(name, tokenizer, named))
    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        raise TrainError(
            f"{name!r} is neither an open_clip architecture nor a folder with {CONFIG_FILE}. "
            f"Architectures include mmkd-b16, ViT-B-32, ViT-B-16, RN50 (all: `python -c 'import open_clip; "
            "print(open_clip.list_models())'`)."
        )
    return Architecture(_complete({"model_cfg": model_cfg}), _builtin_tokenizer(name))


def _tokenizer_files(name: str, folder: str | None, repository: str | None) -> dict[str, bytes]:
    """A packaged architecture's tokenizer: from a folder, else from the hub's repository (or its local cache)."""
    if repository is None:
        return {}
    if folder is not None:
        storage = Storage(folder)
        found = {file: storage.read_bytes(file) for file in TOKENIZER_FILES if storage.is_file(file)}
        if not found:
            raise TrainError(f"model.tokenizer={folder!r} holds no tokenizer files (vocab.txt or tokenizer.json).")
        return _loadable(found)
    try:
        here = hub_snapshot(repository, [*TOKENIZER_FILES, "config.json"])
    except ModelError as error:
        raise TrainError(
            f"The tokenizer of {name} is that of {repository}, which cannot be fetched: {error} Or name a folder with "
            "its files (vocab.txt or tokenizer.json) as model.tokenizer."
        ) from error
    return _loadable({file: (here / file).read_bytes() for file in TOKENIZER_FILES if (here / file).is_file()})


def _loadable(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same tokenizer in files that stock open_clip can load from a model folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        made = loadable_folder(folder)
        return {name: (made / name).read_bytes() for name in TOKENIZER_FILES if (made / name).is_file()}


def _builtin_tokenizer(name: str) -> dict[str, bytes]:
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    try:
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainError(
            f"The tokenizer of {name} cannot be fetched ({type(error).__name__}). Check the network, or put "
            f"{CONFIG_FILE} and the tokenizer's files in a folder and give that folder as model.architecture."
        ) from error
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return {}
    if not isinstance(tokenizer, HFTokenizer):
        raise TrainError(f"{name} uses {type(tokenizer).__name__}, which a model folder cannot hold. Choose another.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """State the preprocessing explicitly, so that no reader depends on a library's defaults."""
    given = config.get("preprocess_cfg", {})
    preprocess = {
        "mean": list(given.get("mean") or OPENAI_MEAN),
        "std": list(given.get("std") or OPENAI_STD),
        "interpolation": given.get("interpolation") or "bicubic",
        "resize_mode": given.get("resize_mode") or "shortest",
    }
    return {"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess}


def load_tokenizer(architecture: Architecture) -> Callable[[list[str]], np.ndarray]:
    """The student's tokenizer: captions -> int32 token ids [B, context length], padded and cut as open_clip does.

    As teachers' tokenizers it imports no torch, of which a process that decodes would have no other use.
    """
    return open_clip_tokenizer(ModelSpec(name="student", path=str(architecture.local_folder())))
