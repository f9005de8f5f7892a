"""An elastic training in a cluster of its own that loses a machine: ``shrinking_training.py LAKE RUN CONFIG.json LOG``.

Leaves in LOG when that was, the training workers' processes before it, and how many there were at most after it.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

from processes import wait_for, workers

TITLE = "ray::RayTrainWorker"


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    from trainer.config import Stage1Config
    from trainer.stage1 import train_stage1

    lake, run, config, log = sys.argv[1:]
    small = {"object_store_memory": 200 << 20}
    # Ray's own pace takes fifteen seconds to believe that a machine is gone.
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": {"health_check_period_ms": 500}, **small}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    lost = cluster.add_node(num_cpus=1, **small)
    ray.init(address=cluster.address, log_to_driver=False)
    saved = Path(lake, "runs", run, "checkpoints/step-00000003/checkpoint.json")
    finished = threading.Event()
    seen = {"before": [], "after": 0}

    def pids() -> set[int]:
        return {process.pid for process in workers(os.getpid(), TITLE)}

    def lose() -> None:
        first = wait_for(lambda: len(found := pids()) == 2 and found, 240, "two workers")
        while not saved.exists() and not finished.is_set():
            time.sleep(0.005)
        cluster.remove_node(lost, allow_graceful=False)
        seen["before"], seen["at"] = sorted(first), time.time()
        while not finished.wait(0.05):
            seen["after"] = max(seen["after"], len(pids() - first))

    loser = threading.Thread(target=lose, daemon=True)
    loser.start()
    try:
        train_stage1(lake, run, Stage1Config.model_validate_json(Path(config).read_text()))
        finished.set()
        loser.join(10)
        Path(log).write_text(json.dumps(seen))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
