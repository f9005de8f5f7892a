"""Scenarios that need a Ray cluster of their own shape: ``python run_scenario.py NAME LAKE CONFIG.json LOG``.

Teachers write what they see to LOG, one JSON object per line, from whatever process they run in.
"""

import json
import os
import sys
import time
from pathlib import Path

import pyarrow as pa

from common.schemas import features_schema
from extractor.config import ExtractConfig
from extractor.events import EmbedFacts
from extractor.placement import TeacherPlacement
from extractor.teachers import Embedded, Teacher

WAIT_SECONDS = 2.0


def note(**facts) -> None:
    with open(os.environ["SCENARIO_LOG"], "ab", buffering=0) as file:
        file.write(json.dumps(facts).encode() + b"\n")


def gpu_ids() -> list[int]:
    import ray

    return [int(number) for number in ray.get_gpu_ids()]


class WatchedTeacher(Teacher):
    """The real teacher, which says on which GPU it loads and embeds."""

    def __init__(self, teacher, *arguments):
        super().__init__(teacher, *arguments)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        note(what="load", teacher=teacher.name, gpus=gpu_ids(), visible=visible, pid=os.getpid())

    def embed(self, prepared):
        time.sleep(float(os.environ.get("SECONDS_PER_SHARD", "0")))
        import ray

        node = ray.get_runtime_context().get_node_id()
        note(what="embed", teacher=self.teacher.name, gpus=gpu_ids(), pid=os.getpid(), node=node)
        return super().embed(prepared)


class WaitingTeacher:
    """No model at all: a shard takes exactly ``WAIT_SECONDS``, and the CPU stays free."""

    actors = 1

    def __init__(self, teacher, *_):
        self.dim = teacher.description.image_dim

    def describe_scale(self):
        return 1.0

    def embed(self, prepared):
        started = time.time()
        time.sleep(WAIT_SECONDS)
        rows, shard = prepared.num_rows, prepared["shard"][0].as_py()
        unit = pa.array([[1.0] + [0.0] * (self.dim - 1)] * rows, pa.list_(pa.float32(), self.dim))
        lengths = pa.array([1.0] * rows, pa.float32())
        schema = features_schema(self.dim, self.dim)
        extra = pa.array([[]] * rows, schema.field("extra_text_embeddings").type)
        columns = [prepared["sample_id"].combine_chunks(), unit, lengths, unit, lengths, extra]
        note(what="wait", actors=self.actors, shard=shard, pid=os.getpid(), started=started, finished=time.time())
        return Embedded(EmbedFacts(shard, rows, forwards=1), pa.table(columns, schema=schema))


def single_machine(lake: str, config: ExtractConfig) -> None:
    """Nine real teachers at once; then one that only waits, with 1, 2 and 8 actors on a lake of their own each."""
    import ray

    from extractor.pipeline import extract

    ray.init(num_cpus=4, num_gpus=9, include_dashboard=False, log_to_driver=False, object_store_memory=500 << 20)
    try:
        extract(lake, config, WatchedTeacher)
        for actors in (1, 2, 8):
            hardware = config.hardware.model_copy(update={"teachers": {"t0": TeacherPlacement(actors=actors, gpus=1)}})
            alone = config.model_copy(update={"teachers": config.teachers[:1], "hardware": hardware})
            extract(f"{lake}-{actors}", alone, type(f"WaitingTeacher{actors}", (WaitingTeacher,), {"actors": actors}))
    finally:
        ray.shutdown()


def lost_node(lake: str, config: ExtractConfig) -> None:
    """The machine of the only actor is killed half-way; another has room for it."""
    import threading

    import ray
    from ray.cluster_utils import Cluster

    from common.lake import open_lake
    from extractor.pipeline import extract

    small = {"object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "num_gpus": 0, **small})
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1, **small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    done = open_lake(lake)

    def kill() -> None:
        while len(done.files("features/teacher=a")) < 4:
            time.sleep(0.05)
        embedded = [json.loads(line) for line in Path(os.environ["SCENARIO_LOG"]).read_text().splitlines()]
        node = {item["node"] for item in embedded if item["what"] == "embed"}.pop()
        note(what="killed", node=node, files=len(done.files("features/teacher=a")))
        (victim,) = [one for one in nodes if one.node_id == node]
        cluster.remove_node(victim, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        extract(lake, config, WatchedTeacher)
    finally:
        killer.join()
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    from common.logs import configure_logs

    configure_logs()
    name, lake, config_file, log = sys.argv[1:5]
    os.environ["SCENARIO_LOG"] = log
    config = ExtractConfig.model_validate_json(Path(config_file).read_text())
    if name == "single-machine":
        single_machine(lake, config)
    elif name == "lost-node":
        lost_node(lake, config)
    else:
        sys.exit(f"no scenario {name!r}")


if __name__ == "__main__":
    import run_scenario  # workers must find the classes in a module

    run_scenario.main()
