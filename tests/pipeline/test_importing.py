"""MMKD-CLIP's own published samples: imported, trained on with all teachers, and with the paper's arithmetic."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from common.config import load_config
from common.errors import TermsError, TrainError
from common.lake import open_lake
from extractor.config import IngestConfig
from trainer.config import (
    AlignConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    ScaleConfig,
    Stage1Config,
    Stage2Config,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

ROOT = Path(__file__).resolve().parents[2]
CONFIG = IngestConfig(shard_rows=4, val_fraction=0, test_fraction=0)
DATA = DataConfig(batch_size=4, lanes=2, shuffle_shards=1, tasks=1)
SCALE = ScaleConfig(log_every=1)
NAMES = ("bmca-clip", "biomedclip", "genmedclip", "plip", "pmc-clip", "pubmedclip", "quiltnet-b-32", "unimed-clip")


def consented(version: str) -> tuple[str, ...]:
    """All partitions: which of them need consent is for the catalog to know."""
    return tuple(f"{name}.{version}" for name in NAMES)


@pytest.fixture(scope="module")
def published(shared_data) -> Path:
    return shared_data / "mmkd-demo"


@pytest.fixture(scope="module")
def home(tmp_path_factory, published, ray_local):
    """A lake with the imported features and a student of 512 dimensions that stage 1 has begun to train."""
    from extractor.importing import import_features
    from trainer.stage1 import train_stage1

    root = tmp_path_factory.mktemp("imported")
    helpers = importlib.util.spec_from_file_location("small_lakes", ROOT / "tests" / "trainer" / "conftest.py")
    module = importlib.util.module_from_spec(helpers)
    sys.modules[helpers.name] = module
    helpers.loader.exec_module(module)
    student = module.write_student(root / "student")
    config = json.loads((student / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 512
    (student / "open_clip_config.json").write_text(json.dumps(config))
    report = import_features(str(published), str(root / "lake"), CONFIG, consented("imported"))
    assert report.ingested.pairs == 8
    model = ModelConfig(architecture=str(student))
    stage1 = Stage1Config(model=model, optim=OptimConfig(lr=1e-3, warmup_steps=1), data=DATA, scale=SCALE, epochs=2)
    train_stage1(str(root / "lake"), "stage1", stage1)
    return root


def rows_of(home: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (home / "lake" / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def test_the_vectors_in_the_lake_are_those_of_the_files(home, published):
    import numpy as np
    import torch

    lake = open_lake(str(home / "lake"))
    assert lake.teachers() == sorted(consented("imported"))
    table = lake.storage.read_table("teachers.parquet").to_pylist()
    assert [row["name"] for row in table] == lake.teachers()
    assert {row["image_dim"] for row in table if row["name"] == "quiltnet-b-32.imported"} == {512}
    _, said = lake.storage.read_metadata("features/teacher=quiltnet-b-32.imported/shard-000000.parquet")
    assert (said["mmkd.teacher"], said["mmkd.image_dim"]) == ("quiltnet-b-32.imported", "512")
    assert (said["mmkd.license"], said["mmkd.created_at"]) == tuple(
        lake.read_teacher("quiltnet-b-32.imported")[key] for key in ("license", "created_at")
    )
    assert "mmkd.weights_sha256" not in said, "nobody can tell with which weights they were made"
    listed = {row["id"]: row for row in map(json.loads, (published / "meta.jsonl").read_text().splitlines())}
    seen = 0
    for shard in lake.shards():
        pairs, features = lake.read_pairs(shard), lake.read_features("quiltnet-b-32.imported", shard)
        for pair, row in zip(pairs.to_pylist(), features.to_pylist(), strict=True):
            line = listed[pair["source_key"].rsplit("/", 1)[1]]
            assert pair["captions"] == [line["txt"].strip()]
            assert pair["image"] == (published / line["imgpath"]).read_bytes()
            file = published / "features" / line["folderid"] / line["id"] / "clips_output.pt"
            found = torch.load(file, weights_only=True)
            for side, short in (("image", "img"), ("text", "txt")):
                np.testing.assert_allclose(row[f"{side}_embedding"], found[f"QuiltNet_{short}"], atol=3e-4)
            seen += 1
    assert seen == 8


def test_every_teacher_speaks_in_training_whatever_its_width(home):
    from trainer.alignment.align import align
    from trainer.stage2 import train_stage2

    distill = DistillConfig(image_text=1, image_image=1, text_text=1, heads=1, drop_teachers=0.5)
    optim = OptimConfig(lr=1e-3, warmup_steps=1)
    config = Stage2Config(distill=distill, optim=optim, data=DATA, scale=SCALE, epochs=2)
    # Three of the nine are there for one or two of eight pairs, too few to standardise by.
    several = ("bmca-clip.imported", "biomedclip.imported", "quiltnet-b-32.imported")
    align(str(home / "lake"), AlignConfig(teachers=several))
    for run, changes in (("all", {}), ("aligned", {"teachers": several, "alignment": "newest"})):
        changed = config.model_copy(update=changes)
        result = train_stage2(str(home / "lake"), run, str(home / "lake" / "runs" / "stage1"), changed)
        assert result.steps == len(rows_of(home, run)) == 4
    assert [row["batch"] for row in rows_of(home, "all")] == [row["batch"] for row in rows_of(home, "aligned")]
    assert rows_of(home, "all")[0]["heads"] != rows_of(home, "aligned")[0]["heads"]
    rows = rows_of(home, "all")
    assert all(row[name] > 0 for row in rows for name in ("contrastive", "image_text", "image_image", "heads"))
    assert all(row["feature"] == row["cross"] == 0 for row in rows)
    paper = load_config(Stage2Config, str(ROOT / "recipes" / "paper-stage2.yaml"), ()).model_copy(update={"data": DATA})
    with pytest.raises(TrainError, match=r"bmca-clip\.imported has 768 and 768"):
        train_stage2(str(home / "lake"), "refused", str(home / "lake" / "runs" / "stage1"), paper)


def test_again_nothing_is_written_and_projected_features_lie_beside_for_the_papers_recipe(home, published):
    from extractor.importing import import_features
    from trainer.stage2 import train_stage2

    uri = str(home / "lake")
    before = {file: file.stat().st_mtime_ns for file in (home / "lake").glob("features/**/*.parquet")}
    again = import_features(str(published), uri, CONFIG, consented("imported"))
    assert (again.ingested.already_done, again.shards) == (True, 0)
    projected = import_features(str(published), uri, CONFIG, consented("projected"), "projected")
    assert projected.shards == 2 * len(NAMES)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    norms = open_lake(uri).read_features("genmedclip.projected", 0, ["image_norm"])["image_norm"].to_pylist()
    assert all(1.5 < norm < 3 for norm in norms)

    paper = load_config(Stage2Config, str(ROOT / "recipes" / "paper-stage2.yaml"), ())
    for run, length in (("paper", "stored"), ("unit", "unit")):
        distill = paper.distill.model_copy(update={"target_length": length})
        config = paper.model_copy(update={"data": DATA, "scale": SCALE, "epochs": 2, "distill": distill})
        train_stage2(uri, run, f"{uri}/runs/stage1", config)
    for stored, unit in zip(rows_of(home, "paper"), rows_of(home, "unit"), strict=True):
        assert stored["batch"] == unit["batch"]
        expected = stored["contrastive"] + 50 * stored["feature"] + stored["cross"]
        assert stored["total"] == pytest.approx(expected, rel=1e-5)
        # Two squared errors over 512 dimensions, against targets longer than one.
        assert stored["feature"] > 1.5 * unit["feature"]
        assert unit["feature"] < 8 / 512


def test_terms_are_asked_for_before_anything_is_read(tmp_path, published):
    from extractor.importing import import_features

    with pytest.raises(TermsError, match=r"unimed-clip\.imported"):
        import_features(str(published), str(tmp_path / "lake"), CONFIG)
    assert not (tmp_path / "lake" / "pairs").exists()
