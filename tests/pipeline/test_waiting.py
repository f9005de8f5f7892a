"""Waiting costs nothing: CPU seconds of the driver for each second in which a teacher, or a training step, is slow."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import wait_for, workers

from extractor.config import ExtractConfig

pytestmark = pytest.mark.ray

MOST = 0.15
"""CPU seconds for a second of waiting; a loop that never sleeps takes 0.9 to 1.0."""


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def files(lake, teacher: str = "a") -> int:
    folder = Path(lake.uri) / "features" / f"teacher={teacher}"
    return len(list(folder.glob("shard-*.parquet")))


def share_until(process: psutil.Process, condition, seconds: float) -> float:
    """CPU seconds a second of a process until a condition holds."""
    started, used = time.monotonic(), cpu_seconds(process)
    wait_for(condition, seconds, "the end of what is measured")
    return (cpu_seconds(process) - used) / (time.monotonic() - started)


def share_for(process: psutil.Process, seconds: float) -> float:
    """CPU seconds a second of a process during the next so many seconds."""
    over = time.monotonic() + seconds
    return share_until(process, lambda: time.monotonic() > over, seconds + 10)


def test_a_driver_that_waits_for_a_slow_teacher_or_a_stopped_one_sleeps(driver, make_lake, tmp_path, small_teachers):
    lake = make_lake(tmp_path / "lake", rows=320, shard_rows=8)
    config = ExtractConfig(teachers=(f"a={small_teachers['a']}",))
    run = driver(lake, config, seconds_per_pass=0.25)
    wait_for(lambda: files(lake) >= 5, 120, "five shards")
    process = psutil.Process(run.pid)
    slow = share_until(process, lambda: files(lake) >= 30, 120)
    (teacher,) = workers(run.pid, "ray::Teacher_a")
    os.kill(teacher.pid, signal.SIGSTOP)
    try:
        stopped = share_for(process, 6)
    finally:
        os.kill(teacher.pid, signal.SIGCONT)
    assert run.wait(120) == 0, run.log.read_text()
    assert files(lake) == 40
    assert (slow <= MOST, stopped <= MOST) == (True, True), f"slow {slow:.2f}, stopped {stopped:.2f}"


def test_a_driver_sleeps_when_the_object_store_is_full(driver, tmp_path, make_clip_folder, make_lake, monkeypatch):
    """Five shards of 19 MB are wanted in a store of 80 MB."""
    monkeypatch.setenv("OBJECT_STORE_MEMORY", str(80 << 20))
    lake = make_lake(tmp_path / "lake", rows=1280, shard_rows=128)
    config = ExtractConfig(teachers=(f"a={make_clip_folder('wide', size=224)}",))
    run = driver(lake, config, seconds_per_pass=0.7)
    wait_for(lambda: files(lake) >= 1, 180, "a shard")
    share = share_until(psutil.Process(run.pid), lambda: files(lake) >= 6, 180)
    assert run.wait(240) == 0, run.log.read_text()
    assert share <= MOST, f"{share:.2f}"


def test_a_worker_whose_steps_are_slow_sleeps_and_so_does_its_stream(ray_local, tmp_path, monkeypatch):
    """The stream's loop runs in the worker's own process, and here the worker is this one."""
    from common.storage import Storage
    from trainer.architecture import read_architecture
    from trainer.data import TrainData
    from trainer.feed import ray_batches
    from trainer.order import Order

    monkeypatch.setattr("trainer.feed.LEAST_AHEAD", 0)  # small blocks would all be ready at once
    helpers = small_lakes()
    helpers.write_student(tmp_path / "student")
    helpers.write_lake(str(tmp_path / "lake"))
    order = Order((0, 1, 2, 3), tuple(np.arange(24) for _ in range(4)), 16, 4, 2, seed=0)
    data = TrainData(str(tmp_path / "lake"), order, read_architecture(Storage(str(tmp_path / "student"))), 0.9)
    steps = 24 * data.order.steps_per_epoch
    batches = ray_batches(ray_local.put(data), 0, steps, 0, 1, tasks=1)
    for _ in range(data.order.steps_per_epoch):
        next(batches)
    time.sleep(3)  # until everything that may be ready is ready
    taken = data.order.steps_per_epoch
    middle = share_while(batches, 5)
    taken += 5
    while taken < steps - 5 * data.order.steps_per_epoch:  # the last five blocks: ready, and nothing comes after them
        next(batches)
        taken += 1
    time.sleep(3)
    end = share_while(batches, 4)
    taken += 4 + sum(1 for _ in batches)
    assert taken == steps
    assert (middle <= MOST, end <= MOST) == (True, True), f"middle {middle:.2f}, end {end:.2f}"


def share_while(batches, steps: int) -> float:
    """CPU seconds a second of this process in so many steps of a second each."""
    me = psutil.Process()
    started, used = time.monotonic(), cpu_seconds(me)
    for _ in range(steps):
        time.sleep(1)
        next(batches)
    return (cpu_seconds(me) - used) / (time.monotonic() - started)


def small_lakes():
    """The small lake's writers live with the trainer's unit tests; tests are not packages, so they come by path."""
    file = Path(__file__).resolve().parents[1] / "trainer" / "conftest.py"
    spec = importlib.util.spec_from_file_location("small_lakes", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
