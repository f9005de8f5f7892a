import hashlib
from pathlib import Path

import pytest

from common.errors import FingerprintError, ModelError
from extractor.config import ExtractConfig
from extractor.pipeline import extract

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
        reject = lake.storage.read_table("rejects/stage=extract/teacher=b/shard-000000.parquet").to_pylist()
        assert [row["stage"] for row in reject] == ["extract:b"]
        assert lake.read_teacher("a")["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-4)
        before = file_hashes(lake)
        again = extract(lake.uri, config)
        assert (again.shards, again.skipped, sum(again.forwards.values())) == (0, 9, 0)
        assert file_hashes(lake) == before

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

    def test_a_killed_teacher_comes_back_and_nothing_is_lost(self, make_lake, teachers, tmp_path):
        import os
        import signal
        import threading
        import time

        lake = make_lake(tmp_path / "lake", rows=400, shard_rows=20)
        undisturbed = make_lake(tmp_path / "undisturbed", rows=400, shard_rows=20)
        config = ExtractConfig(teachers=named(teachers, "a", "b"), micro_batch=4)
        extract(undisturbed.uri, config)
        killed = []

        def kill_one() -> None:
            while not lake.shards("features/teacher=a"):
                time.sleep(0.05)
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    try:
                        title = Path(f"/proc/{entry}/cmdline").read_bytes()
                    except OSError:
                        continue
                    if title.startswith(b"ray::Teacher_a") and not killed:
                        os.kill(int(entry), signal.SIGKILL)
                        killed.append(int(entry))

        killer = threading.Thread(target=kill_one)
        killer.start()
        report = extract(lake.uri, config)
        killer.join()
        assert killed
        assert report.shards == 40
        for index in lake.shards():
            for teacher in ("a", "b"):
                assert lake.read_features(teacher, index).equals(undisturbed.read_features(teacher, index))
