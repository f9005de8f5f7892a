"""Runs of lakes that are moved and renamed, and runs that are given more epochs."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import FingerprintError, TrainError
from common.storage import Storage
from trainer.config import DataConfig, ModelConfig, OptimConfig, ScaleConfig, Stage1Config, Stage2Config
from trainer.optim import learning_rate

pytestmark = pytest.mark.ray

HELPERS = Path(__file__).resolve().parents[1] / "trainer" / "conftest.py"
SHARED = {
    "optim": OptimConfig(lr=1e-3, warmup_steps=2),
    "data": DataConfig(batch_size=16, lanes=4, tasks=1),
    "scale": ScaleConfig(log_every=1, checkpoint_every=3, keep_checkpoints=9, track=()),
}


def helpers():
    """The small lake's writers live with the trainer's unit tests; tests are not packages, so they come by path."""
    spec = importlib.util.spec_from_file_location("small_lakes", HELPERS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def stage1(lake: Path, epochs: int = 1) -> Stage1Config:
    return Stage1Config(model=ModelConfig(architecture=str(lake / "student")), epochs=epochs, **SHARED)


def stage2(epochs: int = 1) -> Stage2Config:
    return Stage2Config(epochs=epochs, **SHARED)


@pytest.fixture(scope="module")
def origin(tmp_path_factory, ray_local) -> Iterator[Path]:
    """A lake that holds its student's architecture, as the demo's does, and both stages, of an epoch each."""
    from trainer.stage1 import train_stage1
    from trainer.stage2 import train_stage2

    root = tmp_path_factory.mktemp("origin")
    os.environ["MMKD_CACHE"] = str(root / "cache")
    lake = root / "lake"
    helpers().write_lake(str(lake))
    helpers().write_student(lake / "student")
    train_stage1(str(lake), "first", stage1(lake))
    train_stage2(str(lake), "second", str(lake / "runs/first"), stage2())
    yield lake
    del os.environ["MMKD_CACHE"]


@pytest.fixture
def lake(origin, tmp_path) -> Path:
    """The lake under another name, all its files' times new: what ``cp -r`` and deleting the first one leave."""
    return Path(shutil.copytree(origin, tmp_path / "renamed", copy_function=shutil.copy))


def rows_of(lake: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (lake / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def read(lake: Path, name: str) -> dict:
    return json.loads((lake / name).read_text())


def cut_off(lake: Path, run: str, step: int) -> None:
    """What a kill after the checkpoint of a step leaves."""
    folder = lake / "runs" / run
    (folder / "result.json").unlink()
    for checkpoint in folder.glob("checkpoints/step-*"):
        if int(checkpoint.name[-8:]) > step:
            (checkpoint / "checkpoint.json").unlink()


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("**/*") if path.is_file()}


def test_in_a_moved_lake_finished_runs_are_finished(origin, lake):
    from trainer.stage1 import train_stage1
    from trainer.stage2 import train_stage2

    def refuse():
        raise AssertionError("what is finished needs no cluster")

    before = files_below(lake / "runs")
    first = train_stage1(str(lake), "first", stage1(lake), session=refuse)
    second = train_stage2(str(lake), "second", first.checkpoint, stage2(), session=refuse)
    assert files_below(lake / "runs") == before
    assert first.checkpoint.startswith(str(lake))
    assert second.metrics == rows_of(origin, "second")[-1]
    assert read(lake, "runs/first/run.json")["asked"] == {"architecture": "student"}
    assert read(lake, "runs/second/run.json")["asked"]["init"].startswith("runs/first/checkpoints/step-")


def test_in_a_moved_lake_a_run_goes_on_and_stage_2_starts_from_it(origin, lake):
    from trainer.stage1 import train_stage1
    from trainer.stage2 import train_stage2

    cut_off(lake, "first", step=3)
    train_stage1(str(lake), "first", stage1(lake))
    # The lost steps are the same ones again, and nothing before them was done anew.
    before, after = rows_of(origin, "first"), rows_of(lake, "first")
    assert after[:3] == before[:3]
    assert [row["content"] for row in after] == [row["content"] for row in before]
    assert [row["total"] for row in after] == pytest.approx([row["total"] for row in before], rel=1e-5)
    shutil.rmtree(lake / "runs/second")
    train_stage2(str(lake), "second", str(lake / "runs/first"), stage2())
    assert len(rows_of(lake, "second")) == len(rows_of(origin, "second"))


def test_another_student_in_the_same_place_is_refused(lake):
    from trainer.stage1 import train_stage1

    helpers().write_student(lake / "student", width=48)
    with pytest.raises(FingerprintError, match=r"Differing: student: recorded '\w+', now '\w+'\. Choose another"):
        train_stage1(str(lake), "first", stage1(lake))


def test_more_epochs_have_to_be_asked_for(lake):
    from trainer.stage1 import train_stage1

    before = files_below(lake / "runs")
    with pytest.raises(FingerprintError, match=r"config\.epochs: recorded 1, now 2\. To train on .* give --extend"):
        train_stage1(str(lake), "first", stage1(lake, epochs=2))
    with pytest.raises(TrainError, match=r"no run typing-error to extend .* Correct --run"):
        train_stage1(str(lake), "typing-error", stage1(lake, epochs=2), extend=True)
    assert files_below(lake / "runs") == before


def test_only_epochs_may_differ_and_only_grow(lake):
    from trainer.stage1 import train_stage1
    from trainer.stage2 import train_stage2

    longer = stage1(lake, epochs=2).model_copy(update={"init_temperature": 0.1})
    before = files_below(lake / "runs")
    with pytest.raises(FingerprintError, match=r"init_temperature.* --extend allows more epochs, and nothing else"):
        train_stage1(str(lake), "first", longer, extend=True)
    run = read(lake, "runs/second/run.json")
    run["fingerprint"]["config"]["epochs"] = 2
    Storage(str(lake)).write_json("runs/second/run.json", run)
    with pytest.raises(FingerprintError, match=r"config\.epochs: recorded 2, now 1\. --extend allows more epochs"):
        train_stage2(str(lake), "second", str(lake / "runs/first"), stage2(), extend=True)
    assert files_below(lake / "runs/first") == {path: at for path, at in before.items() if "first" in path.parts}


def test_a_finished_run_is_extended_and_an_extension_that_was_cut_off_goes_on(origin, lake):
    from trainer.stage1 import train_stage1

    short = rows_of(lake, "first")
    steps, config = len(short), stage1(lake, epochs=2)
    result = train_stage1(str(lake), "first", config, extend=True)
    rows = rows_of(lake, "first")
    assert rows[:steps] == short
    assert result.steps == len(rows) == read(lake, "runs/first/result.json")["steps"] == 2 * steps
    assert result.last.endswith(f"step-{2 * steps:08d}")
    # From the step of the extension on, the rate is that of the longer schedule.
    expected = [learning_rate(step, steps, config.optim) for step in range(steps)]
    expected += [learning_rate(step, 2 * steps, config.optim) for step in range(steps, 2 * steps)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    assert [row["epoch"] for row in rows] == [0] * steps + [1] * steps
    run = read(lake, "runs/first/run.json")
    assert run["id"] == read(origin, "runs/first/run.json")["id"]
    (entry,) = run["extended"]
    assert (entry["from_epochs"], entry["to_epochs"], entry["after_step"]) == (1, 2, steps)

    cut_off(lake, "first", step=steps + 1)
    train_stage1(str(lake), "first", config)  # it is a run of two epochs now
    again = rows_of(lake, "first")
    assert [row["content"] for row in again] == [row["content"] for row in rows]
    assert [row["total"] for row in again] == pytest.approx([row["total"] for row in rows], rel=1e-5)
    assert read(lake, "runs/first/run.json") == run
    checkpoint = read(lake, f"runs/first/checkpoints/step-{2 * steps:08d}/state.json")
    assert checkpoint["extended"] == run["extended"]


def test_a_run_that_was_cut_off_is_extended_where_it_is(lake):
    from trainer.stage2 import train_stage2

    steps = len(rows_of(lake, "second"))
    cut_off(lake, "second", step=3)
    result = train_stage2(str(lake), "second", str(lake / "runs/first"), stage2(epochs=2), extend=True)
    assert result.steps == 2 * steps
    rows, optim = rows_of(lake, "second"), SHARED["optim"]
    assert [row["lr"] for row in rows[3:]] == pytest.approx(
        [learning_rate(step, 2 * steps, optim) for step in range(3, 2 * steps)]
    )
    assert read(lake, "runs/second/run.json")["extended"][0]["after_step"] == 3


def test_an_extension_killed_before_it_was_recorded_leaves_the_short_run(lake):
    from trainer.stage1 import train_stage1

    before = rows_of(lake, "first")
    (lake / "runs/first/result.json").unlink()  # the first thing that an extension does
    result = train_stage1(str(lake), "first", stage1(lake))
    assert result.metrics == before[-1]
    assert rows_of(lake, "first") == before
