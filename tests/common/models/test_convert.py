"""Checkpoints that hold more than tensors become clean safetensors, in a child that runs none of their code."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import ModelError
from common.models.convert import convert_trusted
from common.models.tensors import read_checkpoint

SECRETS = {"AWS_SECRET_ACCESS_KEY": "aws-canary-7d1f", "HF_TOKEN": "hf_canary_93ab"}


class Steals:
    """Pickles to a call whose result holds the secrets of the environment it runs in."""

    def __reduce__(self):
        return eval, ("dict(__import__('os').environ)",)


def foreign_object() -> object:
    """An object of a class in a module that exists only while it is saved."""
    module = types.ModuleType("a_lab_of_theirs")
    made = type("Tracker", (), {"__module__": module.__name__})
    module.Tracker = made
    sys.modules[module.__name__] = module
    tracker = made()
    tracker.best, tracker.weights = 0.5, torch.ones(2)
    return tracker


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def assert_one_paragraph(message: str) -> None:
    assert message.strip()
    assert "\n\n" not in message.strip()
    assert "Traceback" not in message


TIED = torch.arange(6.0).reshape(2, 3)
WEIGHTS = OrderedDict(
    {
        "module.first": TIED,
        "module.again": TIED,
        "module.row": TIED[1],
        "module.turned": TIED.t(),
        "module.every_other": torch.arange(10.0)[::2],
        "module.parameter": torch.nn.Parameter(torch.tensor([1.5, -2.5])),
        "module.half": torch.tensor([0.1, 2.0]).half(),
        "module.bfloat": torch.tensor([0.1, 3.0]).bfloat16(),
        "module.double": torch.tensor([0.1], dtype=torch.float64),
        "module.steps": torch.tensor([2**40, -1]),
        "module.flags": torch.tensor([True, False]),
        "module.bytes": torch.arange(4, dtype=torch.uint8),
        "module.scalar": torch.tensor(4.6052),
        "module.empty": torch.empty(0, 3),
    }
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folder, record and messages of one conversion of everything a training program may save."""
    folder = tmp_path_factory.mktemp("converted")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=np.float64(1e-3))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "epoch": np.int64(7),
        "best": np.float64(0.5),
        "history": np.arange(5.0),
        "args": argparse.Namespace(lr=1e-3, folder=Path("runs")),
        "state_dict": WEIGHTS,
        "optimizer": optimizer.state_dict(),
        "tracker": foreign_object(),
        "secrets": Steals(),
    }
    file = folder / "published.pt"
    torch.save(content, file)
    del sys.modules["a_lab_of_theirs"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        record = convert_trusted(file, folder / "out" / "clean.safetensors")
    return folder, record


def test_the_fixture_is_what_plain_reading_refuses(converted):
    with pytest.raises(ModelError, match="holds more than tensors"):
        read_checkpoint(converted[0] / "published.pt", "mine")


def test_every_tensor_keeps_its_name_type_and_values(converted):
    found = load_file(converted[0] / "out" / "clean.safetensors")
    assert set(found) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value.detach(), atol=0, rtol=0)


def test_the_record_holds_both_hashes_and_what_was_left_out(converted):
    folder, record = converted
    target = folder / "out" / "clean.safetensors"
    assert json.loads((folder / "out" / "clean.safetensors.json").read_text()) == record
    assert record["source"] == "published.pt"
    assert record["source_sha256"] == sha256(folder / "published.pt")
    assert record["sha256"] == sha256(target)
    assert record["bytes"] == target.stat().st_size
    assert record["tensors"] == len(WEIGHTS)
    dropped = record["dropped"]
    assert dropped["argparse.Namespace"] == dropped["a_lab_of_theirs.Tracker"] == 1
    assert not any("torch._utils" in name or "OrderedDict" in name for name in dropped)


def test_nothing_else_is_left_behind(converted):
    assert sorted(path.name for path in (converted[0] / "out").iterdir()) == [
        "clean.safetensors",
        "clean.safetensors.json",
    ]


def test_secrets_of_the_environment_are_written_nowhere(converted, tmp_path):
    folder, record = converted
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 3
    for canary in SECRETS.values():
        assert not [path for path in files if canary.encode() in path.read_bytes()]
        assert canary not in json.dumps(record)
    # The payload is a real one.
    torch.save(Steals(), tmp_path / "secrets.pt")
    assert "PATH" in torch.load(tmp_path / "secrets.pt", weights_only=False)


def test_a_bare_tensor_gets_the_one_name(tmp_path):
    projection = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    torch.save(projection, tmp_path / "projection.pth", _use_new_zipfile_serialization=False)
    record = convert_trusted(tmp_path / "projection.pth", tmp_path / "projection.safetensors")
    found = load_file(tmp_path / "projection.safetensors")
    assert list(found) == ["tensor"]
    torch.testing.assert_close(found["tensor"], projection.detach(), atol=0, rtol=0)
    assert (record["tensors"], record["dropped"]) == (1, {})


def test_a_file_without_tensors_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    torch.save({"args": argparse.Namespace(lr=0.1), "env": Steals()}, tmp_path / "empty.pt")
    with pytest.raises(ModelError, match=r"empty\.pt holds no named tensors \(it holds a dict\)") as caught:
        convert_trusted(tmp_path / "empty.pt", tmp_path / "out" / "clean.safetensors")
    assert not any(canary in str(caught.value) for canary in SECRETS.values())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"There is no checkpoint file at .*none\.pt"):
        convert_trusted(tmp_path / "none.pt", tmp_path / "clean.safetensors")
    assert list(tmp_path.iterdir()) == []


def mmkd(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **SECRETS}
    command = [sys.executable, "-m", "cluster.cli", "teachers", "convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_without_trust_the_command_only_explains(tmp_path):
    torch.save({"state_dict": WEIGHTS, "secrets": Steals()}, tmp_path / "theirs.pt")
    done = mmkd(str(tmp_path / "theirs.pt"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("mmkd: ")
    assert_one_paragraph(done.stderr)
    said = " ".join(done.stderr.split())
    assert "may run code that its maker put there" in said
    assert "--trust" in said
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pt"]


def test_with_trust_the_command_writes_the_same_bytes_beside_the_file(tmp_path, converted):
    folder, record = converted
    file = tmp_path / "theirs.pt"
    file.write_bytes((folder / "published.pt").read_bytes())
    done = mmkd("--trust", str(file))
    assert done.returncode == 0, done.stderr
    target = tmp_path / "theirs.safetensors"
    assert sha256(target) == record["sha256"]
    assert json.loads(target.with_name("theirs.safetensors.json").read_text())["source_sha256"] == sha256(file)
    assert f"{target}: {len(WEIGHTS)} tensors, sha256 {record['sha256']}" in done.stdout
    assert "1 x argparse.Namespace" in done.stdout
    assert not any(canary in done.stdout + done.stderr for canary in SECRETS.values())
