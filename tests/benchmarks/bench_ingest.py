"""mmkd ingest against a plain loop in one process, and ten rows against the start and stop of a local Ray.

python tests/benchmarks/bench_ingest.py [--runs N] [--small N] [--large N] [--record]

Whole commands of two sizes; the CPU seconds per row are those of the rows between them, so that the start cancels. The
loop (``ingest_loop.py``) decodes, hashes and stores the same pictures, but in the process that keeps them: nothing
protects it from a hostile file.
"""

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path

from material import ROOT, read_jpegs, sample_row, write_tars
from paired import Comparison, conclude, in_turn, parser, workplace
from whole import GIB, WholeRun, insist, run_whole

TAR_ROWS = 1024
FEW = 10
WORK_TARGET, MEMORY_TARGET_GIB, FEW_TARGET = 1.3, 1.2, 1.5
START_RAY = "import ray; ray.init(address='local', logging_level='error', log_to_driver=False); ray.shutdown()"


class Bench:
    """Both ways, on tars of either size.

    Args:
        folder: For tars and what is made of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def loop(self, tars: Path) -> WholeRun:
        """The plain loop."""
        script = Path(__file__).with_name("ingest_loop.py")
        return insist(run_whole([sys.executable, str(script), str(tars), str(self._place())]))

    def mmkd(self, source: Path) -> WholeRun:
        """``mmkd ingest`` as a user would type it."""
        command = [sys.executable, "-m", "cluster.cli", "ingest", str(source), str(self._place())]
        return insist(run_whole(command, {"PYTHONPATH": str(ROOT)}))

    def ray(self) -> WholeRun:
        """A local Ray, started and stopped."""
        return insist(run_whole([sys.executable, "-c", START_RAY]))

    def _place(self) -> Path:
        shutil.rmtree(self.folder / "made", ignore_errors=True)
        return self.folder / "made"


def write_table(folder: Path, jpegs: list[bytes], rows: int) -> Path:
    """Pictures in a folder, and a JSONL table of them with their captions."""
    folder.mkdir()
    lines = []
    for row in range(rows):
        (folder / f"{row}.jpg").write_bytes(jpegs[row % len(jpegs)])
        lines.append(json.dumps({"image": f"{row}.jpg", "caption": sample_row(row, b"")["captions"]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """CPU time, clock and memory of many rows; the clock of few."""
    jpegs = read_jpegs(options.data)
    small, large = (
        write_tars(folder / f"tars{rows}", jpegs, rows, TAR_ROWS) for rows in (options.small, options.large)
    )
    few = write_table(folder / "few", jpegs, FEW)
    work = Comparison("ingest against a plain loop, CPU s per 1,000 rows", "CPU s", WORK_TARGET, at_most=True)
    clock = Comparison("ingest against a plain loop", "rows/s")
    memory = Comparison("peak memory of ingest, shared pages counted once", "GiB")
    start = Comparison(f"ingest of {FEW} rows against start and stop of a local Ray", "s", FEW_TARGET, at_most=True)
    bench, rows = Bench(folder), options.large - options.small

    def many(name: str, way: partial) -> None:
        less, more = way(small), way(large)
        work.add(name, 1000 * (more.cpu_seconds - less.cpu_seconds) / rows)
        clock.add(name, rows / (more.seconds - less.seconds))
        memory.add(name, max(less.pss, more.pss) / GIB)

    in_turn(
        options.runs,
        {
            "loop": partial(many, "loop", partial(bench.loop)),
            "ingest": partial(many, "ingest", partial(bench.mmkd)),
            "local Ray": lambda: start.add("local Ray", bench.ray().seconds),
            "ten rows": lambda: start.add("ingest", bench.mmkd(few).seconds),
        },
    )
    most = max(memory.numbers["ingest"])
    print(f"\ningest took {most:.2f} GiB at most; wanted: <= {MEMORY_TARGET_GIB} GiB")
    return [work, clock, memory, start], f"{options.small} and {options.large} rows in tars of {TAR_ROWS}"


if __name__ == "__main__":
    arguments = parser(__doc__ or "", runs=3)
    arguments.add_argument("--small", type=int, default=2048, help="rows of the small job")
    arguments.add_argument("--large", type=int, default=10_240, help="rows of the large job")
    chosen = arguments.parse_args()
    with workplace(chosen) as place:
        results, described = measure(chosen, place)
    conclude(results, chosen, described)
