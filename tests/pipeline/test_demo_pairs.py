"""The demo on pictures of one's own: real ones, with no teachers at hand."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.ray

SMALL = {
    "image_size": 32,
    "teacher_pictures": 48,
    "teacher_steps": 20,
    "teacher_batch": 16,
    "student_batch": 32,
    "stage1_epochs": 1,
    "stage2_epochs": 1,
    "min_skill": 0.0,
}


def test_the_demo_runs_on_ones_own_pairs(shared_data, tmp_path):
    rows = []
    for name in ("cap-covid-cxr", "cls-busi-us"):
        lines = (shared_data / name / "pairs.jsonl").read_text().splitlines()[::5]
        rows += [{**row, "image": str(shared_data / name / row["image"])} for row in map(json.loads, lines)]
    source = tmp_path / "mine.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "cluster.cli", "demo", "--lake", "mine", "--pairs", str(source), *settings]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "training a specialist for each modality found" in done.stderr
    assert "Zero-shot accuracy" in done.stdout
    scores = pq.read_table(next((tmp_path / "mine" / "scores").glob("*.parquet")))
    kinds = dict(zip(scores["model"].to_pylist(), scores["model_kind"].to_pylist(), strict=True))
    assert kinds["distilled"] == kinds["stage-1"] == "student"
    assert list(kinds.values()).count("teacher") == 2
    assert (tmp_path / "mine" / "report.html").is_file()
