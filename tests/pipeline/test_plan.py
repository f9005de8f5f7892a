"""``mmkd plan --cluster`` on a real Ray of several machines with logical GPUs, and where Ray puts what was planned."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.ray

# A Ray of its own, in a process of its own: the session's has no GPUs.
PROGRAM = """
import json, os, sys, time
os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
from ray.cluster_utils import Cluster

head = {"num_cpus": 4, "num_gpus": 4, "resources": {"accelerator_type:A100": 1}, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": 200 << 20})
if "two" in sys.argv[1]:
    kind = {"accelerator_type:H100": 1}
    cluster.add_node(num_cpus=2, num_gpus=1, resources=kind, labels={"pool": "b"}, object_store_memory=200 << 20)
ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
try:
"""
ENDING = """
finally:
    ray.shutdown()
    cluster.shutdown()
"""
PLAN = """
sys.argv = ["mmkd", "plan", *sys.argv[2:], "--cluster", "--json"]
from cluster.cli import app
app(standalone_mode=False)
"""

SEATS = """
import threading
import extractor.pools
from common.logs import configure_logs
from extractor.placement import TeacherPlacement, place, read_cluster
from extractor.planning.split import split_gpus
from extractor.pools import start_pools

class Model:
    def __init__(self, *_):
        pass

    def describe_scale(self):
        return 1.0

configure_logs()

def seats(placements):
    pools = start_pools(placements, Model, {name: ("no input", "auto", 1) for name in placements})
    waiting = [(name, seat.placed) for name, pool in pools.items() for seat in pool.seats]
    ready, late = ray.wait([placed for _, placed in waiting], num_returns=len(waiting), timeout=60)
    assert not late, f"{len(late)} actors found no place"
    found = [(name, *ray.get(placed)) for name, placed in waiting]
    for pool in pools.values():
        pool.close()
    while ray.available_resources().get("GPU", 0) < ray.cluster_resources()["GPU"]:
        time.sleep(0.1)
    return found

work = {name: float(index + 1) for index, name in enumerate("abcdefghi")}
split = split_gpus(work, 4)
planned = place(list(split.placements()), read_cluster(), split.placements())
found = {"groups": split.groups, "whole": split.whole, "planned": seats(planned)}
found["shared"] = seats(place(list(work), read_cluster()))

@ray.remote(num_gpus=4)
class Other:
    def is_there(self):
        return True

other = Other.remote()
ray.get(other.is_there.remote())
threading.Timer(4, ray.kill, [other]).start()
extractor.pools.SEAT_SECONDS = 1
found["late"] = seats({name: TeacherPlacement(actors=1, gpus=0.5) for name in ("late", "later")})
print(json.dumps(found))
"""


def run(body: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    program = PROGRAM + textwrap.indent(body, "    ") + ENDING
    left_out = ("RAY_ADDRESS", "MMKD_STORE", "CUDA_VISIBLE_DEVICES")
    settings = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**settings, **environment},
        timeout=180,
    )


def test_a_cluster_of_two_kinds_is_measured_on_both(make_lake, make_clip_folder, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=40, shard_rows=2)
    teachers = f"a={make_clip_folder('a')},b={make_clip_folder('b', seed=1)}"
    settings = ["--set", "micro_batch=4", "--set", "hardware.teachers.b.accelerator_type=H100"]
    done = run(PLAN, "two machines", lake.uri, "--teachers", teachers, *settings, MMKD_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout[done.stdout.index("{") :])
    assert plan["gpus"] == 5
    assert plan["cores"] == 5  # of six, one writes
    assert "The GPUs are not alike (4 x A100, 1 x H100); all count as the slowest of them." in plan["notes"]
    assert done.stderr.count("plan: measuring decoding, a, b on ") == 1  # both kinds are the same CPU here
    assert plan["stages"][0]["rate_of_one"] > 0
    by_teacher = {
        name: (one["actors"], one["gpus"], one["accelerator_type"]) for name, one in plan["placement"].items()
    }
    assert by_teacher["b"] == (1, 1.0, "H100")  # there is only one of that kind
    assert by_teacher["a"][1:] == (1.0, None)


def test_ray_seats_the_actors_as_planned():
    done = run(SEATS, "one machine")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    by_gpu: dict[int, set[str]] = {}
    for name, gpu in found["planned"]:
        by_gpu.setdefault(gpu, set()).add(name)
    groups = [set(group) for group in found["groups"]]
    assert sorted(map(sorted, (names for names in by_gpu.values() if names in groups))) == sorted(map(sorted, groups))
    for name, gpus in found["whole"].items():
        assert sum(1 for names in by_gpu.values() if names == {name}) == gpus
    assert len(found["shared"]) == 9
    assert max(sum(gpu == other for _, other in found["shared"]) for _, gpu in found["shared"]) <= 3
    assert [name for name, _ in found["late"]] == ["late", "later"]  # another's job held all GPUs at first
    assert done.stderr.count("has no place after 1 s") == 1
