"""Who sits on which GPU, what more of them buy, and what a lost machine costs: on logical GPUs."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from extractor.config import ExtractConfig, HardwareConfig

pytestmark = pytest.mark.ray
SUPPORT = Path(__file__).resolve().parents[1] / "support"


def run_scenario(name: str, lake, config: ExtractConfig, tmp_path: Path, seconds_per_shard: float = 0.0) -> list[dict]:
    """Run a scenario in a process of its own; what its teachers noted."""
    file, log = tmp_path / "config.json", tmp_path / "log.jsonl"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    log.touch()
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])
    ended = subprocess.run(
        [sys.executable, str(SUPPORT / "run_scenario.py"), name, lake.uri, str(file), str(log)],
        env={**os.environ, "PYTHONPATH": path, "SECONDS_PER_SHARD": str(seconds_per_shard)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def single_machine(make_lake, small_teachers, tmp_path_factory) -> list[dict]:
    """What nine teachers, and then a waiting one with 1, 2 and 8 actors, noted on a machine of nine logical GPUs."""
    folder = tmp_path_factory.mktemp("placement")
    lake = make_lake(folder / "lake", rows=8, shard_rows=2, captions=1)
    for actors in (1, 2, 8):
        make_lake(folder / f"lake-{actors}", rows=8 * actors, shard_rows=1, captions=1)
    config = ExtractConfig(
        teachers=tuple(f"t{number}={small_teachers['a']}" for number in range(9)),
        micro_batch=2,
        hardware=HardwareConfig(prepare_tasks=1),
    )
    return run_scenario("single-machine", lake, config, folder)


def test_nine_teachers_hold_nine_gpus_for_the_whole_run_and_load_once(single_machine):
    loads = [note for note in single_machine if note["what"] == "load"]
    assert sorted(note["teacher"] for note in loads) == [f"t{number}" for number in range(9)]  # weights load once each
    assert sorted(note["gpus"] for note in loads) == [[number] for number in range(9)]
    assert all(note["visible"] == str(note["gpus"][0]) for note in loads)
    held = {note["teacher"]: note["gpus"] for note in loads}
    embeds = [note for note in single_machine if note["what"] == "embed"]
    assert len(embeds) == 9 * 4
    assert all(note["gpus"] == held[note["teacher"]] for note in embeds)


def busy_share(notes: list[dict]) -> float:
    """Of the actors' time while all of them were there and there was work for all."""
    spans = defaultdict(list)
    for note in notes:
        spans[note["pid"]].append((note["started"], note["finished"]))
    begin = max(min(start for start, _ in times) for times in spans.values())
    end = min(max(stop for _, stop in times) for times in spans.values())
    assert end > begin, "the actors were never all at work"
    busy = sum(max(0, min(stop, end) - max(start, begin)) for times in spans.values() for start, stop in times)
    return busy / (len(spans) * (end - begin))


@pytest.mark.parametrize("actors", [1, 2, 8])
def test_more_gpus_for_the_teacher_that_bounds_a_run_are_kept_busy(single_machine, actors):
    """Twice the actors, each as busy as before, is twice the rate; the wait is calibrated, so the CPU plays no part."""
    notes = [note for note in single_machine if note["what"] == "wait" and note["actors"] == actors]
    assert len({note["pid"] for note in notes}) == actors
    assert sorted(note["shard"] for note in notes) == list(range(8 * actors))
    assert busy_share(notes) >= 0.9


def test_a_lost_machine_costs_time_and_nothing_else(make_lake, small_teachers, ray_local, tmp_path):
    from extractor.pipeline import extract

    lake = make_lake(tmp_path / "lake", rows=48, shard_rows=4, captions=1)
    twin = make_lake(tmp_path / "twin", rows=48, shard_rows=4, captions=1)
    config = ExtractConfig(teachers=(f"a={small_teachers['a']}",), micro_batch=4)
    notes = run_scenario("lost-node", lake, config, tmp_path, seconds_per_shard=0.5)
    (killed,) = [note for note in notes if note["what"] == "killed"]
    assert 4 <= killed["files"] < 12
    nodes = [note["node"] for note in notes if note["what"] == "embed"]
    assert set(nodes) - {killed["node"]}, "nothing was embedded elsewhere"
    extract(twin.uri, config)
    for index in twin.shards():
        assert lake.read_features("a", index).equals(twin.read_features("a", index))
    (run,) = lake.storage.list_folders("runs")
    assert lake.storage.read_json(f"runs/{run}/report.json")["status"] == "finished"
