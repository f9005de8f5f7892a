import json

import pytest

from extractor.config import ExtractConfig, HardwareConfig, ViewsConfig
from extractor.placement import TeacherPlacement
from extractor.planning.measure import Hardware, ShardShape, TowerRates
from extractor.planning.rates import CACHE_FILE, Rates, find_rates, run_here, slowest
from extractor.planning.survey import survey_lake


@pytest.fixture(scope="module")
def folders(make_clip_folder):
    return {"a": make_clip_folder("a", dim=16), "other": make_clip_folder("a", dim=16, seed=1)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # these tests are about a machine without GPUs
    return tmp_path / "cache" / CACHE_FILE


@pytest.fixture
def lake(make_lake, tmp_path):
    return make_lake(tmp_path / "lake", rows=6, shard_rows=4)


class Recording:
    """Measures here, and remembers what it was asked to measure."""

    def __init__(self):
        self.measured = []

    def __call__(self, task, *arguments):
        if task.__name__ == "measure":
            _, teachers, decode, _ = arguments
            self.measured.append((teachers, decode))
        return run_here(task, *arguments)


def look_up(lake, folder, threads=1, with_decode=True, fresh=False, **settings):
    """Find the rates of one teacher; returns them and what had to be measured for it."""
    config = ExtractConfig(teachers=(f"a={folder}",), **{"micro_batch": 4, **settings})
    run = Recording()
    rates = find_rates(survey_lake(lake.uri, config).measurement, ["a"], with_decode, run, threads, fresh)
    return rates, run.measured


EVERYTHING = [(("a",), True)]
ONLY_TEACHER = [(("a",), False)]


def test_what_was_measured_is_remembered_and_measured_again_only_when_asked(lake, folders, cache):
    rates, measured = look_up(lake, folders["a"])
    assert measured == EVERYTHING
    assert rates.towers["a"].image > 0
    assert rates.towers["a"].text > 0
    assert rates.decode > 0
    assert look_up(lake, folders["a"]) == (rates, [])
    again, measured = look_up(lake, folders["a"], fresh=True)
    assert measured == EVERYTHING
    assert look_up(lake, folders["a"]) == (again, [])
    entries = json.loads(cache.read_text()).values()
    assert {entry["what"] for entry in entries} == {"a", "decode"}


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        ({"folder": "other"}, ONLY_TEACHER),  # other weights of the same shape, under the same name
        ({"micro_batch": 3}, ONLY_TEACHER),
        ({"threads": 2}, ONLY_TEACHER),
        ({"hardware": HardwareConfig(teachers={"a": TeacherPlacement(micro_batch=2)})}, ONLY_TEACHER),
        ({"views": ViewsConfig(count=2)}, [((), True)]),
        ({"decode": "scaled"}, [((), True)]),
        ({"towers": "image"}, EVERYTHING),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_rate_holds_for_what_it_was_measured_with(lake, folders, cache, monkeypatch, change, measured):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    look_up(lake, folders["a"])
    settings = {name: value for name, value in change.items() if name != "folder"}
    assert look_up(lake, folders[change.get("folder", "a")], **settings)[1] == measured


def test_other_pictures_are_decoded_anew_but_the_teacher_is_known(make_lake, tmp_path, lake, folders, cache):
    look_up(lake, folders["a"])
    grown = make_lake(tmp_path / "grown", rows=20, shard_rows=20)
    assert look_up(grown, folders["a"])[1] == [((), True)]
    same = make_lake(tmp_path / "same", rows=6, shard_rows=4)
    assert look_up(same, folders["a"])[1] == []


@pytest.mark.parametrize("content", ["{", "[]", '{"key": {"what": "a", "speed": 3}}', ""])
def test_a_torn_cache_is_written_anew_with_a_line_in_the_log(lake, folders, cache, caplog, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    rates, measured = look_up(lake, folders["a"])
    assert measured == EVERYTHING
    assert "is not readable and will be written anew" in caplog.text
    assert look_up(lake, folders["a"]) == (rates, [])


def test_a_tower_that_is_not_used_has_no_rate(lake, folders, cache):
    assert look_up(lake, folders["a"], towers="image")[0].towers["a"].text is None
    assert look_up(lake, folders["a"], towers="text")[0].towers["a"].image is None


def test_what_is_not_wanted_is_not_measured(lake, folders, cache):
    rates, measured = look_up(lake, folders["a"], with_decode=False)
    assert (measured, rates.decode) == (ONLY_TEACHER, None)


def test_measuring_leaves_the_lake_and_torch_as_they_were(lake, folders, cache):
    import torch

    threads = torch.get_num_threads()
    look_up(lake, folders["a"], threads=1)
    assert torch.get_num_threads() == threads
    assert lake.teachers() == []


def test_pairs_a_second_follow_from_the_towers_and_the_shard():
    both = TowerRates(image=100, text=400)
    # 100 pictures are 2 micro-batches of 64: 1.28 s; 30 distinct captions are one: 0.16 s.
    assert ShardShape(100, 100, 30).pairs_per_second(both, 64) == pytest.approx(100 / (1.28 + 0.16))
    assert ShardShape(100, 300, 30).pairs_per_second(TowerRates(image=100), 64) == pytest.approx(100 / 3.2)


def test_a_mixed_cluster_counts_as_its_slowest():
    fast = Rates(Hardware("cpu", "H100"), {"a": TowerRates(image=9, text=4)}, 50)
    slow = Rates(Hardware("cpu", "T4"), {"a": TowerRates(image=3, text=5)}, 60)
    found = slowest([fast, slow])
    assert (found.towers["a"].image, found.towers["a"].text, found.decode) == (3, 4, 50)
    assert found.hardware.actor == "H100 and T4"
