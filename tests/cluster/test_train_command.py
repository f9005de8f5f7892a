"""What `mmkd train` says before Ray starts: a missing --init, recipes where none were found, the other stage's."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.commands import train_recipes, training
from common.errors import ConfigError, MmkdError
from common.lake import create_lake, shard_name
from common.schemas import PAIRS

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def lake(tmp_path, monkeypatch):
    """A lake without rows; whoever starts Ray fails."""

    def refuse():
        raise AssertionError("Ray was started")

    monkeypatch.setattr(training, "ray_session", refuse)
    made = create_lake(str(tmp_path / "lake"), 8)
    made.storage.write_table(f"pairs/{shard_name(0)}", PAIRS.empty_table())
    return made


def mistake(*arguments: str) -> str:
    """The error of a command."""
    found = CliRunner().invoke(training.train_app, arguments).exception
    assert isinstance(found, ConfigError), found
    return str(found)


def test_a_missing_init_is_told_before_ray_starts(lake):
    said = mistake("stage2", lake.uri)
    assert "--init does not say which" in said
    assert f"run `mmkd train stage1 {lake.uri}` first" in said


def test_a_missing_init_comes_with_the_runs_that_would_do(lake):
    for run, stage in (("first", "stage1"), ("second", "stage2")):
        lake.storage.write_json(f"runs/{run}/run.json", {"fingerprint": {"stage": stage}})
    lake.storage.write_json("runs/extract-1/report.json", {})
    assert mistake("stage2", lake.uri).endswith(f"This lake has: --init {lake.uri}/runs/first.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stage2", "--init", "somewhere"], "There is no checkpoint at somewhere"),
        (["stage1", "--set", "model.architecture=ViT-B-99"], "'ViT-B-99' is neither an open_clip architecture"),
        (["stage1", "--set", "data.lanes=4", "--set", "scale.workers=3"], "not a multiple of 3 workers"),
        (["stage1", "--set", "data.batch_size=64"], "has 20 samples to train on, fewer than one batch of 64"),
        (["stage1", "--extend", "--set", "data.batch_size=8"], "There is no run stage1 to extend"),
    ],
)
def test_other_mistakes_are_told_before_ray_starts(lake, make_lake, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    full = make_lake(tmp_path / "full", rows=25, shard_rows=8)
    stage, *rest = arguments
    found = CliRunner().invoke(training.train_app, [stage, full.uri, *rest]).exception
    assert isinstance(found, MmkdError), found
    assert words in str(found)
    assert not full.storage.list_folders("runs"), "nothing is recorded of a run that did not begin"


def test_without_a_mistake_ray_starts(make_lake, tmp_path, monkeypatch):
    class BegunError(Exception):
        pass

    def begin():
        raise BegunError

    monkeypatch.setattr(training, "ray_session", begin)
    full = make_lake(tmp_path / "full", rows=25, shard_rows=8)
    result = CliRunner().invoke(training.train_app, ["stage1", full.uri, "--set", "data.batch_size=8"])
    assert isinstance(result.exception, BegunError)


def test_a_recipe_in_place_of_a_stage_is_answered_with_every_recipe(monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    said = mistake("paper", "LAKE")
    assert "`mmkd train paper` is no command: train takes stage1 or stage2" in said
    for file in RECIPES.glob("*.yaml"):
        assert f"recipes/{file.name}" in said


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_recipe_by_its_bare_name_is_answered_with_the_stages_own(stage, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = mistake(stage, "LAKE", "--config", "paper")
    assert "No configuration file at paper." in said
    assert {file for file in RECIPES.glob("*.yaml") if str(file) in said} == set(RECIPES.glob(f"*-{stage}.yaml"))


def test_without_a_checkout_it_says_where_recipes_are(monkeypatch, tmp_path):
    monkeypatch.setattr(train_recipes, "FOLDER", tmp_path)
    assert "in the folder recipes/ of mmkd's repository" in mistake("stage1", "LAKE", "--config", "paper")


@pytest.mark.parametrize(
    ("stage", "other", "file", "settings"),
    [
        ("stage2", "stage1", "paper-stage1.yaml", "model, loss"),
        ("stage1", "stage2", "default-stage2.yaml", "distill"),
    ],
)
def test_a_recipe_of_the_other_stage_is_recognised(stage, other, file, settings):
    said = mistake(stage, "LAKE", "--config", str(RECIPES / file))
    assert f"{file} is a recipe for {other} (it sets {settings}) and was given to {stage}" in said


def test_a_file_with_settings_of_both_stages_is_told_what_is_unknown(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text("distill: {heads: 1}\nloss: clip\n")
    assert "loss is not a setting" in mistake("stage2", "LAKE", "--config", str(file))


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_of_its_own_stage_is_read(file):
    result = CliRunner().invoke(training.train_app, [file.stem[-6:], "LAKE", "--config", str(file), "--print-config"])
    assert result.exit_code == 0, result.exception
    assert "epochs: 20" in result.stdout
