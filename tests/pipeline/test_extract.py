import hashlib

import pyarrow as pa
import pytest

from common import processes
from common.errors import FingerprintError, ModelError, StorageError
from extractor.config import ExtractConfig, ViewsConfig
from extractor.pipeline import extract
from extractor.tending.verify import verify

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def teachers(make_clip_folder, make_hf_clip_folder):
    return {
        "a": make_clip_folder("a", dim=16),
        "b": make_clip_folder("b", dim=24, seed=1, size=48),
        "hf": make_hf_clip_folder("hf", dim=24),
    }


def named(teachers, *names: str) -> tuple[str, ...]:
    return tuple(f"{name}={teachers[name]}" for name in names)


def file_hashes(lake) -> dict[str, str]:
    return {
        f"{teacher}/{index}": hashlib.sha256(
            lake.storage.read_bytes(f"features/teacher={teacher}/shard-{index:06d}.parquet")
        ).hexdigest()
        for teacher in lake.teachers()
        for index in lake.shards(f"features/teacher={teacher}")
    }


@pytest.mark.usefixtures("ray_local")
class TestExtract:
    def test_three_teachers_embed_every_pair_and_a_second_run_does_nothing(self, make_lake, teachers, tmp_path, caplog):
        lake = make_lake(tmp_path / "lake", rows=20, shard_rows=8, damaged=(3,))
        config = ExtractConfig(teachers=named(teachers, "a", "b", "hf"), micro_batch=4, max_reject_fraction=0.2)
        report = extract(lake.uri, config)
        assert (report.shards, report.rows, report.rejects["image not decodable"]) == (9, 60, 3)
        for teacher in ("a", "b", "hf"):
            for index in lake.shards():
                features = lake.read_features(teacher, index)
                assert features["sample_id"].equals(lake.read_pairs(index)["sample_id"])
        reject = lake.storage.read_table("rejects/extract/b/shard-000000.parquet").to_pylist()
        assert [row["stage"] for row in reject] == ["extract:b"]
        assert lake.read_teacher("a")["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-4)
        table = {row["name"]: row for row in lake.storage.read_table("teachers.parquet").to_pylist()}
        assert {name: (row["text_dim"], row["image_size"]) for name, row in table.items()} == {
            "a": (16, 32),
            "b": (24, 48),
            "hf": (24, 32),
        }
        for teacher in ("a", "b", "hf"):
            _, said = lake.storage.read_metadata(f"features/teacher={teacher}/shard-000001.parquet")
            facts = table[teacher]
            assert (said["mmkd.teacher"], said["mmkd.created_at"]) == (teacher, facts["created_at"])
            assert said["mmkd.weights_sha256"] == facts["weights_sha256"]
        before = file_hashes(lake)
        again = extract(lake.uri, config)
        assert (again.shards, again.skipped, sum(again.forwards.values())) == (0, 9, 0)
        assert file_hashes(lake) == before

    def test_what_a_writer_met_is_the_headline_of_the_account(self, make_lake, teachers, tmp_path, monkeypatch):
        monkeypatch.setattr(processes, "FEW_CORES", 0)  # so that a task of Ray's writes, and its error travels
        lake = make_lake(tmp_path / "lake", rows=8, shard_rows=8, damaged=(3,))
        lake.storage.write_bytes("rejects/extract/a", b"a file where a folder should be")
        with pytest.raises(StorageError) as raised:
            extract(lake.uri, ExtractConfig(teachers=named(teachers, "a"), max_reject_fraction=0.5))
        (run,) = lake.storage.list_folders("runs")
        message = lake.storage.read_json(f"runs/{run}/report.json")["message"]
        assert message == str(raised.value)
        assert message.startswith("Could not write")
        assert "\x1b" not in message

    def test_only_what_is_missing_is_computed(self, make_lake, teachers, tmp_path):
        lake = make_lake(tmp_path / "lake", rows=20, shard_rows=8)
        extract(lake.uri, ExtractConfig(teachers=named(teachers, "a")))
        before = file_hashes(lake)
        lake.storage.remove("features/teacher=a/shard-000001.parquet")
        lake.storage.write_bytes("features/teacher=a/shard-000002.parquet", b"torn by a crash")
        report = extract(lake.uri, ExtractConfig(teachers=named(teachers, "a", "b")))
        assert report.shards == 2 + 3
        assert {key: value for key, value in file_hashes(lake).items() if key.startswith("a/")} == before

    def test_other_weights_under_the_same_name_are_refused(self, make_lake, teachers, tmp_path):
        lake = make_lake(tmp_path / "lake", rows=4)
        extract(lake.uri, ExtractConfig(teachers=(f"t={teachers['a']}",)))
        before = file_hashes(lake)
        with pytest.raises(FingerprintError, match="weights_sha256"):
            extract(lake.uri, ExtractConfig(teachers=(f"t={teachers['b']}",)))
        assert file_hashes(lake) == before

    def test_a_teacher_that_rejects_too_much_stops_and_keeps_the_others(self, make_lake, teachers, tmp_path):
        import torch
        from safetensors.torch import load_file, save_file

        broken = tmp_path / "broken"
        broken.mkdir()
        for file in teachers["a"].iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        state = load_file(str(broken / "open_clip_model.safetensors"))
        state["visual.proj"] = torch.full_like(state["visual.proj"], float("nan"))
        save_file(state, str(broken / "open_clip_model.safetensors"))
        lake = make_lake(tmp_path / "lake", rows=6)
        with pytest.raises(ModelError, match=r"'broken' stopped: 6 of 6 rows .* image embedding not finite"):
            extract(lake.uri, ExtractConfig(teachers=(*named(teachers, "b"), f"broken={broken}")))
        assert lake.shards("features/teacher=b") == [0]
        assert lake.shards("features/teacher=broken") == []
        assert lake.storage.read_table("teachers.parquet")["name"].to_pylist() == ["b"]

    def test_a_lake_of_broken_pictures_stops_early_and_says_why(self, make_lake, teachers, tmp_path):
        lake = make_lake(tmp_path / "lake", rows=200, shard_rows=5, damaged=tuple(range(200)))
        with pytest.raises(ModelError, match=r"'a' stopped: 5 of 5 rows .*\(5 x image not decodable\)"):
            extract(lake.uri, ExtractConfig(teachers=named(teachers, "a")))
        assert lake.shards("features/teacher=a") == []
        (run,) = lake.storage.list_folders("runs")
        assert lake.storage.read_json(f"runs/{run}/report.json")["status"] == "failed"

    def test_views_of_one_tower_are_stored_checked_and_resumed(self, make_lake, teachers, tmp_path):
        lake = make_lake(tmp_path / "lake", rows=12, shard_rows=6, damaged=(3,))
        config = ExtractConfig(
            teachers=named(teachers, "a", "hf"), towers="image", views=ViewsConfig(count=3), max_reject_fraction=0.5
        )
        assert extract(lake.uri, config).shards == 4
        for teacher in ("a", "hf"):
            table = pa.concat_tables([lake.read_features(teacher, index) for index in lake.shards()])
            assert table["text_embedding"].null_count == 12
            assert table["image_embedding"].null_count == 1
            assert [len(row) for row in table["view_embeddings"].to_pylist()] == [3] * 12
        boxes = [lake.read_features(name, 1)["view_boxes"] for name in ("a", "hf")]
        assert boxes[0].equals(boxes[1])
        assert verify(lake.uri).is_good
        again = extract(lake.uri, config)
        assert (again.shards, again.skipped) == (0, 4)
