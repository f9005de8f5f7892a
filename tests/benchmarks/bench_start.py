"""How soon the first shard is stored, and what a command and a resume cost that have nothing to do.

    python tests/benchmarks/bench_start.py [--runs N] [--shards N] [--record]

The first number is that of a whole ``mmkd extract`` in a fresh process; its baseline is a process that imports torch,
loads the same models and embeds the same shard by hand. The resume runs over a lake of 10,000 shards, once with the
ledgers that a run leaves, once without them (each file is then read in full); its baseline lists the two folders.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from material import ROOT, first_shards, read_jpegs, write_lake, write_tiny_teachers
from paired import Comparison, conclude, in_turn, parser, run_way, workplace
from whole import insist, run_whole

SHARD_ROWS = 256
SHARDS = 4
LOOK_SECONDS = 0.02
START_TARGET, NOTHING_TARGET = 1.3, 2.0


def first_shard_by_command(lake: str, teachers: list[str]) -> float:
    """Seconds from the start of ``mmkd extract`` to the first stored shard that all teachers have; the run goes on."""
    for left in ("features", "manifests", "runs", "rejects"):
        shutil.rmtree(Path(lake) / left, ignore_errors=True)
    program = "import sys; from cluster.cli import main; sys.argv[0] = 'mmkd'; main()"
    command = [sys.executable, "-c", program, "extract", lake, "--teachers", ",".join(teachers)]
    files = [Path(lake) / "features" / f"teacher={one.partition('=')[0]}" for one in teachers]
    started = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        seconds = 0.0
        while not seconds and process.poll() is None:
            stored = [{file.name for file in folder.glob("shard-*.parquet")} for folder in files]
            if set.intersection(*stored):
                seconds = time.perf_counter() - started
            time.sleep(LOOK_SECONDS)
        process.wait()
    if process.returncode:
        sys.exit(f"mmkd extract {lake} ended with status {process.returncode}; run it by hand to see why.")
    return seconds or time.perf_counter() - started


def command(*arguments: str) -> float:
    """Seconds of a whole command of mmkd."""
    known = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return insist(run_whole([sys.executable, "-m", "cluster.cli", *arguments], known)).seconds


def first_shard_by_hand(lake: str, teachers: list[str]) -> float:
    """Seconds of a process that starts, loads the models and embeds one shard."""
    started = time.perf_counter()
    run_way("loop", {"lake": lake, "teachers": teachers})
    return time.perf_counter() - started


def write_finished_lake(folder: Path, jpegs: list[bytes], shards: int, teacher: str) -> str:
    """A lake of one-row shards that a teacher has finished, written file by file without a model."""
    import numpy as np
    import pyarrow as pa

    from common.lake import open_lake
    from common.schemas import features_schema
    from extractor.config import ExtractConfig
    from extractor.partitions import describe_inputs, find_teachers, identity_of, record_teacher
    from extractor.prepare import fixed_rows
    from extractor.sink import write_single

    lake = open_lake(write_lake(folder, [min(jpegs, key=len)[:100]], shards, 1))  # no picture is looked at
    config = ExtractConfig(teachers=(teacher,))
    (item,) = describe_inputs(find_teachers(config), config).values()
    identity = identity_of(item, config)
    manifest = record_teacher(lake, item, identity, 100.0, None)
    dim = item.description.image_dim or 0
    schema = features_schema(dim, dim, False)
    for index in range(shards):
        ids = lake.read_pairs(index, ["sample_id"])["sample_id"]
        unit = np.eye(dim, dtype=np.float32)[[index % dim]]
        columns = {
            "sample_id": ids.combine_chunks(),
            "image_embedding": fixed_rows(unit),
            "text_embedding": fixed_rows(unit),
            "image_norm": pa.array([1.0], pa.float32()),
            "text_norm": pa.array([1.0], pa.float32()),
            "extra_text_embeddings": pa.array([[]], schema.field("extra_text_embeddings").type),
        }
        write_single(lake, item.name, index, pa.table(columns, schema=schema), manifest)
    return str(folder)


def resume(lake: str, teacher: str, trust: bool) -> float:
    """Seconds of an extract that finds everything there; without trust, the ledgers are removed first."""
    from extractor.config import ExtractConfig
    from extractor.pipeline import extract

    if not trust:
        shutil.rmtree(Path(lake) / "manifests" / "valid", ignore_errors=True)
    started = time.perf_counter()
    report = extract(lake, ExtractConfig(teachers=(teacher,)))
    seconds = time.perf_counter() - started
    if report.shards or not report.skipped:
        sys.exit(f"{lake} was to be finished, and {report.shards} files were computed; mend write_finished_lake.")
    return seconds


def listing(lake: str, teacher: str) -> float:
    """Seconds to list the two folders with the sizes of their files."""
    started = time.perf_counter()
    for folder in (Path(lake) / "pairs", Path(lake) / "features" / f"teacher={teacher.partition('=')[0]}"):
        with os.scandir(folder) as entries:
            for entry in entries:
                entry.stat()
    return time.perf_counter() - started


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """All comparisons."""
    jpegs = read_jpegs(options.data)
    teachers = write_tiny_teachers(folder, 2)
    lake = write_lake(folder / "lake", jpegs, SHARDS * SHARD_ROWS, SHARD_ROWS)
    one_shard = first_shards(lake, folder / "one-shard", 1)
    finished = write_finished_lake(folder / "finished", jpegs, options.shards, teachers[0])
    start = Comparison("start to the first stored shard", "seconds", START_TARGET, at_most=True)
    nothing = Comparison("extract with nothing to do against verify", "seconds", NOTHING_TARGET, at_most=True)
    again = Comparison(f"resume with nothing to do, {options.shards} shards", "seconds")
    ways = {
        "by hand, not stored": lambda: first_shard_by_hand(one_shard, teachers),
        "mmkd extract": lambda: first_shard_by_command(lake, teachers),
    }
    in_turn(options.runs, {way: partial(_add, start, way, measured) for way, measured in ways.items()})
    ways = {
        "verify": lambda: command("verify", lake),
        "extract": lambda: command("extract", lake, "--teachers", ",".join(teachers)),
    }
    in_turn(options.runs, {way: partial(_add, nothing, way, measured) for way, measured in ways.items()})
    ways = {
        "bare listing": lambda: listing(finished, teachers[0]),
        "resume without ledgers": lambda: resume(finished, teachers[0], trust=False),
        "resume": lambda: resume(finished, teachers[0], trust=True),
    }
    in_turn(options.runs, {way: partial(_add, again, way, measured) for way, measured in ways.items()})
    return [start, nothing, again], f"2 tiny teachers, shards of {SHARD_ROWS}; resume: 1 teacher, local disk"


def _add(comparison: Comparison, way: str, measured: object) -> None:
    comparison.add(way, measured())  # type: ignore[operator]


if __name__ == "__main__":
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shards", type=int, default=10_000, help="of the lake that is resumed")
    chosen = arguments.parse_args()
    with workplace(chosen) as place:
        results, described = measure(chosen, place)
    conclude(results, chosen, described)
