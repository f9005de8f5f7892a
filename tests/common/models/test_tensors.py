"""Checkpoint files of all kinds: read as plain tensors, or refused in one clear paragraph and never executed."""

import argparse
import contextlib
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import ModelError
from common.models.convert import convert_trusted
from common.models.tensors import load_strictly, read_checkpoint, read_tensors

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def saved(folder: Path, content, name: str = "weights.pt", **options) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def refusal(file: Path) -> str:
    """What the user reads; it must name the model and the file, in one paragraph."""
    with pytest.raises(ModelError) as caught:
        read_tensors(file, "mine")
    message = str(caught.value)
    assert message.startswith(f"Model 'mine': {file}")
    assert "\n" not in message
    return message


def assert_weights(found: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0)


class Leaves:
    """Pickles to a call that leaves a folder behind: what a hostile checkpoint would hold."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Evaluates(Leaves):
    """The same through Python source."""

    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


# --- What is read.


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict"])
@pytest.mark.parametrize("new_format", [True, False])
def test_weights_come_out_of_their_wrapper(tmp_path, wrapper, prefix, new_format):
    named = OrderedDict((prefix + name, value) for name, value in WEIGHTS.items())
    content = named if wrapper is None else {"epoch": 7, wrapper: named, "optimizer": {"state": {}, "lr": 1e-4}}
    assert_weights(read_tensors(saved(tmp_path, content, _use_new_zipfile_serialization=new_format), "mine"))


def test_safetensors_are_read(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({f"module.{name}": value for name, value in WEIGHTS.items()}, file)
    assert_weights(read_tensors(file, "mine"))


def test_module_is_kept_where_it_is_not_before_every_name(tmp_path):
    mixed = {"module.a": torch.ones(1), "b": torch.zeros(1)}
    assert set(read_tensors(saved(tmp_path, mixed), "mine")) == {"module.a", "b"}


def test_only_the_first_module_is_taken_away(tmp_path):
    assert set(read_tensors(saved(tmp_path, {"module.module.a": torch.ones(1)}), "mine")) == {"module.a"}


# --- What is refused because it is not named tensors.


def test_other_things_beside_tensors_are_named(tmp_path):
    message = refusal(saved(tmp_path, {**WEIGHTS, "epoch": 3, "lr": 0.1}))
    assert "things that are not tensors beside tensors: epoch, lr" in message
    assert "state_dict or model_state_dict" in message


def test_other_things_inside_the_wrapper_are_named(tmp_path):
    assert "not tensors beside tensors: version" in refusal(saved(tmp_path, {"state_dict": {**WEIGHTS, "version": 2}}))


def test_many_other_things_are_not_all_listed(tmp_path):
    message = refusal(saved(tmp_path, {**WEIGHTS, **{f"setting_{i}": i for i in range(100)}}))
    assert "setting_0" in message
    assert "setting_99" not in message


@pytest.mark.parametrize(("content", "kind"), [(torch.ones(2), "Tensor"), ([torch.ones(2)], "list"), (3, "int")])
def test_what_is_not_a_mapping_is_named(tmp_path, content, kind):
    assert f"holds a {kind}; expected named tensors" in refusal(saved(tmp_path, content))


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}])
def test_an_empty_checkpoint_is_refused(tmp_path, content):
    assert "expected named tensors" in refusal(saved(tmp_path, content))


# --- What is refused because it is torn, or no checkpoint at all.


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html><html><title>Quota exceeded</title></html>\n" * 20,
        b"version https://git-lfs\n",
        b"\0" * 64,
    ],
    ids=["empty", "web page", "lfs pointer", "zeros"],
)
def test_no_checkpoint_at_all_is_refused(tmp_path, name, data):
    file = tmp_path / name
    file.write_bytes(data)
    message = refusal(file)
    assert f"({len(data)} bytes) is not a whole checkpoint" in message
    assert "torn download, or a web page saved in its place" in message


@pytest.mark.parametrize("kept", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_torn_file_is_refused(tmp_path, form, kept):
    weights = {"w": torch.arange(4000.0)}
    file = tmp_path / ("torn.safetensors" if form == "safetensors" else "torn.pt")
    if form == "safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=form == "zip")
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    assert f"({int(kept * len(data))} bytes) is not a whole checkpoint" in refusal(file)


def test_a_file_torn_at_any_byte_is_refused(tmp_path):
    whole = saved(tmp_path, {"w": torch.arange(4.0), "v": torch.ones(2)}, _use_new_zipfile_serialization=False)
    data, file = whole.read_bytes(), tmp_path / "torn.pt"
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(ModelError, match=r"^Model 'mine': .*torn\.pt"):
            read_checkpoint(file, "mine")


def test_a_foreign_zip_archive_is_refused(tmp_path):
    file = tmp_path / "weights.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "no checkpoint")
    assert "is not a whole checkpoint" in refusal(file)


def test_a_missing_file_is_refused(tmp_path):
    assert "is not a whole checkpoint" in refusal(tmp_path / "none.pt")


# --- What is refused because reading it would mean running it.


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
        ({"best": np.float64(0.5)}, "numpy._core.multiarray.scalar"),
        ({"history": np.arange(3)}, "numpy._core.multiarray._reconstruct"),
    ],
    ids=["namespace", "numpy scalar", "numpy array"],
)
def test_more_than_tensors_is_refused_with_the_way_out(tmp_path, extra, named, new_format):
    file = saved(tmp_path, {"state_dict": WEIGHTS, **extra}, _use_new_zipfile_serialization=new_format)
    message = refusal(file)
    assert f"holds more than tensors ({named})" in message
    assert f"`mmkd teachers convert --trust {file}`" in message


@pytest.mark.parametrize("payload", [Leaves, Evaluates])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_payload_does_not_run_when_read(tmp_path, payload, new_format):
    marker = tmp_path / "marker"
    content = {"state_dict": WEIGHTS, "extra": payload(marker)}
    file = saved(tmp_path, content, _use_new_zipfile_serialization=new_format)
    assert "holds more than tensors" in refusal(file)
    assert not marker.exists()
    # The file is a real trap: plain torch falls into it.
    torch.load(file, weights_only=False)
    assert marker.exists()


def test_payloads_do_not_run_when_converted(tmp_path):
    markers = [tmp_path / "left", tmp_path / "evaluated"]
    content = {"state_dict": WEIGHTS, "extra": [Leaves(markers[0]), Evaluates(markers[1])]}
    record = convert_trusted(saved(tmp_path, content), tmp_path / "clean.safetensors")
    assert not any(marker.exists() for marker in markers)
    assert record["tensors"] == len(WEIGHTS)
    assert_weights(read_tensors(tmp_path / "clean.safetensors", "mine"))
    assert sum(record["dropped"].values()) == 2
    assert {name.rsplit(".", 1)[-1] for name in record["dropped"]} == {"mkdir", "eval"}


def test_a_bare_pickle_with_a_payload_does_not_run_when_read(tmp_path):
    file, marker = tmp_path / "weights.pt", tmp_path / "marker"
    file.write_bytes(pickle.dumps(Leaves(marker)))
    with pytest.raises(ModelError):
        read_checkpoint(file, "mine")
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()


quiet_torchscript = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.fixture
def script_archive(tmp_path) -> Path:
    """What ``torch.jit.save`` writes; OpenAI published CLIP so."""
    file = tmp_path / "script.pt"
    torch.jit.trace(Plain().eval(), torch.ones(1, 3)).save(str(file))
    return file


@quiet_torchscript
def test_a_torchscript_archive_is_refused_by_name(script_archive):
    assert "holds more than tensors (a TorchScript program)" in refusal(script_archive)


@quiet_torchscript
def test_the_way_out_of_a_torchscript_archive_leads_somewhere(script_archive, tmp_path):
    if "teachers convert" in refusal(script_archive):
        assert convert_trusted(script_archive, tmp_path / "clean.safetensors")["tensors"] == 2


@quiet_torchscript
def test_a_torchscript_archive_does_not_run_when_converted(tmp_path):
    file, marker = tmp_path / "script.pt", tmp_path / "marker"
    _save_script_that_opens(file, marker)
    with contextlib.suppress(ModelError):
        convert_trusted(file, tmp_path / "clean.safetensors")
    assert not marker.exists()
    torch.jit.load(str(file))
    assert marker.exists()


def _save_script_that_opens(file: Path, marker: Path) -> None:
    """A TorchScript module that creates a file of a fixed name when it is unpickled.

    TorchScript compiles source files only and knows no closures, so the name is written into a module's source.
    """
    import importlib.util

    source = file.with_name("opening_script.py")
    source.write_text(
        "import torch\n"
        "class Opens(torch.nn.Module):\n"
        "    w: torch.Tensor\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = torch.ones(3)\n"
        "    def forward(self, x):\n"
        "        return x\n"
        "    @torch.jit.export\n"
        "    def __getstate__(self):\n"
        "        return (self.w, True)\n"
        "    @torch.jit.export\n"
        "    def __setstate__(self, state: tuple[torch.Tensor, bool]):\n"
        f"        self.w = torch.from_file({str(marker)!r}, shared=True, size=4)\n"
        "        self.training = True\n",
        encoding="utf-8",
    )
    found = importlib.util.spec_from_file_location("opening_script", source)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    torch.jit.script(module.Opens()).save(str(file))


# --- How a module is filled.


def linear(out: int = 2) -> torch.nn.Module:
    return torch.nn.ModuleDict({"a": torch.nn.Linear(3, out)})


def test_a_module_is_filled_exactly():
    module = linear()
    load_strictly(module, WEIGHTS, "x")
    assert_weights(module.state_dict())


def test_missing_unexpected_and_reshaped_tensors_are_named():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_strictly(module, {**WEIGHTS, "b.bias": torch.zeros(2), "head.weight": torch.ones(1)}, "Model 'mine': f.pt")
    message = str(caught.value)
    assert message.startswith("Model 'mine': f.pt does not fit its architecture (4 tensors for 4).")
    assert "Missing: b.weight;" in message
    assert "unexpected: head.weight;" in message
    assert "of another shape: a.weight is [2, 3], not [4, 3], a.bias is [2], not [4]." in message
    # Refused as a whole: nothing was filled.
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_many_names_are_counted_not_listed():
    many = {f"extra.{i:02d}": torch.ones(1) for i in range(30)}
    with pytest.raises(ModelError, match=r"Missing: none; unexpected: extra\.00, .* and 25 more; of another shape"):
        load_strictly(linear(), {**WEIGHTS, **many}, "x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    module = linear()
    halves = {name: (value / 3).to(dtype) for name, value in WEIGHTS.items()}
    load_strictly(module, halves, "x")
    for name, value in module.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, halves[name].float(), atol=0, rtol=0)


def test_safetensors_under_another_name_are_read_as_what_they_are(tmp_path):
    """Some loaders read GenMedClip's ``.bin`` with the safetensors library."""
    save_file({"weight": torch.ones(2)}, str(tmp_path / "open_clip_pytorch_model.bin"))
    assert torch.equal(read_tensors(tmp_path / "open_clip_pytorch_model.bin", "mine")["weight"], torch.ones(2))
