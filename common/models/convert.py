"""Checkpoints that hold more than tensors, turned once into clean safetensors, in a child process.

Training programs save NumPy scalars, argparse namespaces and optimizers beside the weights, which
``weights_only=True`` refuses. The child reads such a file with an unpickler that knows torch's and NumPy's plain
builders and stands an inert stub in for everything else, so even a trusted file runs no code of its own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.errors import ModelError

SINGLE = "tensor"
"""Name of the only tensor of a file that holds one bare tensor, such as PMC-CLIP's projection."""
MAX_SECONDS = 3600
# Builders of plain data. Nothing here opens files, imports or calls anything it is given.
ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
}
# What the child may see of this machine: nothing that opens a door.
_BARE = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR")


def convert_trusted(source: Path, target: Path) -> dict[str, Any]:
    """Write the tensors of a checkpoint as safetensors, with a JSON file beside it that records both hashes.

    Args:
        source: A file whose maker the user trusts.
        target: The safetensors file; ``<target>.json`` holds the record.

    Returns:
        The record: ``source``, ``source_sha256``, ``sha256``, ``tensors``, ``dropped`` (class name -> count).

    Raises:
        ModelError: There is no such file, or it holds no tensors.
    """
    from common.models.files import file_sha256

    if not source.is_file():
        raise ModelError(f"There is no checkpoint file at {source}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    environment = {"PYTHONPATH": root, **{name: os.environ[name] for name in _BARE if name in os.environ}}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-convert-") as folder:
        partial = Path(folder) / "model.safetensors"
        command = [sys.executable, "-m", "common.models.convert", str(source.absolute()), str(partial.absolute())]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, cwd=folder, timeout=MAX_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"{source} was not converted within {MAX_SECONDS} s; the child was stopped.") from error
        if done.returncode or not partial.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ModelError(f"{source} could not be converted: {last.removeprefix('common.errors.ModelError: ')}.")
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        os.replace(partial, target)
    record = {
        "source": source.name,
        "source_sha256": file_sha256(source),
        "sha256": file_sha256(target),
        "bytes": target.stat().st_size,
        **facts,
    }
    target.with_name(f"{target.name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def save_tensors(tensors: Mapping[str, Any], target: Path) -> None:
    """Write named tensors as safetensors; tensors that share memory get memory of their own.

    The file gets the mode that any other new file gets. safetensors from 0.8 on writes a private temporary file and
    renames it, and nobody but its owner could read a model in a shared folder.
    """
    import torch
    from safetensors.torch import save_file

    plain = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    assert all(isinstance(value, torch.Tensor) for value in plain.values())
    with open(target, "ab") as stream:  # the umask cannot be asked without changing it for the whole process
        mode = os.fstat(stream.fileno()).st_mode & 0o7777
    save_file(plain, str(target), metadata={"format": "pt"})
    target.chmod(mode)


def named_tensors(content: Any, where: str) -> dict[str, Any]:
    """The tensors of what was read: a state dict, wrapped or not, or one bare tensor under the name ``tensor``.

    Raises:
        ModelError: There are none.
    """
    import torch

    from common.models.tensors import WRAPPERS

    if isinstance(content, torch.Tensor):
        return {SINGLE: content}
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
        found = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if found:
            return found
    raise ModelError(f"{where} holds no named tensors (it holds a {type(content).__name__}).")


class Inert:
    """Stands for any object that is not plain data: takes whatever it is given and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:  # noqa: D102 - see the class
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As a list has it."""

    def extend(self, values: Any) -> None:
        """As a list has it."""


class PlainUnpickler(pickle.Unpickler):
    """Builds tensors, arrays and containers; everything else becomes :class:`Inert`, and is counted."""

    met: Counter[str] = Counter()

    def find_class(self, module: str, name: str) -> Any:
        """The builder for a global of the file, or a stub."""
        # Storage types are classes of torch without behaviour, such as FloatStorage.
        if (module, name) in ALLOWED or (module in ("torch", "torch.storage") and name.endswith("Storage")):
            return super().find_class(module, name)
        if module in ("torch", "torch.serialization") and name.islower() and "." not in name and _is_dtype(name):
            return super().find_class("torch", name)
        if (module, name) == ("_codecs", "encode"):  # how older pickles write bytes
            return _latin_bytes
        self.met[f"{module}.{name}"] += 1
        return type(name.rsplit(".", 1)[-1], (Inert,), {})


def _latin_bytes(text: str, encoding: str = "latin1") -> bytes:
    """Bytes from the text that stands for them; no other codec is looked up."""
    return text.encode("latin1")


def _is_dtype(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)


def _convert(source: str, target: str) -> None:
    """The child's whole work; prints its facts as one line of JSON."""
    import torch

    # torch asks the module it unpickles with for its name too.
    plain = SimpleNamespace(
        Unpickler=PlainUnpickler, load=lambda stream, **_: PlainUnpickler(stream).load(), __name__="plain"
    )
    # torch.load would hand a TorchScript archive to the interpreter of its own programs.
    if zipfile.is_zipfile(source) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(source).namelist()):
        raise ModelError(
            "it is a TorchScript program, whose tensors cannot be had without running it. Where you trust it, load it "
            "with torch.jit.load, save its state_dict() with torch.save, and use that file"
        )
    stream = io.BytesIO(Path(source).read_bytes())
    content = torch.load(stream, map_location="cpu", pickle_module=plain, weights_only=False)
    tensors = named_tensors(content, source)
    save_tensors(tensors, Path(target))
    print(json.dumps({"tensors": len(tensors), "dropped": dict(PlainUnpickler.met)}))


if __name__ == "__main__":
    _convert(sys.argv[1], sys.argv[2])
