"""Real pairs through every step, on a local folder and on object storage, in a process of its own with its own Ray."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

STEPS = """
import json, sys
from cluster.session import ray_session
from common.logs import configure_logs
lake, data, folders = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
configure_logs()
with ray_session():
    from extractor.config import ExtractConfig, IngestConfig
    from extractor.ingest import ingest
    from extractor.pipeline import extract
    from trainer.config import EvaluateConfig, SelectConfig, Stage1Config, Stage2Config
    from trainer.evaluation.models import find_model
    from trainer.evaluation.run import evaluate
    from trainer.selection.select import select
    from trainer.stage1 import train_stage1
    from trainer.stage2 import train_stage2

    figures = IngestConfig(shard_rows=256, columns={"image": "imgpath", "caption": "txt"}, test_fraction=0.25)
    first = ingest(f"{data}/captions-mixed/pairs.jsonl", lake, IngestConfig(shard_rows=256))
    second = ingest(f"{data}/mmkd-demo/meta.jsonl", lake, figures)
    teachers = tuple(f"{name}={folder}" for name, folder in folders.items() if name != "student")
    extracted = extract(lake, ExtractConfig(teachers=teachers, micro_batch=32))
    select(lake, SelectConfig(min_skill=0.0))
    common = {
        "optim": {"warmup_steps": 2},
        "data": {"batch_size": 64},
        "scale": {"checkpoint_every": 5, "workers": 2 if "://" in lake else 1, "cpus_per_worker": 0.5},
        "epochs": 1,
    }
    one = train_stage1(lake, "s1", Stage1Config(model={"architecture": folders["student"]}, **common))
    two = train_stage2(lake, "s2", one.checkpoint, Stage2Config(**common))
    models = [find_model(reference, {}) for reference in (*teachers, f"student={two.checkpoint}")]
    scores = evaluate(lake, models, EvaluateConfig(tasks=("retrieval",), bootstraps=50)).scores
    result = {
        "input": first.input + second.input, "pairs": first.pairs + second.pairs,
        "files": extracted.shards, "rejects": dict(extracted.rejects), "steps": [one.steps, two.steps],
        "terms": two.metrics, "models": sorted(set(scores["model"].to_pylist())), "scores": scores.num_rows,
    }
print("RESULT " + json.dumps(result, default=str))
"""


@pytest.mark.parametrize("where", ["local", "s3"])
def test_real_pairs_through_every_step(where, request, tmp_path, shared_data, make_clip_folder, make_hf_clip_folder):
    uri = f"{request.getfixturevalue('s3')}/lakes/real pairs" if where == "s3" else str(tmp_path / "lake")
    folders = {
        "a": str(make_clip_folder("a", dim=16)),
        "wide": str(make_clip_folder("wide", dim=32, size=48)),
        "hf": str(make_hf_clip_folder("hf", dim=24)),
        "student": str(make_clip_folder("student", dim=24, seed=5)),
    }
    command = [sys.executable, "-c", STEPS, uri, str(shared_data), json.dumps(folders)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    result = json.loads(done.stdout[done.stdout.index("RESULT ") + 7 :])
    listed = [shared_data / "captions-mixed" / "pairs.jsonl", shared_data / "mmkd-demo" / "meta.jsonl"]
    assert result["input"] == sum(len(path.read_text().splitlines()) for path in listed)
    assert result["pairs"] > 800
    assert result["files"] == 3 * (-(-(result["pairs"] - 8) // 256) + 1)
    assert result["rejects"] == {}
    assert all(steps > 5 for steps in result["steps"])
    assert result["models"] == ["a", "hf", "student", "wide"]
    assert "test-secret-canary" not in done.stdout + done.stderr
    if where == "s3":
        assert_no_secret_in_the_bucket(uri)


def assert_no_secret_in_the_bucket(uri: str) -> None:
    import fsspec

    fs, root = fsspec.core.url_to_fs(uri)
    files = fs.find(root)
    assert any(name.endswith("/checkpoint.json") for name in files)
    assert any("features/teacher=hf/shard-" in name for name in files)
    for name in files:
        assert b"test-secret-canary" not in fs.cat_file(name), name
