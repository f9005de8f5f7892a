import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from common.lake import Lake
from extractor.config import ExtractConfig
from extractor.importing import Imported
from extractor.partitions import describe_inputs, find_teachers, identity_of, record_teacher
from extractor.tending.redo import redo_commands

BOTH = {"image_dim": 16, "text_dim": 16}


@pytest.fixture
def lake(make_lake, tmp_path) -> Lake:
    return make_lake(tmp_path / "my lake", rows=4, shard_rows=4)


@pytest.fixture
def record(lake):
    """Write a partition's manifest."""

    def record(teacher: str, identity: dict = BOTH, spec: dict | None = None, **facts: str) -> str:
        spec = {"name": teacher} if spec is None else spec
        manifest = {"fingerprint": identity, "spec": spec, **facts}
        lake.storage.write_json(f"manifests/teachers/{teacher}.json", manifest)
        return teacher

    return record


def settings_of(command: str) -> ExtractConfig:
    """What a command's settings are, as the command itself resolves them."""
    answer = CliRunner().invoke(app, [*shlex.split(command)[1:], "--print-config"])
    assert answer.exit_code == 0, answer.output
    return ExtractConfig.model_validate(yaml.safe_load(answer.stdout))


def test_it_names_places_recipes_and_versions(lake, record):
    teachers = [
        record("pmc-clip.notebook"),
        record("plip", spec={"name": "plip", "hub_id": "vinid/plip"}),
        record("plip.second", spec={"name": "plip", "hub_id": "vinid/plip"}),
        record("mine", spec={"name": "mine", "path": "/my models/mine"}),
    ]
    assert redo_commands(lake.uri, teachers) == [
        f"mmkd extract '{lake.uri}' --teachers 'pmc-clip@notebook,plip,mine=/my models/mine'",
        f"mmkd extract '{lake.uri}' --teachers plip --teacher-version second",
    ]


def test_it_says_how_a_partition_was_extracted(lake, record):
    views, rounded = {"count": 4, "least_area": 0.25, "seed": 0}, {"stored_precision": "bfloat16"}
    teachers = [
        record("plip"),
        record("quilt-b32", {"image_dim": 16, "text_dim": None, "views": views, "decode": "fast", **rounded}),
        record("pubmedclip", {"image_dim": None, "text_dim": 16}),
    ]
    found = [settings_of(command) for command in redo_commands(lake.uri, teachers)]
    assert [(one.teachers, one.towers, one.decode) for one in found] == [
        (("plip",), "both", "exact"),
        (("quilt-b32",), "image", "fast"),
        (("pubmedclip",), "text", "exact"),
    ]
    assert [one.stored_precision for one in found] == ["float16", "bfloat16", "float16"]
    assert [one.views.model_dump() for one in found] == [
        ExtractConfig().views.model_dump(),
        views,
        found[0].views.model_dump(),
    ]


def test_a_catalog_of_the_users_is_named_even_after_it_was_moved(lake, record, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"own": {"path": "/models/own", "recipes": {"wide": {"context_length": 64}}}}))
    spec = {"name": "own.wide", "path": "/models/own"}
    teacher = record("own.wide", spec=spec, catalog=str(mine))
    assert redo_commands(lake.uri, [teacher]) == [f"mmkd extract '{lake.uri}' --teachers own@wide --catalog {mine}"]
    mine.unlink()
    (command,) = redo_commands(lake.uri, [teacher])
    assert command == f"mmkd extract '{lake.uri}' --teachers own.wide=/models/own --catalog {mine}"


def test_what_was_imported_is_imported_again(lake, record):
    teachers = [
        record(one.partition, one.identity, {})
        for one in (Imported("PLIP", 512), Imported("BiomedCLIP", 512), Imported("PLIP", 512, "projected"))
    ]
    coarser = record("quiltnet.imported", Imported("QuiltNet", 512, precision="bfloat16").identity, {})
    assert redo_commands(lake.uri, teachers) == [
        f"mmkd import mmkd-features DIR '{lake.uri}'",
        f"mmkd import mmkd-features DIR '{lake.uri}' --projected",
    ]
    assert redo_commands(lake.uri, [coarser]) == [
        f"mmkd import mmkd-features DIR '{lake.uri}' --stored-precision bfloat16"
    ]


def test_after_a_move_it_names_what_lies_in_the_lake_where_it_lies_now(lake, make_clip_folder, tmp_path):
    model = shutil.copytree(make_clip_folder("own"), Path(lake.uri, "teachers/own"))
    outside = make_clip_folder("other", seed=1)
    catalog = Path(lake.uri, "teachers.yaml")
    catalog.write_text(yaml.safe_dump({"own": {"path": "teachers/own"}, "other": {"path": str(outside)}}))
    config = ExtractConfig(teachers=("own", "other"), catalog=str(catalog))
    inputs = describe_inputs(find_teachers(config), config)
    for teacher in inputs.values():
        record_teacher(lake, teacher, identity_of(teacher, config), 1.0, None, config.catalog)
    moved = Lake(shutil.move(lake.uri, tmp_path / "moved").as_posix())
    assert lake.uri not in json.dumps([moved.read_teacher(name) for name in inputs])
    (Path(moved.uri, "teachers.yaml")).unlink()  # so that the manifests alone say where things are
    (command,) = redo_commands(moved.uri, inputs)
    places = f"own={moved.uri}/teachers/own,other={outside}"
    assert command == f"mmkd extract {moved.uri} --teachers {places} --catalog {moved.uri}/teachers.yaml"
    assert not model.exists()
