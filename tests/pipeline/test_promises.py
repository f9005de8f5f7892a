"""The ten promises of extraction (facts/anchors.md, section 4), each a test of its number; real kills throughout."""

import io
import os
import random
import signal
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_proxy import FaultProxy
from processes import wait_for, workers

from common import processes
from common.errors import FingerprintError, LakeError, LeaseError
from common.lake import Lake, create_lake, shard_name
from common.schemas import PAIRS
from extractor.config import ExtractConfig, HardwareConfig, ViewsConfig
from extractor.pipeline import extract

pytestmark = pytest.mark.ray

SHARDS, SHARD_ROWS = 40, 5


def settings(teachers, *names: str, **more) -> ExtractConfig:
    named = tuple(f"{name}={teachers[name]}" for name in names or teachers)
    # One shard at a time is prepared: each further process would import torch, which takes longer than the work.
    defaults = {"micro_batch": 4, "lease_seconds": 12, "hardware": HardwareConfig(prepare_tasks=1, share_process=False)}
    return ExtractConfig(teachers=named, **{**defaults, **more})


def embeddings(lake: Lake, teacher: str) -> pa.Table:
    return pa.concat_tables([lake.read_features(teacher, index) for index in lake.shards()])


@pytest.fixture(scope="module")
def undisturbed(ray_local, make_lake, small_teachers, tmp_path_factory):
    """What a run gives that nobody disturbs, and the forward passes it takes."""
    lake = make_lake(tmp_path_factory.mktemp("undisturbed") / "lake", rows=SHARDS * SHARD_ROWS, shard_rows=SHARD_ROWS)
    report = extract(lake.uri, settings(small_teachers))
    return {name: embeddings(lake, name) for name in small_teachers}, sum(report.forwards.values())


def same_as(undisturbed, lake: Lake) -> bool:
    return all(embeddings(lake, name).equals(table) for name, table in undisturbed[0].items())


def test_promise_01_killed_workers_lose_and_change_nothing(
    make_lake, small_teachers, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(processes, "FEW_CORES", 0)  # so that writers are processes of their own
    lake = make_lake(tmp_path / "lake", rows=SHARDS * SHARD_ROWS, shard_rows=SHARD_ROWS)
    chance, killed, over = random.Random(0), [], threading.Event()

    def kill_now_and_then() -> None:
        titles = ["ray::Teacher_a", "ray::Teacher_b", "ray::MapBatches", "ray::write_file"]
        while not over.is_set() and len(killed) < 6:
            time.sleep(chance.uniform(0.1, 0.8))
            title = titles[len(killed) % 2] if chance.random() < 0.6 else chance.choice(titles[2:])
            victims = workers(os.getpid(), title)
            if victims and lake.files("features/teacher=a"):
                victims[0].kill()
                killed.append(title)

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    report = extract(lake.uri, settings(small_teachers))
    over.set()
    killer.join()
    assert any(title.startswith("ray::Teacher") for title in killed), f"killed: {killed}; the run was over too soon"
    assert report.shards == 2 * SHARDS
    assert same_as(undisturbed, lake)


def test_promises_02_03_04_a_killed_driver(make_lake, small_teachers, undisturbed, driver, tmp_path):
    """Kill at half: little work is done twice; readers see whole files only; a second run is turned away meanwhile."""
    lake = make_lake(tmp_path / "lake", rows=SHARDS * SHARD_ROWS, shard_rows=SHARD_ROWS)
    first = driver(lake, settings(small_teachers), 0.05)

    def half() -> bool:
        assert first.poll() is None, first.log.read_text()
        for name in small_teachers:  # what a reader sees at any moment is whole
            for file in lake.storage.list_files(f"features/teacher={name}", ".parquet"):
                assert pq.read_table(io.BytesIO(lake.storage.read_bytes(f"features/teacher={name}/{file}"))).num_rows
        return len(lake.files("features/teacher=b")) >= SHARDS // 2

    wait_for(lambda: lake.files("features/teacher=a"), 120, "a first file")
    with pytest.raises(LeaseError, match="teacher=a is being written by run 'extract-"):
        extract(lake.uri, settings(small_teachers))
    wait_for(half, 120, "half of the files")
    (paused,) = workers(first.pid, "ray::Teacher_a")
    paused.suspend()  # a zombie that wakes up when everything is over
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {name: set(lake.files(f"features/teacher={name}")) for name in small_teachers}
    assert min(map(len, done.values())) >= SHARDS // 4
    passes = tmp_path / "passes.txt"

    second = driver(lake, settings(small_teachers))
    assert second.wait(timeout=240) == 0, second.log.read_text()
    assert passes.stat().st_size <= 1.05 * undisturbed[1]
    assert same_as(undisturbed, lake)
    with_suspended_awake(paused)
    assert same_as(undisturbed, lake)
    assert all(name.endswith(".parquet") for name in os.listdir(f"{lake.uri}/features/teacher=a"))
    again = extract(lake.uri, settings(small_teachers))
    assert (again.shards, sum(again.forwards.values())) == (0, 0)
    reports = [lake.storage.read_json(f"runs/{run}/report.json")["status"] for run in lake.storage.list_folders("runs")]
    assert "finished" in reports
    assert set(reports) <= {"finished", "killed"}  # the first run may have been too short to leave a report


def with_suspended_awake(process) -> None:
    import psutil

    try:
        process.resume()
        process.wait(timeout=20)
    except psutil.NoSuchProcess:
        pass  # its parent's end took it along


def test_promise_05_other_producers_are_refused(make_lake, small_teachers, ray_local, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=6)
    extract(lake.uri, settings(small_teachers, "a"))
    moved = {"a": small_teachers["b"]}
    for config, key in (
        (settings(moved), "weights_sha256"),
        (settings(small_teachers, "a", decode="scaled"), "decode"),
        (settings(small_teachers, "a", decode="fast"), "decode"),
        (settings(small_teachers, "a", towers="image"), "text_dim"),
        (settings(small_teachers, "a", views=ViewsConfig(count=1)), "views"),
    ):
        with pytest.raises(FingerprintError, match=key):
            extract(lake.uri, config)
    both = extract(lake.uri, settings(moved, teacher_version="new"))
    assert both.shards == 1
    extract(lake.uri, settings(small_teachers, "a", teacher_version="fast", decode="fast"))
    assert lake.teachers() == ["a", "a.fast", "a.new"]
    exact, fast = embeddings(lake, "a"), embeddings(lake, "a.fast")
    assert exact["text_embedding"].equals(fast["text_embedding"])
    vectors = [np.stack(table["image_embedding"].to_numpy()).astype(np.float32) for table in (exact, fast)]
    assert not (vectors[0] == vectors[1]).all()
    assert (vectors[0] * vectors[1]).sum(-1).min() > 0.999
    other = make_lake(tmp_path / "other", rows=7)
    lake.storage.write_bytes(f"pairs/{shard_name(0)}", other.storage.read_bytes(f"pairs/{shard_name(0)}"))
    with pytest.raises(LakeError, match="pairs were replaced"):
        extract(lake.uri, settings(small_teachers, "a"))


def test_promise_06_another_teacher_computes_only_itself(make_lake, small_teachers, ray_local, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=12, shard_rows=6)
    extract(lake.uri, settings(small_teachers, "a"))
    before = {
        file: lake.storage.version(f"features/teacher=a/{file}")
        for file in lake.storage.list_files("features/teacher=a", ".parquet")
    }
    report = extract(lake.uri, settings(small_teachers))
    assert dict(report.forwards).keys() == {"b"}
    assert {file: lake.storage.version(f"features/teacher=a/{file}") for file in before} == before


def test_promise_07_hostile_pictures_are_in_the_ledger_once(shared_data, small_teachers, ray_local, tmp_path):
    """Straight into the pairs, past the checks of ingest: extraction must cope by itself."""
    import hashlib

    files = sorted(
        file
        for file in (shared_data / "nasty").rglob("*")
        if file.suffix not in (".md", ".jsonl", "") and file.is_file()
    )
    lake = create_lake(str(tmp_path / "lake"), 40)
    rows = []
    for number, file in enumerate(files):
        data = file.read_bytes()
        captions = ["x" * 10_000_000] if number == 0 else [f"caption {number}"]
        rows.append(
            {
                "sample_id": hashlib.sha256(file.name.encode()).hexdigest()[:32],
                "image": data,
                "captions": captions,
                "modality": None,
                "labels": [],
                "source": "nasty",
                "source_key": file.name,
                "license": None,
                "width": 1,
                "height": 1,
                "sha256": hashlib.sha256(data).hexdigest(),
                "split": "train",
            }
        )
    for index in range(0, len(rows), 40):
        table = pa.Table.from_pylist(rows[index : index + 40], schema=PAIRS)
        lake.storage.write_table(f"pairs/{shard_name(index // 40)}", table)
    report = extract(lake.uri, settings(small_teachers, max_reject_fraction=1.0))
    assert report.rows == 2 * len(files)
    for name in small_teachers:
        features = embeddings(lake, name)
        missing = {row["sample_id"] for row in features.to_pylist() if row["image_embedding"] is None}
        folder = f"rejects/extract/{name}"
        listed = [
            row
            for file in lake.storage.list_files(folder)
            for row in lake.storage.read_table(f"{folder}/{file}").to_pylist()
        ]
        assert sorted(row["sample_id"] for row in listed) == sorted(missing)
        assert {row["stage"] for row in listed} == {f"extract:{name}"}
        assert 5 <= len(missing) < len(files) / 2
        assert features["text_embedding"].null_count == 0


def test_promise_08_layout_does_not_matter(make_lake, small_teachers, undisturbed, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=60, shard_rows=60)
    shuffled = create_lake(str(tmp_path / "shuffled"), 7)
    order = np.random.default_rng(0).permutation(60)
    for number, start in enumerate(range(0, 60, 7)):
        shuffled.storage.write_table(f"pairs/{shard_name(number)}", lake.read_pairs(0).take(order[start : start + 7]))
    extract(shuffled.uri, settings(small_teachers))
    for name in small_teachers:
        there = {row["sample_id"]: row for row in embeddings(shuffled, name).to_pylist()}
        assert len(there) == 60
        expected = undisturbed[0][name].slice(0, 60).to_pylist()
        assert [there[row["sample_id"]] for row in expected] == expected


def test_promise_09_a_bad_object_store_loses_and_reveals_nothing(
    make_lake, small_teachers, undisturbed, driver, s3, s3_server, monkeypatch
):
    """One request in ten fails in some way, keys are odd, and a canary lies in the credentials."""
    canaries = ("CANARYKEY0123456789", "canary/secret+of+the+store")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", canaries[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", canaries[1])
    rates = {"error": 0.03, "throttle": 0.02, "reset": 0.02, "truncate": 0.03, "lost_ack": 0.03, "slow": 0.02}
    lake = make_lake(f"{s3}/a lake=ünique", rows=60, shard_rows=SHARD_ROWS)
    with FaultProxy(s3_server, seed=1, rates=rates) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        process = driver(lake, settings(small_teachers, lease_seconds=60))
        assert process.wait(timeout=300) == 0, process.log.read_text()
        assert all(proxy.counts[kind] for kind in ("error", "truncate", "lost_ack")), proxy.counts
    for name, table in undisturbed[0].items():
        assert lake.files(f"features/teacher={name}") == list(range(60 // SHARD_ROWS))
        assert embeddings(lake, name).equals(table.slice(0, 60))
    everything = lake.storage.fs.find(lake.storage.path())
    assert any(path.endswith("report.html") for path in everything)
    shown = [process.log.read_bytes(), *(lake.storage.fs.cat_file(path) for path in everything)]
    assert not [text for text in shown for canary in canaries if canary.encode() in text]


def test_promise_10_shards_larger_than_the_batch_are_embedded_whole(make_lake, small_teachers, undisturbed, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=SHARDS * SHARD_ROWS, shard_rows=150)
    extract(lake.uri, settings(small_teachers))
    assert same_as(undisturbed, lake)


def test_sigterm_ends_in_good_order_and_says_how_to_go_on(make_lake, small_teachers, undisturbed, driver, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=SHARDS * SHARD_ROWS, shard_rows=SHARD_ROWS)
    process = driver(lake, settings(small_teachers), 0.05)
    wait_for(lambda: lake.files("features/teacher=a"), 120, "a first file")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert "SIGTERM came" in process.log.read_text()
    assert "run the same command again" in process.log.read_text()
    (run,) = lake.storage.list_folders("runs")
    assert lake.storage.read_json(f"runs/{run}/report.json")["status"] == "stopped"
    extract(lake.uri, settings(small_teachers))  # the lease was released: no waiting
    assert same_as(undisturbed, lake)


def test_several_actors_of_a_teacher_share_its_shards(make_lake, small_teachers, undisturbed, driver, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=SHARDS * SHARD_ROWS, shard_rows=SHARD_ROWS)
    two = HardwareConfig(prepare_tasks=1, actors_per_teacher=2)
    process = driver(lake, settings(small_teachers, hardware=two), 0.1)  # slow enough for the second actor to be there
    assert process.wait(timeout=240) == 0, process.log.read_text()
    assert same_as(undisturbed, lake)
    (run,) = lake.storage.list_folders("runs")
    stages = lake.storage.read_json(f"runs/{run}/report.json")["stages"]
    assert [stages[f"teacher={name}"]["workers"] for name in ("a", "b")] == [2, 2]
