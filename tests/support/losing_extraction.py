"""An extraction on a cluster that loses a machine: ``losing_extraction.py LAKE CONFIG.json SYSTEM.json``.

The first machine has no CPU that Ray could deal out, so all shards are prepared on the second; teachers may be placed
on the first by its resource ``seat``. The second one goes once two files of teacher ``good`` are there, and a third one
comes in its place. SYSTEM.json holds settings of Ray's own.
"""

import json
import sys
import threading
import time
from pathlib import Path

from extractor.config import ExtractConfig
from extractor.teachers import Teacher

SECONDS_PER_PASS = 0.2


class SlowTeacher(Teacher):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        forward = self.passes._forward

        def slowly(tower, batch):
            time.sleep(SECONDS_PER_PASS)
            return forward(tower, batch)

        self.passes._forward = slowly


def main() -> None:
    import ray
    from processes import wait_for
    from ray.cluster_utils import Cluster

    from common.errors import root_cause
    from common.logs import configure_logs
    from extractor.pipeline import extract

    configure_logs()
    lake, config, system = sys.argv[1], *(Path(name).read_text() for name in sys.argv[2:])
    small = {"object_store_memory": 200 << 20}
    # Ray's own pace takes fifteen seconds to believe that a machine is gone.
    settings = {"health_check_period_ms": 500, **json.loads(system)}
    head = {"num_cpus": 0, "resources": {"seat": 2}, "include_dashboard": False, "_system_config": settings, **small}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    machine = cluster.add_node(num_cpus=2, **small)
    ray.init(address=cluster.address, log_to_driver=False)
    ended: list[BaseException | None] = []

    def work() -> None:
        try:
            extract(lake, ExtractConfig.model_validate_json(config), SlowTeacher)
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 - told below
            ended.append(error)

    # Machines are added by the main thread, or not at all.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    files = Path(lake, "features/teacher=good")
    wait_for(lambda: ended or len(list(files.glob("shard-*.parquet"))) >= 2, 120, "two files")
    if not ended:
        cluster.remove_node(machine, allow_graceful=False)
        print("the machine is lost", file=sys.stderr, flush=True)
        cluster.add_node(num_cpus=2, **small)
    worker.join()
    ray.shutdown()
    cluster.shutdown()
    if (error := ended[0]) is not None:
        print(f"mmkd: {root_cause(error) or error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    import losing_extraction  # workers must find the class in a module

    losing_extraction.main()
