import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict

import numpy as np
import pytest

from common.lake import Lake, create_lake
from extractor.account.host import object_store, parse_gpu_use
from extractor.account.report import FINISHED, RUNNING, RunReport, close_killed
from extractor.account.tally import MAX_BINS, RECENT_FILES, RecentRate, Timeline
from extractor.events import FileDone

SHARDS, ROWS = 12, 100
STARTED = 1_800_000_000.0


class Clock:
    """A clock that is set by hand, so that every figure is exact."""

    def __init__(self, now: float = STARTED) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def made_events(seed: int = 0) -> list[FileDone]:
    """A run of two teachers on two GPUs; ``b`` is the slow one, and its process is replaced half way."""
    draw = np.random.default_rng(seed)
    events = []
    for shard in range(SHARDS):
        prepare_seconds = float(draw.uniform(1, 2))
        for teacher, seconds in (("a", 3.0), ("b", 8.0)):
            process = 11 if teacher == "a" else 12 if shard < 6 else 13
            begin = STARTED + 20 + shard * 9
            bad = int(draw.integers(0, 3))
            events.append(
                FileDone(
                    shard=shard,
                    teacher=teacher,
                    rows=ROWS,
                    bytes=int(draw.integers(1000, 2000)),
                    forwards=4,
                    model_seconds=seconds,
                    write_seconds=float(draw.uniform(0.1, 0.2)),
                    prepare_seconds=prepare_seconds,
                    micro_batch=32 if (teacher, shard) != ("b", 7) else 16,
                    device=f"10.0.0.7/cuda:{'ab'.index(teacher)}/{process}",
                    started_at=begin,
                    finished_at=begin + seconds,
                    rejects={"image not decodable": bad} if bad else {},
                )
            )
    return sorted(events, key=lambda event: event.finished_at)


def make_report(lake: Lake, clock: Clock, run: str = "run-1", **more) -> RunReport:
    planned, rows = {"a": SHARDS, "b": SHARDS}, {"a": SHARDS * ROWS, "b": SHARDS * ROWS}
    return RunReport(lake, run, planned, rows, 5, more.pop("settings", {"micro_batch": 32}), clock=clock, **more)


def feed(report: RunReport, clock: Clock, events: list[FileDone]) -> None:
    for event in events:
        clock.now = event.finished_at
        report.add(event)


@pytest.fixture
def lake(tmp_path) -> Lake:
    return create_lake(str(tmp_path / "lake"), 8)


def test_the_figures_are_those_of_the_events_added_up_apart(lake):
    clock = Clock()
    expected = {"prepare": 400.0, "a": 30.0}
    report = make_report(lake, clock, workers={"prepare": 4}, expected=expected)
    events = made_events()
    feed(report, clock, events)
    figures = json.loads(json.dumps(report.figures(RUNNING)))
    wall = clock.now - STARTED

    assert figures["files"] == {"planned": 24, "done": 24, "skipped": 5, "failed": 0}
    assert figures["rows"] == {"planned": 2400, "done": 2400}
    assert figures["bytes"] == sum(event.bytes for event in events)
    assert figures["rows_per_second"] == pytest.approx(2400 / wall)
    assert figures["first_file_seconds"] == pytest.approx(23)
    assert figures["rejects"] == {"image not decodable": sum(sum(event.rejects.values()) for event in events)}

    prepare, b = figures["stages"]["prepare"], figures["stages"]["teacher=b"]
    seconds = {event.shard: event.prepare_seconds for event in events}
    assert prepare["busy_seconds"] == pytest.approx(sum(seconds.values()))
    assert prepare["busy_share"] == pytest.approx(sum(seconds.values()) / (wall * 4))
    assert (prepare["rows"], figures["rows_per_core_second"]) == (1200, pytest.approx(1200 / sum(seconds.values())))
    assert prepare["of_expected"] == pytest.approx(4 * 1200 / sum(seconds.values()) / 400)
    # Two processes, one after the other, are one worker.
    assert (b["workers"], b["busy_seconds"]) == (1, 96)
    assert (b["capacity"], b["expected"], b["of_expected"]) == (pytest.approx(12.5), None, None)
    assert b["busy_share"] == pytest.approx(96 / wall)
    assert figures["stages"]["teacher=a"]["of_expected"] == pytest.approx(100 / 3 / 30)
    shares = {name: stage["busy_share"] for name, stage in figures["stages"].items() if stage["busy_share"]}
    assert figures["bottleneck"] == max(shares, key=shares.get) == "teacher=b"

    assert figures["devices"]["10.0.0.7/cuda:1"]["busy_share"] == pytest.approx(96 / wall)
    assert figures["devices"]["10.0.0.7/cuda:0"]["rows_per_second"] == pytest.approx(1200 / wall)
    assert figures["teachers"]["b"]["smallest_micro_batch"] == 16

    bins = defaultdict(int)
    for event in events:
        bins[event.teacher, int((event.finished_at - STARTED) / figures["timeline"]["seconds"])] += event.rows
    for teacher, series in figures["timeline"]["rows"].items():
        assert series == [bins[teacher, place] for place in range(len(series))]
        assert sum(series) == 1200


def test_what_is_not_known_is_null_and_not_zero(lake):
    clock = Clock()
    report = make_report(lake, clock)
    clock.now += 3
    figures = report.figures(RUNNING)
    assert figures["rows_per_second"] is figures["first_file_seconds"] is figures["bottleneck"] is None
    assert figures["rows_per_core_second"] is None
    unknown = ("busy_seconds", "busy_share", "workers", "rows_per_second", "capacity", "expected", "seconds_left")
    assert all(stage[name] is None for stage in figures["stages"].values() for name in unknown)
    assert not any("gpu_percent" in sample for sample in figures["host"])
    # Without the number of workers nobody knows how busy they are.
    feed(report, clock, made_events())
    assert report.figures(RUNNING)["stages"]["prepare"]["busy_share"] is None
    assert report.figures(RUNNING)["stages"]["prepare"]["busy_seconds"] > 0


def test_a_file_that_was_made_twice_is_work_but_no_rows(lake):
    clock = Clock()
    report = make_report(lake, clock)
    events = made_events()
    feed(report, clock, [*events, events[-1]])
    figures = report.figures(RUNNING)
    assert (figures["files"]["done"], figures["rows"]["done"]) == (24, 2400)
    assert figures["stages"]["teacher=b"]["busy_seconds"] == 104
    assert figures["stages"]["teacher=b"]["rows_per_worker_second"] == pytest.approx(1300 / 104)
    assert figures["notes"]["counts"] == {"repeated file": 1}


def test_failures_and_notes_are_counted_and_bounded(lake):
    clock = Clock()
    report = make_report(lake, clock)
    report.add(FileDone(shard=3, teacher="a", error="weights are damaged"))
    for number in range(250):
        report.note("restart", f"number {number} " + "x" * 5000)
    figures = report.figures(RUNNING)
    assert figures["files"]["failed"] == 1
    assert figures["notes"]["counts"] == {"failed file": 1, "restart": 250}
    assert [note["text"].split()[1] for note in figures["notes"]["last"]] == [str(n) for n in range(150, 250)]
    assert len(json.dumps(figures)) < 100_000


def test_looking_at_the_machine_is_bounded_over_a_long_run(lake):
    clock = Clock()
    report = make_report(lake, clock)
    for _ in range(800):
        clock.now += 5
        report.sample_host()
    times = [sample.at for sample in report.samples]
    assert 100 < len(times) <= 361
    assert times == sorted(times)
    assert times[-1] > 3900
    assert report.last_sample.at == 4000
    assert report.last_sample.rss_bytes > 1 << 20
    assert 0 <= report.last_sample.cpu_percent <= 100
    # This process has not started Ray, so nothing is known of an object store.
    assert report.last_sample.object_store_bytes is None
    assert object_store() == (None, None)


def test_the_timeline_is_bounded_and_loses_no_row():
    timeline = Timeline(1.0)
    for second in range(10_000):
        timeline.add(second + 0.5, "a", 2)
    assert timeline.seconds == 32
    assert len(timeline.series("a")) <= MAX_BINS
    assert set(timeline.series("a")[:-1]) == {64}
    assert sum(timeline.series("a")) == 20_000


def test_the_recent_rate_forgets_the_start_and_falls_when_nothing_comes():
    rate = RecentRate(0.0)
    assert rate.at(10) is None
    for second in range(100, 400):
        rate.add(second, 1 if second < 300 else 50)
    assert rate.at(399) == pytest.approx(50)
    assert rate.at(489) < 50 / 2
    slow = RecentRate(0.0)
    for hour in range(1, 9):
        slow.add(hour * 3600.0, 36)
    assert slow.at(8 * 3600) == pytest.approx(0.01)
    assert len(slow.seen) == RECENT_FILES


@pytest.mark.parametrize(
    ("answer", "found"),
    [("50, 1024\n70, 2048\n", (60.0, 3072 << 20)), ("[N/A], 5\n", None), ("", None), ("no devices found", None)],
)
def test_what_nvidia_smi_says(answer, found):
    assert parse_gpu_use(answer) == found


def read_page(lake: Lake, run: str) -> str:
    return lake.storage.read_bytes(f"runs/{run}/report.html").decode()


def test_a_finished_run_leaves_three_files_and_a_page_of_its_own(lake):
    clock = Clock()
    report = make_report(lake, clock, workers={"prepare": 4, "write": 2})
    feed(report, clock, made_events())
    report.sample_host()
    report.note("restart", "a | pipe, <b>a tag</b> & more")
    report.save(FINISHED, "all files are there")
    assert lake.storage.list_files("runs/run-1") == ["report.html", "report.json", "report.md"]
    assert lake.storage.read_json("runs/run-1/report.json") == report.figures(FINISHED, "all files are there")
    page = read_page(lake, "run-1")
    assert not re.search(r"<script|<link|@import|url\(|(src|href)\s*=", page)
    assert "&lt;b&gt;a tag&lt;/b&gt;" in page
    assert "<b>a tag" not in page
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert labels[:2] == ["Rows per second by teacher", "Busy share by stage"]
    assert "Rows without a vector by reason" in labels
    assert page.count("<polyline") >= 2
    written = lake.storage.read_bytes("runs/run-1/report.md").decode()
    assert written.startswith("# Extraction run-1\n\nFinished: 24 of 24 files and 2,400 of 2,400 rows in 2 min 07 s")
    assert "The bottleneck is teacher=b, busy 76 % of the time. all files are there" in written
    assert re.search(r"^\| \*\*teacher=b\*\* \| \*\*1,200\*\* \|", written, re.MULTILINE)


def test_a_running_report_has_no_page_and_never_lands_on_the_last_one(lake):
    clock = Clock()
    report = make_report(lake, clock)
    report.save(RUNNING)
    report.save(FINISHED)
    report.save(RUNNING)
    time.sleep(0.2)
    assert lake.storage.read_json("runs/run-1/report.json")["status"] == FINISHED
    assert close_killed(lake, lambda run: False) == []


def test_a_page_of_a_run_that_did_nothing_is_whole(lake):
    report = make_report(lake, Clock())
    report.save("failed", "Teacher 'a' did not start")
    page = read_page(lake, "run-1")
    assert "Teacher &#x27;a&#x27; did not start" in page
    assert page.rstrip().endswith("</html>")


def test_no_secret_of_an_address_is_written(lake):
    clock = Clock()
    settings = {"store": "https://user:canary@host/x?token=canary", "teachers": ["t=s3://key:canary@bucket/t"]}
    report = make_report(lake, clock, settings=settings)
    report.note("restart", "could not read https://h/x?sig=canary")
    report.save("failed", "see s3://k:canary@bucket/lake")
    for name in lake.storage.list_files("runs/run-1"):
        assert b"canary" not in lake.storage.read_bytes(f"runs/run-1/{name}"), name
    assert lake.storage.read_json("runs/run-1/report.json")["settings"]["store"] == "https://host/x"


def test_a_storage_that_fails_is_a_line_in_the_log(lake, tmp_path, caplog):
    (tmp_path / "lake" / "runs").write_text("a file where a folder should be")
    make_report(lake, Clock()).save(FINISHED)
    assert "report could not be written" in caplog.text


def test_the_report_lies_on_object_storage_too(s3):
    lake = create_lake(f"{s3}/lake", 8)
    clock = Clock()
    report = make_report(lake, clock)
    feed(report, clock, made_events())
    report.save(FINISHED)
    assert lake.storage.list_files("runs/run-1") == ["report.html", "report.json", "report.md"]


KILLED_RUN = """
import sys, time
from common.lake import open_lake
from extractor.events import FileDone
from extractor.account.report import RunReport
report = RunReport(open_lake(sys.argv[1], need_pairs=False), "killed-run", {"a": 4}, {"a": 40}, 0, {})
report.add(FileDone(shard=0, teacher="a", rows=10, model_seconds=0.1, device="h/cpu/1", finished_at=time.time()))
report.save("running")
print("saved", flush=True)
time.sleep(600)
"""


def test_a_killed_run_is_closed_by_the_next_with_the_last_figures_known(lake):
    child = subprocess.Popen([sys.executable, "-c", KILLED_RUN, lake.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "saved\n"
        deadline = time.monotonic() + 30
        while not lake.storage.exists("runs/killed-run/report.md") and time.monotonic() < deadline:
            time.sleep(0.05)
        lake.storage.write_json("runs/training/result.json", {"status": "running"})
        lake.storage.write_bytes("runs/torn/report.json", b'{"status": "runn')
        assert close_killed(lake, lambda run: run == "killed-run") == []
        assert lake.storage.read_json("runs/killed-run/report.json")["status"] == RUNNING
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    last = lake.storage.read_json("runs/killed-run/report.json")
    assert close_killed(lake, lambda run: False) == ["killed-run"]
    closed = lake.storage.read_json("runs/killed-run/report.json")
    assert (closed["status"], closed["ended_at"]) == ("killed", last["updated_at"])
    assert closed["rows"] == last["rows"] == {"planned": 40, "done": 10}
    assert "ended without a word" in read_page(lake, "killed-run")
    assert close_killed(lake, lambda run: False) == []
