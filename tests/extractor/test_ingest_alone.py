"""Ingest in a process of its own, without Ray, as a laptop runs it: killed, interrupted, and run again."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from common.lake import create_lake, open_lake
from common.lease import hold

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from common import processes
from common.logs import configure_logs
from extractor.config import IngestConfig
from extractor.ingest import ingest
from extractor.sources import lines

configure_logs()
processes.FEW_CORES = 1 << 20
lines.ROWS_PER_PART = 30
ingest(sys.argv[1], sys.argv[2], IngestConfig(shard_rows=50, lease_seconds=float(sys.argv[3])))
assert "ray" not in sys.modules
"""
ROWS = 600


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A table of pictures; one in a hundred is cut off."""
    folder, chance = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    lines = []
    for row in range(ROWS):
        stream = io.BytesIO()
        Image.fromarray(chance.integers(0, 255, (96, 96, 3), np.uint8)).save(stream, "PNG")
        data = stream.getvalue()
        (folder / f"{row}.png").write_bytes(data if row % 100 else data[:5000])
        lines.append(json.dumps({"image": f"{row}.png", "caption": f"picture {row}"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def start(source, lake, lease_seconds=60) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(source), str(lake), str(lease_seconds)]
    # A session of its own gets the same default answer to Ctrl-C as a shell gives.
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_parts(process, lake, count) -> list[psutil.Process]:
    """Wait until so many parts are staged; the children by then."""
    deadline = time.monotonic() + 60
    while len(list(lake.glob("ingest/*/part-*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return psutil.Process(process.pid).children(recursive=True)


def rows_of(lake) -> list[dict]:
    opened = open_lake(str(lake))
    return [row for index in opened.shards() for row in opened.read_pairs(index).to_pylist()]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    lake = tmp_path_factory.mktemp("whole") / "lake"
    process = start(source, lake)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    return rows_of(lake)


def test_rows_come_in_source_order(whole):
    assert [row["captions"] for row in whole] == [[f"picture {row}"] for row in range(ROWS) if row % 100]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whatever_ends_it_no_process_stays_and_the_next_run_goes_on(source, whole, tmp_path, number):
    lake = tmp_path / "lake"
    process = start(source, lake)
    children = wait_for_parts(process, lake, 3)
    os.kill(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not list(lake.glob("ingests/*.json")), "it was ended too late to prove anything"
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    again = start(source, lake)
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0, said
    assert "going on after" in said
    assert rows_of(lake) == whole


def other_source(source, tmp_path) -> Path:
    """The same pictures with other captions."""
    other = tmp_path / "other"
    shutil.copytree(source.parent, other)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    rows = [{**line, "caption": f"another {line['caption']}"} for line in lines]
    (other / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return other / "pairs.jsonl"


def test_while_an_ingest_is_at_work_another_is_told_whose_turn_it_is(source, tmp_path):
    lake = tmp_path / "lake"
    with hold(create_lake(str(lake), 50).storage, "ingest", "ingest-of-a-colleague"):
        process = start(source, lake)
        said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "ingest is being written by run 'ingest-of-a-colleague'" in said
    assert not list(lake.glob("ingest*/*"))


def test_of_two_ingests_at_once_no_row_is_lost(source, tmp_path):
    lake, other = tmp_path / "lake", other_source(source, tmp_path)
    for attempt in range(2):
        both = [start(one, lake) for one in (source, other)]
        said = [process.communicate(timeout=120)[1] for process in both]
        # Where the first is not done when the second comes, the second ends with a sentence and is run again.
        refused = [words for process, words in zip(both, said, strict=True) if process.returncode]
        assert len(refused) <= 1 - attempt
        assert all("ingest is being written by run 'ingest-" in words for words in refused)
    captions = {row["captions"][0] for row in rows_of(lake)}
    assert captions == {f"{words}picture {row}" for row in range(ROWS) if row % 100 for words in ("", "another ")}
    manifests = [json.loads(file.read_text()) for file in lake.glob("ingests/*.json")]
    claimed = [index for one in manifests for index in range(one["first_shard"], one["first_shard"] + one["shards"])]
    assert sorted(claimed) == open_lake(str(lake)).shards()


def test_an_ingest_that_was_paused_until_another_took_over_writes_no_more(source, tmp_path):
    lake = tmp_path / "lake"
    first = start(source, lake, lease_seconds=1)
    wait_for_parts(first, lake, 1)
    paused = psutil.Process(first.pid)
    paused.suspend()
    second = start(source, lake)
    said = second.communicate(timeout=120)[1]
    assert second.returncode == 0, said
    assert "which gives no sign of life; taken over" in said
    whole = {file.name: file.stat().st_mtime_ns for file in lake.glob("pairs/*")}
    paused.resume()
    said = first.communicate(timeout=120)[1]
    assert {file.name: file.stat().st_mtime_ns for file in lake.glob("pairs/*")} == whole
    assert first.returncode != 0, said
