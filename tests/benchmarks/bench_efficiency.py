"""Rows a second of extract against a loop written by hand, when the model bounds and when decoding bounds.

python tests/benchmarks/bench_efficiency.py [--bound model|decode|both] [--runs N] [--rows N] [--record]
"""

import argparse
import json
from functools import partial
from pathlib import Path

from material import first_shards, read_jpegs, write_base_teacher, write_lake, write_tiny_teachers
from paired import Comparison, conclude, in_turn, parser, run_way, workplace
from ways import marginal_rate, warn_of_short

ROWS = {"model": 512, "decode": 6144}
SHARD_ROWS = {"model": 64, "decode": 256}
MICRO_BATCH = {"model": 32, "decode": 64}
TARGET = {"model": 0.90, "decode": 0.85}
SHORT = 2
"""The longer lake has so many times the shards of the shorter one."""
WARM_UP_SHARDS = 4
"""As many as are prepared at the same time on a small machine, so that no process is started later."""


def measure(bound: str, options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """Compare the loop and extract on lakes and teachers of their own."""
    shard_rows = SHARD_ROWS[bound]
    shards = max(2 * WARM_UP_SHARDS, (options.rows or ROWS[bound]) // shard_rows)
    long = write_lake(folder / "long", read_jpegs(options.data), shards * shard_rows, shard_rows)
    lengths = [shards // SHORT, shards]
    short, warm_up = (
        first_shards(long, folder / name, n) for name, n in (("short", lengths[0]), ("warm-up", WARM_UP_SHARDS))
    )
    teachers = write_base_teacher(folder) if bound == "model" else write_tiny_teachers(folder, 2)
    settings = json.loads(options.settings)
    order = {
        "warm_up": warm_up,
        "lakes": [short, long],
        "teachers": teachers,
        "micro_batch": MICRO_BATCH[bound],
        "settings": settings,
    }
    title = f"extract against a loop by hand, {bound} bounds"
    by_clock = Comparison(title, "rows/s", TARGET[bound])
    by_work = Comparison(title, "rows per CPU second of all processes")

    def rate(way: str) -> None:
        found = run_way(way, order)
        if way == "extract":
            warn_of_short(found)
        rows = [n * shard_rows for n in lengths]
        by_clock.add(way, marginal_rate(rows, found["seconds"]))
        by_work.add(way, marginal_rate(rows, found["cpu_seconds"]))

    in_turn(options.runs, {way: partial(rate, way) for way in ("loop", "extract")})
    kind = "1 ViT-B/32" if bound == "model" else "2 tiny teachers"
    counts = " and ".join(str(n * shard_rows) for n in lengths)
    return [by_clock, by_work], f"{kind}, {counts} rows in shards of {shard_rows}, settings {settings or 'default'}"


if __name__ == "__main__":
    arguments = parser(__doc__ or "", rows=0)
    arguments.add_argument("--bound", choices=["model", "decode", "both"], default="both", help="what bounds the run")
    arguments.add_argument("--rows", type=int, help=f"rows of the longer lake (default {ROWS})")
    arguments.add_argument("--settings", default="{}", help='of ExtractConfig, as JSON: {"hardware": {"threads": 2}}')
    chosen = arguments.parse_args()
    for one in ["model", "decode"] if chosen.bound == "both" else [chosen.bound]:
        with workplace(chosen) as place:
            results, described = measure(one, chosen, place)
        conclude(results, chosen, described)
