import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="session")
def small_teachers(make_clip_folder) -> dict[str, Path]:
    """Two real teachers of different widths and geometries."""
    return {"a": make_clip_folder("a", dim=16), "b": make_clip_folder("b", dim=24, seed=1, size=48)}


@pytest.fixture
def driver(tmp_path):
    """Start extract in a process of its own, with a Ray of its own; whatever is left is killed at the end.

    Returns a function (lake, config, seconds per pass) -> the process; passes are counted in ``passes.txt``.
    """
    running: list[subprocess.Popen] = []

    def start(lake, config, seconds_per_pass: float = 0.0, gpus: int | None = None) -> subprocess.Popen:
        number = len(running)
        file, log = tmp_path / f"config-{number}.json", tmp_path / f"driver-{number}.log"
        file.write_text(json.dumps(config.model_dump(mode="json")))
        root = SUPPORT.parents[1]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(root), os.environ.get("PYTHONPATH", "")]),
            "PASSES_FILE": str(tmp_path / "passes.txt"),
            "SECONDS_PER_PASS": str(seconds_per_pass),
        }
        command = [sys.executable, str(SUPPORT / "run_extract.py"), lake.uri, str(file)]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*command, *([] if gpus is None else [str(gpus)])], env=environment, stdout=stream, stderr=stream
            )
        process.log = log  # type: ignore[attr-defined]
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()
