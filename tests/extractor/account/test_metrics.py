"""The figures of a run where Prometheus looks for them: the metrics endpoint of a local Ray."""

import re
import time
import urllib.error
import urllib.request

import pytest

from common.lake import create_lake
from extractor.account.metrics import METRICS, Metrics
from extractor.account.report import RunReport
from extractor.events import FileDone

PATIENCE_SECONDS = 60
# Other tests of a session share its Ray, and counters of equal names add up.
TEACHER = "measured-here"


def made_report(folder, metrics: Metrics) -> RunReport:
    lake = create_lake(str(folder / "lake"), 8)
    return RunReport(lake, "run-1", {TEACHER: 5}, {TEACHER: 50}, 0, {}, metrics=metrics)


def file_done(shard: int, **more) -> FileDone:
    return FileDone(shard=shard, teacher=TEACHER, rows=10, bytes=1000, model_seconds=0.5, device="h/cpu/1", **more)


def test_without_ray_nothing_is_made(tmp_path):
    metrics = Metrics()
    report = made_report(tmp_path, metrics)
    report.add(file_done(0, rejects={"image not decodable": 2}))
    report.sample_host()
    assert metrics._made == {}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_prometheus_sees_the_figures_of_the_report(tmp_path):
    import ray

    report = made_report(tmp_path, Metrics())
    report.add(file_done(0, rejects={"a reason of this test": 2}))
    report.add(file_done(1))
    report.add(file_done(1))  # once more: work, but no further file
    report.note("a kind of this test", "actor died")
    report.sample_host()
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = {
        "files": (f'teacher="{TEACHER}"', 2),
        "rows": (f'teacher="{TEACHER}"', 20),
        "bytes": (f'teacher="{TEACHER}"', 2000),
        "model_seconds": (f'teacher="{TEACHER}"', 1.5),
        "rejected_rows": ('reason="a reason of this test"', 2),
        "notes": ('kind="a kind of this test"', 1),
        "rows_left": (f'stage="teacher={TEACHER}"', 30),
    }
    deadline, found = time.monotonic() + PATIENCE_SECONDS, {}
    while found != {name: value for name, (_, value) in wanted.items()} and time.monotonic() < deadline:
        time.sleep(0.5)
        text = scrape(port)
        found = {name: value_of(text, name, tag) for name, (tag, _) in wanted.items()}
    assert found == {name: value for name, (_, value) in wanted.items()}
    assert value_of(text, "object_store_bytes", "") is not None
    assert set(re.findall(r"^ray_(mmkd_extract_\w+?)(?:_total)?\{", text, re.MULTILINE)) <= set(METRICS)


def scrape(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""


def value_of(text: str, name: str, tag: str) -> float | None:
    lines = re.findall(rf"^ray_mmkd_extract_{name}(?:_total)?\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    return next((float(value) for tags, value in lines if tag in tags), None)
