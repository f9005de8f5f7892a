import re

import pytest
from changed_pairs import without_captions

from common.errors import ClusterError, ConfigError
from extractor.config import ExtractConfig, HardwareConfig, ViewsConfig
from extractor.partitions import describe_inputs, find_teachers, identity_of
from extractor.placement import TeacherPlacement
from extractor.planning.estimate import Workload, estimate
from extractor.planning.measure import Measurement
from extractor.planning.plan import PlanConfig, make_plan
from extractor.planning.survey import survey_lake
from extractor.sink import write_features
from extractor.teachers import Teacher


@pytest.fixture(scope="module")
def folders(make_clip_folder, make_hf_clip_folder):
    return {
        "a": make_clip_folder("a", dim=16),
        "b": make_clip_folder("b", dim=24, seed=1, size=48),
        "hf": make_hf_clip_folder("hf", dim=24),
    }


@pytest.fixture(autouse=True)
def _own_cache_and_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def asked_for(folders, **settings) -> ExtractConfig:
    teachers = tuple(f"{name}={folder}" for name, folder in folders.items())
    return ExtractConfig(teachers=teachers, **{"micro_batch": 4, **settings})


def embed(lake, config: ExtractConfig, teacher: str, shard: int) -> int:
    """Write one file as a run would; returns its bytes."""
    inputs = describe_inputs(find_teachers(config), config)
    identity = identity_of(inputs[teacher], config)
    prepared = Measurement(lake.uri, inputs, shard, "", config).prepare([teacher]).prepare(shard)
    facts, features = Teacher(inputs[teacher], "cpu", 4).embed(prepared)
    manifest = {"fingerprint": identity}
    lake.storage.write_json(f"manifests/teachers/{teacher}.json", manifest)
    return write_features(lake, teacher, shard, features, facts.rejects, manifest)


GIVEN = {"rates": {"a": 1000, "b": 100, "hf": 400}, "decode_rate": 20}


def test_only_what_is_missing_is_planned_for(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=20, shard_rows=8)  # shards of 8, 8 and 4
    config = asked_for(folders)
    written = embed(lake, config, "a", 1)
    for shard in range(3):
        embed(lake, config, "hf", shard)
    plan = make_plan(survey_lake(lake.uri, config), PlanConfig(gpus=2, cpus=5, **GIVEN))
    assert {item.teacher: (item.files, item.rows) for item in plan.missing} == {"a": (2, 12), "b": (3, 20)}
    assert (plan.shards, plan.pairs, plan.pairs_to_prepare, plan.pictures_to_decode) == (3, 20, 20, 20)
    assert list(plan.placement) == ["a", "b"]
    # a has a file to go by; b is reckoned from two towers of 24 values, and half a further caption a row.
    by_teacher = {item.teacher: item for item in plan.missing}
    assert by_teacher["a"].bytes_per_row == pytest.approx(written / 8)
    assert by_teacher["b"].bytes_per_row == pytest.approx(1.77 * 24 * 2.5)
    assert plan.bytes == round(12 * written / 8) + round(20 * 1.77 * 24 * 2.5)


def test_pictures_without_captions_take_no_text_vectors(make_lake, tmp_path, folders):
    lake = without_captions(make_lake(tmp_path / "lake", rows=8, shard_rows=8), lambda row: row < 4)
    plan = make_plan(
        survey_lake(lake.uri, asked_for({"b": folders["b"]})), PlanConfig(rates={"b": 100}, decode_rate=20)
    )
    # A picture a row; of the four rows with captions, two have two.
    assert plan.missing[0].bytes_per_row == pytest.approx(1.77 * 24 * (1 + 6 / 8))


@pytest.mark.parametrize("towers", ["both", "text"])
def test_rates_are_measured_where_no_picture_has_a_caption(make_lake, tmp_path, folders, towers):
    lake = without_captions(make_lake(tmp_path / "lake", rows=8, shard_rows=8))
    plan = make_plan(survey_lake(lake.uri, asked_for({"a": folders["a"]}, towers=towers)))
    assert plan.expected_rates()["teacher=a"] > 0
    assert plan.seconds > 0


def test_when_nothing_is_missing_nothing_is_measured(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=4, shard_rows=8)
    config = asked_for({"a": folders["a"]})
    embed(lake, config, "a", 0)
    plan = make_plan(survey_lake(lake.uri, config))
    assert (plan.missing, plan.stages, plan.seconds, plan.placement) == ((), (), 0, {})
    assert not (tmp_path / "cache").exists()


def test_the_numbers_are_those_one_reckons_by_hand(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=64, shard_rows=8)
    plan = make_plan(survey_lake(lake.uri, asked_for(folders)), PlanConfig(gpus=6, cpus=31, price=3, **GIVEN))
    # Six GPUs: b (100/s) is the slowest until it has four; 30 cores prepare, one writes.
    stages = {stage.name: (stage.count, stage.rate) for stage in plan.stages}
    assert stages == {
        "prepare": (30, pytest.approx(600)),
        "teacher=a": (1, pytest.approx(1000)),
        "teacher=b": (4, pytest.approx(400)),
        "teacher=hf": (1, pytest.approx(400)),
    }
    assert plan.expected_rates()["teacher=b"] == pytest.approx(400)
    assert plan.pairs_per_second == pytest.approx(400)
    assert plan.seconds == pytest.approx(64 / 400)
    assert plan.bottleneck in ("b", "hf")
    assert {stage.name: stage.busy for stage in plan.stages} == {
        "prepare": pytest.approx(400 / 600),
        "teacher=a": pytest.approx(0.4),
        "teacher=b": pytest.approx(1),
        "teacher=hf": pytest.approx(1),
    }
    assert plan.more_gpus.pairs_per_second == pytest.approx(400)  # the seventh cannot help both
    assert plan.more_cores.pairs_per_second == pytest.approx(400)
    assert plan.cost == pytest.approx(6 * 3 * plan.seconds / 3600)
    assert {name: (one.actors, one.gpus) for name, one in plan.placement.items()} == {
        "a": (1, 1),
        "b": (4, 1),
        "hf": (1, 1),
    }


def test_what_more_hardware_buys(make_lake, tmp_path, folders):
    survey = survey_lake(make_lake(tmp_path / "lake", rows=64, shard_rows=8).uri, asked_for(folders))
    gpu_bound = make_plan(survey, PlanConfig(gpus=3, cpus=31, **GIVEN))
    assert (gpu_bound.bottleneck, gpu_bound.pairs_per_second) == ("b", pytest.approx(100))
    assert (gpu_bound.more_gpus.gpus, gpu_bound.more_gpus.pairs_per_second) == (4, pytest.approx(200))
    assert gpu_bound.more_gpus.seconds == pytest.approx(64 / 200)
    cpu_bound = make_plan(survey, PlanConfig(gpus=6, cpus=3, **GIVEN))
    assert (cpu_bound.bottleneck, cpu_bound.pairs_per_second) == ("prepare", pytest.approx(2 * 20))
    assert (cpu_bound.more_cores.cores, cpu_bound.more_cores.pairs_per_second) == (10, pytest.approx(10 * 20))
    assert cpu_bound.more_gpus.pairs_per_second == pytest.approx(2 * 20)


def test_with_fewer_gpus_than_teachers_the_small_ones_take_turns(make_lake, tmp_path, folders):
    survey = survey_lake(make_lake(tmp_path / "lake", rows=64, shard_rows=8).uri, asked_for(folders))
    plan = make_plan(survey, PlanConfig(gpus=2, cpus=101, **GIVEN))
    stages = {stage.name: stage for stage in plan.stages}
    assert (stages["teacher=a"].count, stages["teacher=a"].shares_with) == (0.5, ("hf",))
    together = 1 / (1 / 1000 + 1 / 400)
    assert stages["teacher=a"].rate == stages["teacher=hf"].rate == pytest.approx(together)
    assert stages["teacher=hf"].busy == pytest.approx(100 / 400)
    assert plan.bottleneck == "b"
    # The third GPU is reckoned with sharing too: b gets two, and the pair's one decides.
    assert plan.more_gpus.pairs_per_second == pytest.approx(200)
    one = make_plan(survey, PlanConfig(gpus=1, cpus=101, **GIVEN))
    assert one.bottleneck == "a + b + hf"
    assert one.pairs_per_second == pytest.approx(1 / (1 / 1000 + 1 / 100 + 1 / 400))


def test_sharing_is_pointed_out_where_it_would_help(make_lake, tmp_path, folders):
    survey = survey_lake(make_lake(tmp_path / "lake", rows=64, shard_rows=8).uri, asked_for(folders))
    apart = make_plan(survey, PlanConfig(gpus=3, cpus=101, **GIVEN))
    assert "If small teachers shared GPUs (--share): 200 pairs/s on the same hardware." in apart.notes
    shared = make_plan(survey, PlanConfig(gpus=3, cpus=101, share=True, **GIVEN))
    assert shared.pairs_per_second == pytest.approx(200)
    assert not any("--share" in note for note in shared.notes)


def test_gpus_that_cannot_help_stay_idle_and_it_says_so(make_lake, tmp_path, folders):
    survey = survey_lake(make_lake(tmp_path / "lake", rows=16, shard_rows=8).uri, asked_for(folders))
    plan = make_plan(survey, PlanConfig(gpus=16, cpus=101, **GIVEN))
    assert plan.placement["b"].actors == 2
    assert "12 GPUs stay idle" in " ".join(plan.notes)


def test_what_the_user_has_decided_stands(make_lake, tmp_path, folders):
    stated = {
        "a": TeacherPlacement(actors=2, labels={"pool": "x"}),
        "hf": TeacherPlacement(gpus=0.5, micro_batch=2),
        "b": TeacherPlacement(accelerator_type="A100"),
    }
    config = asked_for(folders, hardware=HardwareConfig(teachers=stated, prepare_tasks=7))
    survey = survey_lake(make_lake(tmp_path / "lake", rows=64, shard_rows=8).uri, config)
    plan = make_plan(survey, PlanConfig(gpus=5, cpus=64, **GIVEN))
    assert plan.placement["a"] == TeacherPlacement(actors=2, gpus=1, labels={"pool": "x"})
    assert plan.placement["hf"] == TeacherPlacement(actors=1, gpus=0.5, micro_batch=2)
    assert plan.placement["b"] == TeacherPlacement(actors=2, gpus=1, accelerator_type="A100")
    assert plan.cores == 7
    assert {stage.name: stage.rate for stage in plan.stages}["teacher=hf"] == pytest.approx(200)
    with pytest.raises(ClusterError, match=r"\(a 2, hf 1\) take 3 of 3 GPUs and leave none for b"):
        make_plan(survey, PlanConfig(gpus=3, cpus=64, **GIVEN))


def test_without_gpus_the_actors_share_the_cores(make_lake, tmp_path, folders):
    survey = survey_lake(make_lake(tmp_path / "lake", rows=64, shard_rows=8).uri, asked_for(folders))
    plan = make_plan(survey, PlanConfig(cpus=6, price=3, **GIVEN))
    # Two threads an actor: a pair costs two core-seconds / rate in each teacher, and 1 / 20 in preparation.
    costs = {"prepare": 1 / 20, "teacher=a": 2 / 1000, "teacher=b": 2 / 100, "teacher=hf": 2 / 400}
    together = sum(costs.values())
    assert plan.gpus == 0
    assert plan.pairs_per_second == pytest.approx(6 / together)
    assert {stage.name: stage.busy for stage in plan.stages} == {
        name: pytest.approx(cost / together) for name, cost in costs.items()
    }
    assert plan.bottleneck == "prepare"
    assert plan.more_cores.pairs_per_second == pytest.approx(14 / together)
    assert (plan.more_gpus, plan.cost) == (None, None)
    assert "3 actors and the decoders share 6 cores" in plan.notes[0]
    assert {placement.gpus for placement in plan.placement.values()} == {0}


def test_an_actor_is_never_faster_than_its_threads():
    load = Workload({"slow": 100, "fast": 100}, {"slow": 9, "fast": 9}, {"slow": 1, "fast": 1000}, 100, 1000, threads=4)
    found = estimate(load, 0, 8)
    assert found.seconds == pytest.approx(100)  # not 100 x 4 / 8
    assert found.bottleneck == "slow"


def test_real_rates_of_real_teachers(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=12, shard_rows=8)
    config = asked_for(folders, views=ViewsConfig(count=2))
    plan = make_plan(survey_lake(lake.uri, config))
    assert re.search(r"1 thread$|\d threads$", plan.measured_on)
    assert [stage.name for stage in plan.stages] == ["prepare", "teacher=a", "teacher=b", "teacher=hf"]
    assert all(stage.rate_of_one > 0 for stage in plan.stages)
    again = make_plan(survey_lake(lake.uri, config))
    assert again == plan  # nothing was measured a second time
    # A picture and two views go through the image tower.
    assert {item.teacher: item.bytes_per_row for item in plan.missing}["a"] == pytest.approx(1.77 * 16 * (3 + 1.5))


def test_some_rates_may_be_given_and_the_others_measured(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=12, shard_rows=8)
    plan = make_plan(survey_lake(lake.uri, asked_for(folders)), PlanConfig(rates={"b": 12345}))
    rates = {stage.name: stage.rate for stage in plan.stages}
    assert rates["teacher=b"] == pytest.approx(12345)
    cached = (tmp_path / "cache" / "rates.json").read_text()
    assert '"what": "b"' not in cached
    assert '"what": "hf"' in cached


def test_a_rate_for_a_stranger_is_refused(make_lake, tmp_path, folders):
    survey = survey_lake(make_lake(tmp_path / "lake", rows=4).uri, asked_for(folders))
    with pytest.raises(ConfigError, match=r"--rate names nobody, which --teachers does not \(a, b, hf\)"):
        make_plan(survey, PlanConfig(rates={"nobody": 1}))


def test_gpus_that_are_not_here_cannot_be_measured(make_lake, tmp_path, folders):
    survey = survey_lake(make_lake(tmp_path / "lake", rows=4).uri, asked_for(folders))
    with pytest.raises(ConfigError, match=r"no GPU on this machine to measure b, hf on.*--rate b=NUMBER for each"):
        make_plan(survey, PlanConfig(gpus=2, rates={"a": 9}))


def test_a_teacher_on_cpus_beside_gpus_cannot_be_planned(make_lake, tmp_path, folders):
    config = asked_for(folders, hardware=HardwareConfig(teachers={"a": TeacherPlacement(gpus=0)}))
    survey = survey_lake(make_lake(tmp_path / "lake", rows=4).uri, config)
    with pytest.raises(ConfigError, match="puts 'a' on CPUs"):
        make_plan(survey, PlanConfig(gpus=2, **GIVEN))
