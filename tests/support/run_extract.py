"""A driver of its own for tests that kill, pause or stop it: ``python run_extract.py LAKE CONFIG.json [GPUS]``.

Its teachers are the real ones, but slower by ``SECONDS_PER_PASS``, and each forward pass leaves a byte in
``PASSES_FILE``, so that work is counted even when the process that did it was killed. ``OBJECT_STORE_MEMORY`` makes
Ray's object store that small, in bytes. ``MANY_CORES`` lets it work as on a large machine.
"""

import os
import sys
import time
from pathlib import Path

from extractor.config import ExtractConfig
from extractor.teachers import Teacher


class CountedTeacher(Teacher):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        forward = self.passes._forward

        def counted(tower, batch):
            time.sleep(float(os.environ.get("SECONDS_PER_PASS", "0")))
            with open(os.environ["PASSES_FILE"], "ab", buffering=0) as file:
                file.write(b".")
            return forward(tower, batch)

        self.passes._forward = counted


def main() -> None:
    from cluster.session import ray_session
    from common.errors import root_cause
    from common.logs import configure_logs

    configure_logs()
    if os.environ.get("MANY_CORES"):
        from common import processes

        processes.FEW_CORES = 0
    lake, config = sys.argv[1], ExtractConfig.model_validate_json(Path(sys.argv[2]).read_text())
    if store := os.environ.get("OBJECT_STORE_MEMORY"):  # ray_session takes a Ray that is there
        import ray

        ray.init(address="local", num_cpus=4, object_store_memory=int(store), include_dashboard=False)
    try:
        with ray_session(int(sys.argv[3]) if len(sys.argv) > 3 else None):
            from extractor.pipeline import extract

            extract(lake, config, CountedTeacher)
    except Exception as error:
        ours = root_cause(error)
        if ours is None:
            raise
        print(f"mmkd: {ours}", file=sys.stderr)
        sys.exit(ours.exit_code)


if __name__ == "__main__":
    import run_extract  # workers must find the class in a module

    run_extract.main()
