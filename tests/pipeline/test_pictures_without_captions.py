"""A lake in which some pictures have no caption and some several labels, through every step behind ingest."""

import logging

import pytest
from changed_pairs import change_rows, without_captions

from common.lake import open_lake

pytestmark = pytest.mark.ray

ROWS, SHARD_ROWS = 72, 16
SILENT_SHARD = range(16, 32)


def is_silent(number: int) -> bool:
    return number % 4 == 0 or number in SILENT_SHARD


@pytest.fixture(scope="module")
def lake(tmp_path_factory, make_lake):
    """Five shards; the second has no caption at all. Every sixth picture has two labels, every seventh none."""
    lake = make_lake(tmp_path_factory.mktemp("silent") / "lake", rows=ROWS, shard_rows=SHARD_ROWS)

    def relabel(number: int, row: dict) -> dict:
        labels = [f"finding {number % 3}", "second finding"] if number % 6 == 5 else row["labels"]
        return {**row, "labels": [] if number % 7 == 0 else labels, "split": "val" if number % 9 == 0 else row["split"]}

    change_rows(lake, relabel)
    return without_captions(lake, is_silent)


def pairs_of(lake) -> list[dict]:
    return [row for shard in lake.shards() for row in lake.read_pairs(shard).to_pylist()]


def test_pictures_without_captions_through_every_step(
    ray_local, lake, small_teachers, make_clip_folder, tmp_path, monkeypatch, caplog
):
    from extractor.config import ExtractConfig
    from extractor.inspecting.inspection import inspect_lake
    from extractor.pipeline import extract
    from extractor.tending.verify import verify
    from trainer.alignment.align import align
    from trainer.config import AlignConfig, EvaluateConfig, SelectConfig, Stage1Config, Stage2Config
    from trainer.evaluation.models import find_model
    from trainer.evaluation.run import evaluate
    from trainer.selection.select import select
    from trainer.stage1 import train_stage1
    from trainer.stage2 import train_stage2

    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "mmkd")
    teachers = tuple(f"{name}={folder}" for name, folder in small_teachers.items())
    report = extract(lake.uri, ExtractConfig(teachers=teachers, micro_batch=8))
    assert dict(report.rejects) == {}
    for name in small_teachers:
        features = [row for shard in lake.shards() for row in lake.read_features(name, shard).to_pylist()]
        for number, (pair, row) in enumerate(zip(pairs_of(lake), features, strict=True)):
            assert row["image_embedding"] is not None
            assert (row["text_embedding"] is None) == (row["text_norm"] is None) == is_silent(number)
            assert len(row["extra_text_embeddings"]) == len(pair["captions"][1:])

    checked = verify(lake.uri, pairs=True)
    assert checked.findings == []
    assert {name: tally.good for name, tally in checked.teachers.items()} == dict.fromkeys(small_teachers, 5)

    silent = sum(map(is_silent, range(ROWS)))
    cosines = inspect_lake(lake.uri).teachers[0].cosines
    assert cosines["(all)"].matched.count == ROWS - silent

    name = select(lake.uri, SelectConfig(min_skill=0, keep_fraction=1))
    assert f"select: {silent} rows have no caption" in caplog.text
    for teacher in small_teachers:
        files = [f"selection/{name}/teacher={teacher}/shard-{shard:06d}.parquet" for shard in lake.shards()]
        rows = [row for file in files for row in lake.storage.read_table(file).to_pylist()]
        assert [row["admitted"] for row in rows] == [not is_silent(number) for number in range(ROWS)]
        assert all((row["rank"] is None) == (not row["admitted"]) for row in rows)
    assert align(lake.uri, AlignConfig())

    trained = [row["sample_id"] for row in pairs_of(lake) if row["captions"] and row["split"] == "train"]
    left_out = sum(not row["captions"] and row["split"] == "train" for row in pairs_of(lake))
    common = {
        "optim": {"warmup_steps": 2},
        "data": {"batch_size": 8, "lanes": 4, "tasks": 1},
        "scale": {"checkpoint_every": 3, "log_every": 1},
        "epochs": 2,
    }
    student = make_clip_folder("student", dim=24, seed=5)
    first = train_stage1(lake.uri, "s1", Stage1Config(model={"architecture": str(student)}, **common))
    second = train_stage2(lake.uri, "s2", first.checkpoint, Stage2Config(**common))
    assert first.steps == second.steps == 2 * (len(trained) // 8)
    assert f"rows without a caption are left out: {left_out} of the train split" in caplog.text
    for result in (first, second):
        assert result.metrics["total"] == pytest.approx(result.metrics["total"])  # a number
        assert result.metrics["validation"] > 0

    models = [find_model(reference, {}) for reference in (*teachers, f"student={second.checkpoint}")]
    found = evaluate(lake.uri, models, EvaluateConfig(bootstraps=20))
    test_rows = [row for row in pairs_of(lake) if row["split"] == "test"]
    counts = {
        (row["task"], row["modality"], row["metric"]): row["n"]
        for row in found.scores.to_pylist()
        if row["model"] == "student"
    }
    told = [row for row in test_rows if row["captions"]]
    assert counts["retrieval", "all", "image_to_text_recall@1"] == len(told) < len(test_rows)
    for modality in ("ct", "mri"):
        labelled = [row["labels"] for row in test_rows if row["modality"] == modality and row["labels"]]
        assert counts["zero_shot", modality, "auc"] == len(labelled)
        assert counts["zero_shot", modality, "accuracy"] == sum(len(labels) == 1 for labels in labelled)
    assert counts["zero_shot", "mri", "auc"] > counts["zero_shot", "mri", "accuracy"]
    assert any("of mri have several labels" in doubt for doubt in found.doubts)
    assert open_lake(lake.uri).storage.list_files("scores")


def test_a_text_tower_alone_goes_through_shards_without_captions(ray_local, make_lake, tmp_path, small_teachers):
    from extractor.config import ExtractConfig
    from extractor.pipeline import extract
    from extractor.tending.verify import verify

    lake = without_captions(make_lake(tmp_path / "lake", rows=12, shard_rows=6), lambda number: number >= 6)
    report = extract(lake.uri, ExtractConfig(teachers=(f"a={small_teachers['a']}",), towers="text", micro_batch=4))
    assert dict(report.rejects) == {}
    texts = [lake.read_features("a", shard)["text_embedding"].null_count for shard in lake.shards()]
    assert texts == [0, 6]
    assert verify(lake.uri).findings == []


def test_a_lake_without_captions_is_evaluated_and_not_trained_on(ray_local, make_lake, tmp_path, make_clip_folder):
    from common.errors import TrainError
    from trainer.config import EvaluateConfig, Stage1Config
    from trainer.evaluation.models import find_model
    from trainer.evaluation.run import evaluate
    from trainer.stage1 import train_stage1

    lake = without_captions(make_lake(tmp_path / "lake", rows=40, shard_rows=20))
    student = make_clip_folder("student", dim=24, seed=5)
    with pytest.raises(TrainError, match=r"no sample to train on: 32 rows of its train split have no caption"):
        train_stage1(lake.uri, "s1", Stage1Config(model={"architecture": str(student)}, data={"batch_size": 8}))
    scores = evaluate(lake.uri, [find_model(f"it={student}", {})], EvaluateConfig(bootstraps=20)).scores
    assert set(scores["task"].to_pylist()) == {"zero_shot"}
