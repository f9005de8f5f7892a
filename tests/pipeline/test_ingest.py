"""Ingest through Ray: real pairs, a second run, a second source, and runs that are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from common.errors import StorageError
from common.lake import open_lake
from extractor.config import IngestConfig
from extractor.ingest import ingest
from extractor.sources import lines
from extractor.staging import sample_id
from extractor.tasks import Workers

pytestmark = pytest.mark.ray

CONFIG = IngestConfig(shard_rows=100)


def files_below(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def rows_of(lake_uri):
    lake = open_lake(str(lake_uri))
    return [row for index in lake.shards() for row in lake.read_pairs(index).to_pylist()]


@pytest.fixture(scope="module")
def whole(ray_local, shared_data, tmp_path_factory):
    """The lake of an ingest that nobody disturbed: folder and report."""
    folder = tmp_path_factory.mktemp("whole") / "lake"
    source = shared_data / "captions-mixed" / "pairs.jsonl"
    return folder, ingest(str(source), str(folder), CONFIG)


def test_real_pairs_in_source_order(whole, shared_data):
    folder, report = whole
    manifest = shared_data / "captions-mixed" / "pairs.jsonl"
    given = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert (report.input, report.pairs, report.rejects, report.filtered, report.shards) == (824, 824, 0, 0, 9)
    rows = rows_of(folder)
    assert [row["captions"] for row in rows] == [[row["caption"].strip()] for row in given]
    assert [row["modality"] for row in rows] == [row["modality"] for row in given]
    assert {row["split"] for row in rows} == {"train", "test"}
    assert len({row["sample_id"] for row in rows}) == 824
    for row, line in list(zip(rows, given, strict=True))[::97]:
        assert row["image"] == (manifest.parent / line["image"]).read_bytes()
        assert row["source_key"] == f"pairs.jsonl/{line['image']}"
        assert row["sample_id"] == sample_id(row["source_key"], row["sha256"], tuple(row["captions"]))
        assert row["license"] == line["licence"]
    assert [len(open_lake(str(folder)).read_pairs(i)) for i in range(9)] == [100] * 8 + [24]
    assert not list(folder.glob("ingest/*")), "staged files are removed"


def test_a_second_run_does_nothing(whole, shared_data):
    folder, report = whole
    before = {name: path.stat().st_mtime_ns for name, path in files_below(folder).items()}
    again = ingest(str(shared_data / "captions-mixed" / "pairs.jsonl"), str(folder), CONFIG)
    assert again.already_done
    assert (again.pairs, again.modalities, again.ingest_id) == (report.pairs, report.modalities, report.ingest_id)
    assert {name: path.stat().st_mtime_ns for name, path in files_below(folder).items()} == before


def test_a_second_source_brings_only_what_is_new(ray_local, shared_data, tmp_path):
    lake = str(tmp_path / "lake")
    first = ingest(str(shared_data / "cap-covid-cxr" / "pairs.jsonl"), lake, CONFIG)
    rows = rows_of(lake)
    both = ingest(str(shared_data / "captions-mixed" / "pairs.jsonl"), lake, CONFIG)
    assert both.input == both.pairs + both.duplicates == 824
    assert both.duplicates > 0
    assert both.first_shard == first.shards
    assert rows_of(lake)[: len(rows)] == rows, "what was there is as it was"
    pairs = [(row["sha256"], tuple(row["captions"])) for row in rows_of(lake)]
    assert len(set(pairs)) == len(pairs) == first.pairs + both.pairs


DRIVER = """
import sys, ray
from extractor.config import IngestConfig
from extractor.sources import lines
lines.ROWS_PER_PART = 40
ray.init(address=sys.argv[3], log_to_driver=False)
from extractor.ingest import ingest
ingest(sys.argv[1], sys.argv[2], IngestConfig(shard_rows=100))
"""


def run_until(ray, source, lake, pattern, count):
    """Start an ingest in a process of its own and SIGKILL it once ``count`` files match a pattern."""
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(source), str(lake), address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(lake.glob(pattern))) < count and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    seen = len(list(lake.glob(pattern)))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert seen >= count, f"saw {seen} of {pattern} before the run ended"
    assert not list(lake.glob("ingests/*.json")), "it was killed too late to prove anything"


def test_killed_while_reading_and_again_while_writing_ends_with_the_same_lake(
    whole, ray_local, shared_data, tmp_path, monkeypatch
):
    source, lake = shared_data / "captions-mixed" / "pairs.jsonl", tmp_path / "lake"
    run_until(ray_local, source, lake, "ingest/*/part-*.json", 3)
    staged = {path.name: path.stat().st_mtime_ns for path in lake.glob("ingest/*/part-*.json")}
    run_until(ray_local, source, lake, "pairs/shard-*.parquet", 2)
    for name, changed in staged.items():
        (kept,) = lake.glob(f"ingest/*/{name}")
        assert kept.stat().st_mtime_ns == changed, "a finished part was read again"
    monkeypatch.setattr(lines, "ROWS_PER_PART", 40)
    report = ingest(str(source), str(lake), CONFIG)
    assert (report.input, report.pairs, report.rejects) == (824, 824, 0)
    assert report.modalities == whole[1].modalities
    assert rows_of(lake) == rows_of(whole[0])
    assert sorted(path.name for path in lake.glob("pairs/*")) == [f"shard-{i:06d}.parquet" for i in range(9)]


@pytest.mark.parametrize("few", [0, 1], ids=["elsewhere", "here"])
def test_a_storage_fault_in_a_task_is_one_paragraph(ray_local, tmp_path, few):
    with pytest.raises(StorageError, match=r"FileNotFoundError.*nowhere.*run the same command again"):
        list(Workers().run([str(tmp_path / "nowhere")], open, few=few))


def test_no_items_are_no_work_also_when_the_workers_are_there(ray_local):
    with Workers() as workers:
        assert len(list(workers.run([["a"], ["b"]], len))) == 2
        assert list(workers.run([], len)) == []
