"""Extraction that loses one of its machines, as a cluster of borrowed ones does."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.lake import Lake
from extractor.config import ExtractConfig, HardwareConfig
from extractor.placement import TeacherPlacement

pytestmark = pytest.mark.ray

SUPPORT = Path(__file__).resolve().parents[1] / "support"
SHARDS = 10
# Ray forgets here how prepared tables were made, as it does in a run so long that it would cost too much memory to
# remember; those that went with the machine are lost for good then.
FORGETFUL = {"max_lineage_bytes": 1}


@pytest.fixture
def lake(make_lake, tmp_path) -> Lake:
    # Ray keeps what is smaller than 100 KB with the driver, which stays; a shard of 64 small pictures is larger.
    return make_lake(tmp_path / "lake", rows=64 * SHARDS, shard_rows=64)


@pytest.fixture
def broken(make_clip_folder, tmp_path) -> Path:
    """A teacher whose picture vectors are no numbers: its first shard is rejected, and that is its end."""
    folder = Path(shutil.copytree(make_clip_folder("whole", seed=1), tmp_path / "broken"))
    file = str(folder / "open_clip_model.safetensors")
    state = load_file(file)
    save_file({**state, "visual.proj": torch.full_like(state["visual.proj"], float("nan"))}, file)
    return folder


def lose_a_machine(lake: Lake, config: ExtractConfig, folder: Path, system: dict[str, int]) -> tuple[int, str, dict]:
    """Extract while a machine is lost; the exit status, what was said, and how often the account notes what."""
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "system.json").write_text(json.dumps(system))
    command = [sys.executable, str(SUPPORT / "losing_extraction.py"), lake.uri]
    command += [str(folder / "config.json"), str(folder / "system.json")]
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")])
    # A cluster leaves its address where every other Ray of this machine would find it, so it gets a place of its own.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as own,
        (folder / "said").open("w") as stream,
    ):
        environment = {**os.environ, "RAY_TMPDIR": own, "PYTHONPATH": path}
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        try:
            process.wait(240)
        finally:
            if process.poll() is None:
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    one.kill()
    said = (folder / "said").read_text()
    assert "the machine is lost" in said, said[-3000:]
    (run,) = lake.storage.list_folders("runs")
    return process.returncode, said, lake.storage.read_json(f"runs/{run}/report.json")["notes"]["counts"]


def insist_on_everything(lake: Lake, teacher: str) -> None:
    assert lake.shards(f"features/teacher={teacher}") == list(range(SHARDS))
    for shard in lake.shards():
        features = lake.read_features(teacher, shard)
        assert features["sample_id"].equals(lake.read_pairs(shard)["sample_id"])
        assert features["image_embedding"].null_count == 0


def test_an_extraction_ends_well_when_a_machine_is_replaced(lake, make_clip_folder, tmp_path):
    hardware = HardwareConfig(actors_per_teacher=3)  # wherever Ray puts them
    config = ExtractConfig(teachers=(f"good={make_clip_folder('good')}",), micro_batch=64, hardware=hardware)
    status, said, _ = lose_a_machine(lake, config, tmp_path, {})
    assert status == 0, said[-3000:]
    insist_on_everything(lake, "good")


def test_what_was_lost_is_prepared_again_though_a_teacher_had_failed_before(lake, make_clip_folder, broken, tmp_path):
    stays = TeacherPlacement(resources={"seat": 1})
    hardware = HardwareConfig(teachers={"good": stays, "broken": stays}, shards_in_flight=SHARDS, share_process=False)
    references = (f"good={make_clip_folder('good')}", f"broken={broken}")
    config = ExtractConfig(teachers=references, micro_batch=64, hardware=hardware)
    status, said, notes = lose_a_machine(lake, config, tmp_path, FORGETFUL)
    assert notes.get("prepared again", 0) >= 1, said[-3000:]
    # The second round's only complaint is of the teacher that had failed in the first.
    assert status == 1, said[-3000:]
    assert re.search(
        r"mmkd: .*Teacher 'broken' stopped: (\d+) of \1 rows were rejected \(\1 x image embedding not", said
    )
    assert said.count("stopped: ") == 1
    assert lake.shards("features/teacher=broken") == []
    insist_on_everything(lake, "good")
