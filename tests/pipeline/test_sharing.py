"""Teachers that share a process: the same files from fewer processes, and what it costs when that process dies."""

import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from processes import wait_for, workers

from extractor.config import ExtractConfig, HardwareConfig

pytestmark = pytest.mark.ray


def config(small_teachers, share: bool) -> ExtractConfig:
    teachers = tuple(f"{name}={folder}" for name, folder in small_teachers.items())
    return ExtractConfig(teachers=teachers, hardware=HardwareConfig(share_process=share, threads=1))


def vectors(lake) -> dict[str, list]:
    files = sorted(Path(lake.uri).glob("features/teacher=*/shard-*.parquet"))
    return {f"{file.parent.name}/{file.name}": pq.read_table(file).to_pylist() for file in files}


def test_a_shared_process_that_is_killed_costs_the_shards_at_work_and_no_more(
    driver, make_lake, tmp_path, small_teachers
):
    apart, shared = (make_lake(tmp_path / name, rows=96, shard_rows=8) for name in ("apart", "shared"))
    calm = driver(apart, config(small_teachers, share=False))
    assert calm.wait(180) == 0, calm.log.read_text()

    run = driver(shared, config(small_teachers, share=True), seconds_per_pass=0.2)
    wait_for(lambda: len(vectors(shared)) >= 4, 120, "four files")
    (process,) = workers(run.pid, "ray::Teachers_a_b")
    assert not workers(run.pid, "ray::Teacher_")
    os.kill(process.pid, signal.SIGKILL)
    assert run.wait(180) == 0, run.log.read_text()
    assert vectors(shared) == vectors(apart)
    assert len(vectors(shared)) == 24
    (report,) = Path(shared.uri).glob("runs/*/report.json")
    notes = json.dumps(json.loads(report.read_text()))
    assert "a process of teacher a was replaced" in notes
    assert "a process of teacher b was replaced" in notes
