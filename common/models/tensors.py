"""Checkpoint files as plain tensors: read without executing anything, unwrapped, and fitted to a module strictly."""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ModelError, UntrustedError
from common.models.files import INDEX, check_readable, checkpoint_files, read_model_json

if TYPE_CHECKING:  # families are imported for their tokenizers alone, too
    import torch

Tensors = dict[str, "torch.Tensor"]
WRAPPERS = ("state_dict", "model_state_dict")
"""Keys under which training programs put the weights, beside the epoch, the optimizer and the rest."""
LISTED = 5
"""How many tensor names an error shows of each kind."""


def read_checkpoint(path: Path, model: str) -> Any:
    """What a checkpoint file holds, read with ``weights_only=True`` (or as safetensors): tensors and plain containers.

    Raises:
        ModelError: The file cannot be read, is torn or is not a checkpoint.
        UntrustedError: It holds Python objects that would have to be executed.
    """
    if os.path.lexists(path):
        check_readable(path, model)
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors" or is_safetensors(path):
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces TorchScript archives before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        *(SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError),
        *(ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error, AssertionError),
    ) as error:
        raise explain_unreadable(path, model, error) from error


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever it is called: some repositories call them ``.bin``."""
    with path.open("rb") as stream:
        head = stream.read(9)
    # Eight bytes with the length of the header, then the header, which is JSON.
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def explain_unreadable(path: Path, model: str, error: Exception) -> ModelError:
    """What is wrong with a checkpoint file, from what a library raised when it read it."""
    foreign = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", str(error))
    if "TorchScript" in str(error):
        return UntrustedError(
            f"Model {model!r}: {path} holds more than tensors (a TorchScript program), and reading that would run it. "
            "If you trust whoever made it, load it with torch.jit.load, save its state_dict() with torch.save, and use "
            "that file."
        )
    if foreign:
        what = foreign.group(1)
        return UntrustedError(
            f"Model {model!r}: {path} holds more than tensors ({what}), and reading that would run code from the file. "
            f"If you trust whoever made it, convert it once with `mmkd teachers convert --trust {path}` and use the "
            "safetensors file that this writes."
        )
    size = path.stat().st_size if path.exists() else 0
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return ModelError(
        f"Model {model!r}: {path} ({size} bytes) is not a whole checkpoint ({reason}). It may be a torn download, or a "
        "web page saved in its place: fetch it again."
    )


def read_tensors(path: Path, model: str) -> Tensors:
    """The weights of a checkpoint file: out of their wrapper, without ``module.``, and nothing else.

    Args:
        path: The file, or the index of a checkpoint in several files.
        model: Name for messages.

    Raises:
        ModelError: As :func:`read_checkpoint`, or there are no named tensors in it, or a part is missing.
    """
    if not path.name.endswith(INDEX):
        return unwrap(read_checkpoint(path, model), f"Model {model!r}: {path}")
    parts = {
        part.name: unwrap(read_checkpoint(part, model), f"Model {model!r}: {part}")
        for part in checkpoint_files(path, model)
    }
    places = read_model_json(path.parent, path.name, model)["weight_map"]
    lost = [f"{name} in {part}" for name, part in places.items() if name not in parts[part]]
    if lost:
        raise ModelError(
            f"Model {model!r}: {path} puts {_listed(lost)}, where there is no such tensor. Index and files are not of "
            "one checkpoint; fetch them together."
        )
    return {name: value for tensors in parts.values() for name, value in tensors.items()}


def unwrap(content: Any, where: str) -> Tensors:
    """Named tensors from what a training program saved.

    Raises:
        ModelError: There are none, or something among them is not a tensor.
    """
    import torch

    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{where} holds a {type(content).__name__}; expected named tensors.")
    others = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ModelError(
            f"{where} holds things that are not tensors beside tensors: {', '.join(others[:LISTED])}. Expected a state "
            f"dict, bare or under {' or '.join(WRAPPERS)}."
        )
    tensors = {str(key): value for key, value in content.items()}
    # What DistributedDataParallel puts before every name.
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def without(tensors: Tensors, prefixes: Iterable[str] = (), suffixes: Iterable[str] = ()) -> Tensors:
    """The tensors whose names have none of these beginnings and ends."""
    starts, ends = tuple(prefixes), tuple(suffixes)
    return {name: value for name, value in tensors.items() if not (name.startswith(starts) or name.endswith(ends))}


def renamed(tensors: Tensors, prefix: str, replacement: str = "") -> Tensors:
    """The tensors whose names begin with ``prefix``, which becomes ``replacement``."""
    return {
        replacement + name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
    }


def load_strictly(module: torch.nn.Module, tensors: Tensors, where: str) -> None:
    """Fill a module: every tensor must be there, none may be left over, and all shapes must agree.

    Half-precision tensors are widened to the module's type, as all upstream loaders do.

    Raises:
        ModelError: Names what is missing, left over and of another shape.
    """
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted))
    differing = [
        f"{name} is {list(tensors[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if missing or unexpected or differing:
        raise ModelError(
            f"{where} does not fit its architecture ({len(tensors)} tensors for {len(wanted)}). Missing: "
            f"{_listed(missing)}; unexpected: {_listed(unexpected)}; of another shape: {_listed(differing)}."
        )
    module.load_state_dict(tensors, strict=True)


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest
