"""Training that is told to stop ends in good order: one line, a whole checkpoint, and nothing of it is done twice."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from processes import wait_for

from common.storage import Storage
from trainer.checkpoint import newest_checkpoint

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "trainer" / "conftest.py"
EPOCHS = 60
SETTINGS = {
    "optim": {"lr": 1e-3, "warmup_steps": 5},
    "data": {"batch_size": 16, "lanes": 4, "tasks": 1},
    # No step but the last saves by its number: what there is to go on from is there by time, or because it was stopped.
    "scale": {"log_every": 1, "checkpoint_every": 100_000, "checkpoint_minutes": 0.02, "use_gpu": False},
    "epochs": EPOCHS,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A lake of 96 pairs, and a student."""
    spec = importlib.util.spec_from_file_location("small_lakes", HELPERS)
    helpers = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = helpers
    spec.loader.exec_module(helpers)
    root = tmp_path_factory.mktemp("stop")
    helpers.write_student(root / "student")
    helpers.write_lake(str(root / "lake"))
    return root


def start(place, run, workers) -> subprocess.Popen:
    """``mmkd train stage1``, as a user types it."""
    settings = {**SETTINGS, "model": {"architecture": str(place / "student")}}
    settings["scale"] = {**settings["scale"], "workers": workers}
    config = place / f"{run}-{workers}.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "cluster.cli", "train", "stage1", str(place / "lake")]
    command += ["--run", run, "--config", str(config)]
    # The session of its own keeps a terminal's Ctrl-C from reaching pytest's other children.
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process, seconds=240) -> str:
    said, _ = process.communicate(timeout=seconds)
    return said


def rows_of(place, run) -> list[dict]:
    return [json.loads(line) for line in (place / f"lake/runs/{run}/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(place):
    process = start(place, "whole", 1)
    said = finish(process)
    assert process.returncode == 0, said
    return rows_of(place, "whole")


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_signal_is_one_line_a_checkpoint_and_143(place, undisturbed, number, workers):
    run = f"{number.name}-{workers}"
    folder = place / f"lake/runs/{run}"
    process = start(place, run, workers)
    wait_for(
        lambda: process.poll() is not None or list(folder.glob("checkpoints/*/checkpoint.json")), 120, "a checkpoint"
    )
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said = finish(process, 120)
    assert process.returncode == 143, said
    # Ray names the process before each line of another's: its own helpers complain where several Rays are at work.
    assert not [line for line in said.splitlines() if "Traceback" in line and "pid=" not in line], said
    saved = newest_checkpoint(Storage(str(folder)))
    assert f"Run {run} was stopped by {number.name} after step {saved.step} of {len(undisturbed)}" in " ".join(
        said.split()
    )
    assert said.count("starting a local Ray") == 1
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive, said
    assert 0 < saved.step < len(undisturbed)
    assert not (folder / "stop.json").exists()

    again = start(place, run, 1)
    said = finish(again)
    assert again.returncode == 0, said
    assert f"going on from step {saved.step} of {len(undisturbed)}" in said
    rows = rows_of(place, run)
    assert [row["step"] for row in rows] == list(range(1, len(undisturbed) + 1))
    assert [row["batch"] for row in rows] == [row["batch"] for row in undisturbed]
    if workers == 1:  # two add up in another order, which hundreds of steps make visible
        assert [row["total"] for row in rows] == pytest.approx([row["total"] for row in undisturbed], rel=2e-2)
