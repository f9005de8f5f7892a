"""A local Ray as a command starts it."""

import os
import subprocess
import sys

import psutil
import pytest

pytestmark = pytest.mark.ray

SCRIPT = """
import os, time
from cluster.session import ray_session

with ray_session():
    import ray

    @ray.remote(num_cpus=1)
    class Teacher:
        def ready(self):
            return True

    @ray.remote(num_cpus=0)
    def write():
        return os.getpid()

    cpus = int(ray.cluster_resources()["CPU"])
    actors = [Teacher.remote() for _ in range(cpus)]
    ray.get([actor.ready.remote() for actor in actors])
    first = ray.get(write.remote())
    time.sleep(4)
    print("same" if ray.get(write.remote()) == first else "another")
"""


def test_a_task_finds_its_process_again_also_while_every_cpu_is_taken():
    """Ray by itself ends it after a second, and each shard would wait for a new Python."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["same"], done.stderr


def test_a_home_that_cannot_be_written_is_not_needed():
    """As of a container's user; root may write almost everywhere, but not below /proc."""
    script = (
        "from cluster.session import ray_session\nwith ray_session():\n    import ray\n    print(ray.is_initialized())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "HOME": "/proc"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["True"], done.stderr


STREAM = """
import threading, time
from cluster.session import STREAM_THREADS, ray_session

def streaming():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(STREAM_THREADS)]

with ray_session():
    import ray

    def slow(row):
        time.sleep(0.2)
        return row

    batches = iter(ray.data.range(100, override_num_blocks=100).map(slow).iter_batches(batch_size=None))
    next(batches)
    print(sorted({name.split("-")[0] for name in streaming()}))
    batches.close()
print(streaming())
"""


def test_a_stream_that_was_closed_early_has_ended_before_ray_has():
    """A thread of it that asks Ray for something later ends the process with status 1. The names are Ray Data's own."""
    done = subprocess.run([sys.executable, "-c", STREAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['StreamingExecutor', 'iter_threaded']", "[]"], done.stderr


KILLED = """
import sys, time
from cluster.session import ray_session

with ray_session():
    print("ready", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_driver_leaves_is_ended_by_the_next_and_no_one_elses():
    drivers = [subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [driver.stdout.readline() for driver in drivers] == ["ready\n"] * 2
        dead, living = (psutil.Process(driver.pid).children(recursive=True) for driver in drivers)
        drivers[0].kill()
        drivers[0].wait()
        # Ray's own agents end by themselves, but only after a minute.
        left = [process for process in dead if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        done = subprocess.run(
            [sys.executable, "-c", "from cluster.session import ray_session\nwith ray_session(): pass"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert left, "otherwise this shows nothing"
        _, alive = psutil.wait_procs(left, timeout=5)
        assert not alive
        assert all(process.is_running() for process in living)
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()


def test_sigterm_while_nothing_else_listens_ends_with_143_and_without_a_ray():
    script = (
        "import time\nfrom cluster.session import ray_session\nwith ray_session():\n    print('ready', flush=True)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", f"{script}    time.sleep(600)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout.readline() == "ready\n"
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.terminate()
        _, said = driver.communicate(timeout=60)
        assert driver.returncode == 143, said
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
    finally:
        driver.kill()
        driver.wait()
