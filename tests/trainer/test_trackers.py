"""What is given to the tools that show trainings: every number once, whatever is done again."""

import struct
import sys
import types

import pytest

from common.errors import TrainError
from common.storage import Storage
from trainer import trackers
from trainer.trackers import EVENTS, check_trackers, open_tracker

ROWS = [
    {"step": step, "epoch": 0, "total": 1.0 / step, "lr": 0.1, "skipped": False, "batch": "x", "at": 1000.0 + step}
    for step in (1, 2, 3, 4)
]


def curves(data: bytes) -> dict[str, list[tuple[int, float, float]]]:
    """Tag -> (step, value, time), read as TensorBoard reads: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float, float]]] = {}
    place = 0
    while place < len(data):
        (length,) = struct.unpack("<Q", data[place : place + 8])
        event = Event.FromString(data[place + 12 : place + 12 + length])
        place += length + 16
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value, event.wall_time))
    return found


def test_tensorboard_gets_every_number_of_every_row_once(tmp_path):
    run = Storage(str(tmp_path / "runs" / "one"))
    tracker = open_tracker("tensorboard", run, "key", "stage 1", {})
    tracker.log(ROWS[:2])
    first = run.read_bytes(EVENTS)
    tracker.log(ROWS)
    tracker.close()
    found = curves(run.read_bytes(EVENTS))
    assert set(found) == {"total", "lr", "skipped"}
    assert [step for step, _, _ in found["total"]] == [1, 2, 3, 4]
    assert [value for _, value, _ in found["total"]] == pytest.approx([1, 0.5, 1 / 3, 0.25])
    assert [time for _, _, time in found["total"]] == [1001, 1002, 1003, 1004]
    # A TensorBoard that has read so far goes on behind: what was there keeps its place.
    assert len(run.read_bytes(EVENTS)) > len(first)
    assert curves(run.read_bytes(EVENTS)[: len(first)]) == curves(first)
    assert len(list((tmp_path / "runs" / "one" / "tensorboard").iterdir())) == 1


def test_a_row_that_was_given_is_not_worked_on_again(tmp_path):
    """Hours into a run the rows of a minute must not cost as much as all before them."""
    run = Storage(str(tmp_path / "runs" / "one"))
    tracker = open_tracker("tensorboard", run, "key", "stage 1", {})
    tracker.log(ROWS[:2])
    first = run.read_bytes(EVENTS)
    tracker.log([{"step": 1}, {"step": 2}, *ROWS[2:]])
    assert run.read_bytes(EVENTS).startswith(first)
    assert [step for step, _, _ in curves(run.read_bytes(EVENTS))["total"]] == [1, 2, 3, 4]


def test_a_missing_package_is_told_before_training(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    check_trackers(("tensorboard",))
    with pytest.raises(TrainError, match=r"scale\.track names wandb, which is not installed.*pip install wandb"):
        check_trackers(("tensorboard", "wandb"))


def test_other_tools_get_each_row_once_and_find_their_run_again(tmp_path, monkeypatch):
    """Neither package is installed here: two stand-ins note how they are called."""
    calls: list[tuple] = []

    class Session:
        def log(self, numbers, step):
            calls.append(("log", step, numbers))

        def finish(self):
            calls.append(("finish",))

    def init(**settings):
        calls.append(("init", settings))
        return Session()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for place in ("here", "moved"):  # the second time after a kill, from a checkpoint at step 2, in a moved lake
        tracker = open_tracker("wandb", Storage(str(tmp_path / place / "runs/one")), "key", "stage 1", {"a": 1})
        tracker.log(ROWS[:2])
        tracker.log(ROWS)
        tracker.close()
    opened = [call[1] for call in calls if call[0] == "init"]
    assert opened[0] == opened[1]
    assert opened[0]["id"] == "key"
    assert (opened[0]["name"], opened[0]["resume"], opened[0]["config"]) == ("one", "allow", {"a": 1})
    steps = [call[1] for call in calls if call[0] == "log"]
    assert steps == [1, 2, 3, 4] * 2
    assert [call for call in calls if call[0] == "log"][0][2] == {"total": 1.0, "lr": 0.1, "skipped": 0.0}


def test_mlflow_goes_on_with_the_run_of_this_key(tmp_path, monkeypatch):
    kept: dict[str, dict] = {}
    current: list[str] = []

    def search_runs(filter_string, output_format):
        assert output_format == "list"
        key = filter_string.split("'")[1]
        runs = [name for name, facts in kept.items() if facts["tags"]["mmkd_run"] == key]
        return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=name)) for name in runs]

    def start_run(run_id=None, run_name=None, tags=None):
        name = run_id or f"id-{len(kept)}"
        kept.setdefault(name, {"name": run_name, "tags": tags, "steps": []})
        current.append(name)

    fake = types.SimpleNamespace(
        set_experiment=lambda name: None,
        search_runs=search_runs,
        start_run=start_run,
        log_dict=lambda value, file: kept[current[-1]].update({file: value}),
        log_metrics=lambda numbers, step: kept[current[-1]]["steps"].append(step),
        end_run=lambda: current.append("none"),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for key, name, rows in (("a", "one", ROWS[:2]), ("b", "two", ROWS[:1]), ("a", "renamed", ROWS)):
        tracker = open_tracker("mlflow", Storage(str(tmp_path / "runs" / name)), key, "stage 2", {"b": 2})
        tracker.log(rows)
        tracker.close()
    assert [(facts["name"], facts["steps"]) for facts in kept.values()] == [("one", [1, 2, 1, 2, 3, 4]), ("two", [1])]
    assert all(facts["run.json"] == {"b": 2} for facts in kept.values())
