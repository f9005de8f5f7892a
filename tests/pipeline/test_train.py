"""Both stages on a local Ray: any number of workers, killed and resumed, refused when they should be."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import pytest
from processes import wait_for, workers

from common.config import fingerprint
from common.errors import ClusterError, FingerprintError, LakeError, TrainError
from common.storage import Storage
from trainer.config import DataConfig, DistillConfig, ModelConfig, OptimConfig, ScaleConfig, Stage1Config, Stage2Config

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "trainer" / "conftest.py"
TRAIN_WORKER = "ray::RayTrainWorker"


def helpers():
    """The small lake's writers live with the trainer's unit tests; tests are not packages, so they come by path."""
    spec = importlib.util.spec_from_file_location("small_lakes", HELPERS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A lake of 96 pairs and a student, shared by the tests; each uses its own runs."""
    root = tmp_path_factory.mktemp("train")
    helpers().write_student(root / "student")
    helpers().write_lake(str(root / "lake"))
    return root


@pytest.fixture(scope="module", autouse=True)
def _own_cache(place):
    os.environ["MMKD_CACHE"] = str(place / "cache")
    yield
    del os.environ["MMKD_CACHE"]


def stage1_config(place, **scale) -> Stage1Config:
    return Stage1Config(
        model=ModelConfig(architecture=str(place / "student")),
        optim=OptimConfig(lr=1e-3, warmup_steps=5),
        data=DataConfig(batch_size=16, lanes=4, tasks=1),
        scale=ScaleConfig(log_every=1, checkpoint_every=3, **scale),
        epochs=2,
    )


def stage2_config(**scale) -> Stage2Config:
    base = stage1_config(Path("unused"), **scale)
    return Stage2Config(optim=base.optim, data=base.data, scale=base.scale, epochs=2)


def rows_of(place, run) -> list[dict]:
    text = (place / "lake" / "runs" / run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def same_course(left: list[dict], right: list[dict]) -> None:
    """The same batches in the same order, and the same losses to float tolerance."""
    # Samples, crops, captions, draws and teachers' vectors, each as a sequence.
    assert [row["batch"] for row in left] == [row["batch"] for row in right]
    assert [row["content"] for row in left] == [row["content"] for row in right]
    for name in ("step", "epoch", "total", "contrastive", "lr"):
        assert [row[name] for row in left] == pytest.approx([row[name] for row in right], rel=2e-3), name


@pytest.fixture(scope="module")
def one_worker(ray_local, place):
    """A finished stage-1 run on one worker."""
    from trainer.stage1 import train_stage1

    return train_stage1(str(place / "lake"), "one", stage1_config(place))


def test_stage_1_learns_and_leaves_checkpoints_metrics_and_a_result(place, one_worker):
    from trainer.checkpoint import OPTIMIZER, load_checkpoint, newest_checkpoint
    from trainer.objectives import ContrastiveObjective
    from trainer.optim import build_optimizer, optimized
    from trainer.record import Parts, restore
    from trainer.student import Student

    rows = rows_of(place, "one")
    assert [row["step"] for row in rows] == list(range(1, one_worker.steps + 1))
    assert rows[-1]["validation"] > 0
    assert len({row["batch"] for row in rows}) == len(rows)
    assert one_worker.metrics == rows[-1]
    run = Storage(str(place / "lake" / "runs" / "one"))
    assert newest_checkpoint(run).uri == one_worker.last
    assert load_checkpoint(run.uri).uri == one_worker.checkpoint
    # Everything that learns is in the checkpoint, and a student rebuilt from it alone takes it all back.
    checkpoint = load_checkpoint(one_worker.last)
    student, objective = Student(checkpoint.architecture()), ContrastiveObjective(0.07)
    optimizer = build_optimizer({"student": student, "objective": objective}, OptimConfig())
    saved = {key.rpartition("/")[0] for key in checkpoint.tensors(OPTIMIZER)}
    assert saved == {name for name, _ in optimized(optimizer)}
    restore(Parts(student, objective, optimizer), checkpoint)
    assert checkpoint.state()["identity"]["stage"] == "stage1"


def test_a_finished_run_does_nothing_again(place, one_worker):
    from trainer.stage1 import train_stage1

    before = (Path(one_worker.last) / "checkpoint.json").stat().st_mtime_ns
    # How the work is spread is not part of what a run is.
    again = train_stage1(str(place / "lake"), "one", stage1_config(place, workers=2))
    assert again == one_worker
    assert (Path(one_worker.last) / "checkpoint.json").stat().st_mtime_ns == before


def test_the_name_of_another_run_is_refused(place, one_worker):
    from trainer.stage1 import train_stage1

    other = stage1_config(place).model_copy(update={"epochs": 3, "init_temperature": 0.1})
    with pytest.raises(FingerprintError, match=r"config\.epochs: recorded 2, now 3; config\.init_temperature"):
        train_stage1(str(place / "lake"), "one", other)


def test_two_workers_train_as_one(place, one_worker):
    from trainer.stage1 import train_stage1

    train_stage1(str(place / "lake"), "two", stage1_config(place, workers=2))
    same_course(rows_of(place, "one"), rows_of(place, "two"))


def test_micro_batches_of_two_workers_take_the_same_first_steps(place, one_worker):
    """Later, rounding may grow; here it has not had the time, so a mask or a mean that differs would show."""
    from trainer.stage1 import train_stage1

    train_stage1(str(place / "lake"), "parts", stage1_config(place, workers=2, accumulate=2))
    parts, one = rows_of(place, "parts")[:3], rows_of(place, "one")[:3]
    for name in ("total", "grad_norm"):
        assert [row[name] for row in parts] == pytest.approx([row[name] for row in one], rel=1e-5), name


def test_a_student_with_batch_norm_is_told_apart_when_its_batch_is_cut(place, ray_local, tmp_path, caplog):
    from trainer.stage1 import train_stage1

    config = stage1_config(place, accumulate=2)
    folder = helpers().write_student(tmp_path / "residual")
    architecture = json.loads((folder / "open_clip_config.json").read_text())
    tower = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    architecture["model_cfg"]["vision_cfg"] = tower
    (folder / "open_clip_config.json").write_text(json.dumps(architecture))
    model = config.model.model_copy(update={"architecture": str(folder)})
    with caplog.at_level("WARNING", "mmkd"):
        train_stage1(str(place / "lake"), "residual", config.model_copy(update={"model": model, "epochs": 1}))
    (said,) = [record.getMessage() for record in caplog.records if "BatchNorm" in record.getMessage()]
    assert re.search(r"stage 1: the student has \d+ BatchNorm layers, and each of 2 micro-batches", said)


@pytest.fixture(scope="module")
def distilled(place, one_worker):
    """A finished stage-2 run on one worker."""
    from trainer.stage2 import train_stage2

    return train_stage2(str(place / "lake"), "distilled", one_worker.checkpoint, stage2_config())


def test_stage_2_starts_from_stage_1(place, distilled):
    rows = rows_of(place, "distilled")
    assert {"contrastive", "image_text", "image_image", "text_text", "total"} <= set(rows[0])
    assert rows[-1]["image_text"] < rows[0]["image_text"]
    assert all(row["image_image"] >= 0 for row in rows)
    identity = json.loads((place / "lake/runs/distilled/run.json").read_text())["fingerprint"]
    assert identity["selection"] == "sel"
    assert set(identity["teachers"]) == {"alpha", "beta"}
    assert distilled.steps == rows[-1]["step"]


@pytest.fixture
def lake_copy(place, distilled, tmp_path) -> Storage:
    """The lake with its finished runs, to be changed."""
    return Storage(shutil.copytree(place / "lake", tmp_path / "copy").as_posix())


def refused(lake: Storage, init: str, config: Stage2Config, *keys: str) -> None:
    """Going on with the run is refused for the sake of these facts and no others, and the run stays as it was."""
    from trainer.stage2 import train_stage2

    before = lake.read_bytes("runs/distilled/run.json")
    with pytest.raises(FingerprintError, match="Choose another --run name, or delete runs/distilled") as caught:
        train_stage2(lake.uri, "distilled", init, config)
    assert re.findall(r"(\S+): recorded ", str(caught.value)) == list(keys)
    assert lake.read_bytes("runs/distilled/run.json") == before


def test_a_copied_distillation_is_the_same_run(lake_copy, one_worker, distilled):
    from trainer.stage2 import train_stage2

    # The refusals below are of what they change, not of the copy.
    again = train_stage2(lake_copy.uri, "distilled", one_worker.checkpoint, stage2_config(workers=2))
    assert again.metrics == distilled.metrics


def test_a_distillation_by_another_recipe_is_refused(lake_copy, one_worker):
    weights = DistillConfig(image_text=1.5, text_text=0.0)
    other = stage2_config().model_copy(update={"distill": weights})
    refused(lake_copy, one_worker.checkpoint, other, "config.distill.image_text", "config.distill.text_text")


def test_a_distillation_of_another_student_is_refused(lake_copy, one_worker, distilled):
    refused(lake_copy, distilled.last, stage2_config(), "init")


def test_a_distillation_by_another_selection_is_refused(lake_copy, one_worker):
    # Newer, and it admits what the other one does: only its name differs.
    shutil.copytree(Path(lake_copy.uri, "selection/sel"), Path(lake_copy.uri, "selection/stricter"))
    manifest = lake_copy.read_json("manifests/selection/sel.json")
    lake_copy.write_json("manifests/selection/stricter.json", {**manifest, "created_at": "2026-02-01T00:00:00+00:00"})
    refused(lake_copy, one_worker.checkpoint, stage2_config(), "selection")
    named = stage2_config().model_copy(update={"selection": "stricter"})
    refused(lake_copy, one_worker.checkpoint, named, "config.selection", "selection")


def test_a_distillation_of_other_rows_is_refused(lake_copy, one_worker):
    for shard in ("pairs", "features/teacher=alpha", "features/teacher=beta"):
        lake_copy.write_table(f"{shard}/shard-000004.parquet", lake_copy.read_table(f"{shard}/shard-000003.parquet"))
    for teacher in ("alpha", "beta"):
        folder = f"selection/sel/teacher={teacher}"
        lake_copy.write_table(f"{folder}/shard-000004.parquet", lake_copy.read_table(f"{folder}/shard-000003.parquet"))
    refused(lake_copy, one_worker.checkpoint, stage2_config(), "data")


def test_a_distillation_of_other_admitted_rows_is_refused(lake_copy, one_worker):
    for teacher in ("alpha", "beta"):
        file = f"selection/sel/teacher={teacher}/shard-000001.parquet"
        table = lake_copy.read_table(file)
        none = pa.array([False] * len(table), table.schema.field("admitted").type)
        lake_copy.write_table(file, table.set_column(table.column_names.index("admitted"), "admitted", none))
    refused(lake_copy, one_worker.checkpoint, stage2_config(), "data")


def test_a_distillation_of_other_embeddings_is_refused(lake_copy, one_worker):
    """Beta was extracted anew with other weights, and the selection made anew by these under its old name."""
    teacher = lake_copy.read_json("manifests/teachers/beta.json")
    made = {**teacher["fingerprint"], "weights_sha256": "another"}
    lake_copy.write_json("manifests/teachers/beta.json", {**teacher, "fingerprint": made})
    selection = lake_copy.read_json("manifests/selection/sel.json")
    selection["fingerprint"]["teachers"]["beta"] = fingerprint(made)
    lake_copy.write_json("manifests/selection/sel.json", selection)
    refused(lake_copy, one_worker.checkpoint, stage2_config(), "teachers.beta.weights_sha256")


def test_stage_2_says_what_it_lacks(place, one_worker, tmp_path):
    from trainer.stage2 import train_stage2

    lake = str(place / "lake")
    with pytest.raises(TrainError, match=r"Run `mmkd train stage1 .*` first, then `mmkd train stage2 .* --init"):
        train_stage2(lake, "x", None, stage2_config())
    with pytest.raises(TrainError, match="There is no checkpoint at"):
        train_stage2(lake, "x", str(tmp_path), stage2_config())
    unknown = stage2_config().model_copy(update={"teachers": ("gamma",)})
    with pytest.raises(LakeError, match="does not cover gamma"):
        train_stage2(lake, "x", one_worker.last, unknown)
    helpers().write_lake(str(tmp_path / "bare"))
    Storage(str(tmp_path / "bare")).remove("selection")
    with pytest.raises(LakeError, match="Run `mmkd select"):
        train_stage2(str(tmp_path / "bare"), "x", one_worker.last, stage2_config())


def test_a_selection_of_embeddings_that_were_replaced_is_refused(one_worker, tmp_path):
    from trainer.stage2 import train_stage2

    lake = helpers().write_lake(str(tmp_path / "lake"))
    replaced = {"fingerprint": {"name": "beta", "weights_sha256": "another"}, "logit_scale": 20.0}
    Storage(lake).write_json("manifests/teachers/beta.json", replaced)
    with pytest.raises(LakeError, match=r"other embeddings of beta than the lake holds now. Run `mmkd select"):
        train_stage2(lake, "x", one_worker.last, stage2_config())


def test_what_the_cluster_or_the_lanes_cannot_hold_is_refused(place, ray_local):
    from trainer.stage1 import train_stage1

    with pytest.raises(ClusterError, match="need 41 CPUs"):
        train_stage1(str(place / "lake"), "x", stage1_config(place, workers=4, cpus_per_worker=10))
    with pytest.raises(TrainError, match=r"not a multiple of 3 workers \(scale.workers=3\)"):
        train_stage1(str(place / "lake"), "x", stage1_config(place, workers=3))


def test_a_workers_error_reaches_the_user_as_it_is(place, ray_local):
    from trainer.stage1 import train_stage1

    config = stage1_config(place)
    model = config.model.model_copy(update={"weights": "/nowhere.safetensors"})
    with pytest.raises(TrainError, match="neither a file nor a pretrained tag"):
        train_stage1(str(place / "lake"), "bad-weights", config.model_copy(update={"model": model}))


def test_a_broken_shard_is_one_clear_error(ray_local, place, one_worker, tmp_path):
    from trainer.stage2 import train_stage2

    lake = helpers().write_lake(str(tmp_path / "lake"))
    Storage(lake).remove("features/teacher=alpha/shard-000001.parquet")
    with pytest.raises(LakeError, match="no embeddings of teacher 'alpha' for shard 1"):
        train_stage2(lake, "x", one_worker.last, stage2_config())


def test_a_damaged_pack_is_one_clear_error(ray_local, place, one_worker, tmp_path):
    from trainer.stage2 import train_stage2

    lake = helpers().write_lake(str(tmp_path / "lake"))
    Storage(lake).remove("features/teacher=alpha/shard-000001.parquet")
    Storage(lake).write_bytes("features/teacher=alpha/shards-000001-000001.parquet", b"a pack of which nothing is left")
    with pytest.raises(LakeError, match=r"shards-000001-000001\.parquet is damaged.*mmkd verify"):
        train_stage2(lake, "x", one_worker.last, stage2_config())


def driver(place, run, stage=1) -> subprocess.Popen:
    """A driver of its own, with its own Ray, that trains on two workers."""
    code = (
        "import sys, ray; sys.path.insert(0, sys.argv[3])\n"
        "from trainer.config import Stage1Config, Stage2Config\n"
        "from trainer.stage1 import train_stage1\nfrom trainer.stage2 import train_stage2\n"
        "ray.init('local', num_cpus=3, object_store_memory=1 << 28, include_dashboard=False)\n"
        "lake, run, config = sys.argv[1], sys.argv[2], sys.argv[4]\n"
        "if sys.argv[5] == '1':\n"
        "    train_stage1(lake, run, Stage1Config.model_validate_json(config))\n"
        "else:\n"
        "    train_stage2(lake, run, lake + '/runs/one', Stage2Config.model_validate_json(config))\n"
    )
    config = (stage1_config(place, workers=2) if stage == 1 else full_config(workers=2)).model_dump_json()
    command = [sys.executable, "-c", code, str(place / "lake"), run, str(ROOT), config, str(stage)]
    return subprocess.Popen(command, start_new_session=True)


def full_config(**scale) -> Stage2Config:
    """Stage 2 with everything that has a state or draws: heads that are dropped, a queue, learned scales."""
    weights = DistillConfig(text_text=0.5, graph=0.5, heads=1.0, drop_teachers=0.5, queue=24, teacher_scale="fitted")
    return stage2_config(**scale).model_copy(update={"distill": weights})


class Interrupted(NamedTuple):
    """A run at the moment of its accident."""

    kept: list[dict[str, Any]]
    """Its metric rows up to the checkpoint that it must go on from."""
    at: float


def interrupted(place, run, at) -> Interrupted:
    """Read what a run left that nobody works on now."""
    from trainer.checkpoint import newest_checkpoint

    checkpoint = newest_checkpoint(Storage(str(place / f"lake/runs/{run}")))
    assert 3 <= checkpoint.step < checkpoint.state()["total_steps"]
    assert not (place / f"lake/runs/{run}/result.json").exists()
    return Interrupted([row for row in rows_of(place, run) if row["step"] <= checkpoint.step], at)


def went_on(place, run, accident: Interrupted) -> None:
    """Steps up to the checkpoint were not done again: their rows are the old ones, clock and all; later ones were."""
    rows = rows_of(place, run)
    assert rows[: len(accident.kept)] == accident.kept
    done = [row["at"] for row in rows[len(accident.kept) :]]
    assert done
    assert min(done) > accident.at


def killed_after(place, run, stage, step=3) -> Interrupted:
    """Start a run on two workers, kill all of it once a step is saved, and leave what a torn save leaves."""
    process = driver(place, run, stage)
    first = place / f"lake/runs/{run}/checkpoints/step-{step:08d}/checkpoint.json"
    deadline = time.monotonic() + 300
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert first.exists()
    # The driver first, which would replace a worker; its workers too, which would go on for a while without it.
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, family)), 30, "the end of the killed")
    at = time.time()
    torn = place / f"lake/runs/{run}/checkpoints/step-00000009"
    torn.mkdir(exist_ok=True)
    (torn / "checkpoint.json").unlink(missing_ok=True)
    return interrupted(place, run, at)


def alive(process: psutil.Process) -> bool:
    """Whether it may still write anything."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_killed_on_two_workers_goes_on_with_one_and_the_same_batches(place, one_worker):
    from trainer.stage1 import train_stage1

    accident = killed_after(place, "killed", stage=1)
    result = train_stage1(str(place / "lake"), "killed", stage1_config(place))
    assert result.steps == one_worker.steps
    went_on(place, "killed", accident)
    same_course(rows_of(place, "one"), rows_of(place, "killed"))


def test_a_distillation_killed_on_two_workers_goes_on_with_one_and_the_same_draws(place, one_worker):
    from trainer.stage2 import train_stage2

    init = str(place / "lake/runs/one")
    train_stage2(str(place / "lake"), "undisturbed", init, full_config())
    accident = killed_after(place, "killed-2", stage=2)
    train_stage2(str(place / "lake"), "killed-2", init, full_config())
    went_on(place, "killed-2", accident)
    left, right = rows_of(place, "undisturbed"), rows_of(place, "killed-2")
    same_course(left, right)
    for term in ("image_text", "image_image", "graph", "heads"):
        assert [row[term] for row in left] == pytest.approx([row[term] for row in right], rel=2e-3), term


def test_a_killed_worker_is_replaced_and_the_course_stays_the_same(place, one_worker):
    from trainer.stage1 import train_stage1

    lake, run = str(place / "lake"), place / "lake/runs/replaced"
    accidents = []

    def group(*, without=frozenset()) -> list[psutil.Process]:
        """The two training workers, once they are there, none of them of an earlier group."""

        def found():
            here = [process for process in workers(os.getpid(), TRAIN_WORKER) if process.pid not in without]
            return here if len(here) == 2 else None

        return wait_for(found, 120, "two workers")

    def kill_one():
        first = group()
        deadline = time.monotonic() + 120
        while not (run / "checkpoints/step-00000003/checkpoint.json").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        first[-1].kill()
        at = time.time()
        # Ray Train restarts the whole group. The new one has yet to start up, and the old one is gone.
        second = group(without={process.pid for process in first})
        assert not any(map(alive, first))
        accidents.append((interrupted(place, "replaced", at), second))

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    train_stage1(lake, "replaced", stage1_config(place, workers=2))
    killer.join(5)
    ((accident, second),) = accidents
    assert len(second) == 2
    went_on(place, "replaced", accident)
    same_course(rows_of(place, "one"), rows_of(place, "replaced"))


def test_an_elastic_run_goes_on_with_the_workers_there_is_room_for(place, one_worker, tmp_path):
    """Two machines of one CPU each, then one of them: two workers, then one."""
    config, log, output = tmp_path / "config.json", tmp_path / "seen.json", tmp_path / "output"
    config.write_text(stage1_config(place, workers=1, max_workers=2).model_dump_json())
    script = ROOT / "tests/support/shrinking_training.py"
    command = [sys.executable, str(script), str(place / "lake"), "elastic", str(config), str(log)]
    # A cluster leaves its address where every other Ray of this machine would find it, so it gets a place of its own.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as own, output.open("wb") as stream:
        # At first Ray Train still counts the lost machine, and waits a minute for it.
        environment = {**os.environ, "RAY_TMPDIR": own, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
        done = subprocess.run(command, stdout=stream, stderr=stream, timeout=400, cwd=ROOT, env=environment)
    assert done.returncode == 0, output.read_text()[-3000:]
    seen = json.loads(log.read_text())
    assert len(seen["before"]) == 2
    assert seen["after"] == 1
    rows = rows_of(place, "elastic")
    assert 3 <= sum(row["at"] < seen["at"] for row in rows) < len(rows)
    same_course(rows_of(place, "one"), rows)


def test_sizes_an_elastic_run_cannot_have_are_refused(place, ray_local):
    from trainer.stage1 import train_stage1

    with pytest.raises(TrainError, match=r"not a multiple of 3 workers"):
        train_stage1(str(place / "lake"), "no", stage1_config(place, workers=1, max_workers=3))
    with pytest.raises(TrainError, match=r"max_workers=1 is less"):
        train_stage1(str(place / "lake"), "no", stage1_config(place, workers=2, max_workers=1))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a compiler here")
def test_a_compiled_student_takes_the_same_course(place, one_worker):
    from trainer.stage1 import train_stage1

    train_stage1(str(place / "lake"), "compiled", stage1_config(place, compile=True))
    same_course(rows_of(place, "compiled"), rows_of(place, "one"))
