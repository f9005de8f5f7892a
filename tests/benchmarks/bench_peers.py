"""Nine small teachers off one decode against nine passes of one teacher each through a plain DataLoader.

python tests/benchmarks/bench_peers.py [--teachers N] [--runs N] [--rows N] [--record]
"""

import argparse
import json
from functools import partial
from pathlib import Path

from material import first_shards, read_jpegs, write_lake, write_tiny_teachers
from paired import Comparison, conclude, in_turn, parser, run_way, workplace
from ways import marginal_rate, warn_of_short

SHARD_ROWS = 128
SHORT = 2
WARM_UP_SHARDS = 4
TARGET = 3.0


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """Compare the passes and extract on one lake and one set of teachers."""
    shards = max(2 * WARM_UP_SHARDS, options.rows // SHARD_ROWS)
    long = write_lake(folder / "long", read_jpegs(options.data), shards * SHARD_ROWS, SHARD_ROWS)
    lengths = [shards // SHORT, shards]
    short, warm_up = (
        first_shards(long, folder / name, n) for name, n in (("short", lengths[0]), ("warm-up", WARM_UP_SHARDS))
    )
    settings = json.loads(options.settings)
    order = {
        "warm_up": warm_up,
        "lakes": [short, long],
        "teachers": write_tiny_teachers(folder, options.teachers),
        "settings": settings,
    }
    title = f"{options.teachers} teachers off one decode against one pass each"
    by_clock = Comparison(title, "rows/s through all teachers", TARGET)
    by_work = Comparison(title, "rows per CPU second of all processes")

    def rate(way: str) -> None:
        found = run_way(way, order)
        if way == "extract":
            warn_of_short(found)
        rows = [n * SHARD_ROWS for n in lengths]
        by_clock.add(way, marginal_rate(rows, found["seconds"]))
        by_work.add(way, marginal_rate(rows, found["cpu_seconds"]))

    in_turn(options.runs, {way: partial(rate, way) for way in ("passes", "extract")})
    counts = " and ".join(str(n * SHARD_ROWS) for n in lengths)
    described = f"{options.teachers} tiny teachers, {counts} rows in shards of {SHARD_ROWS}"
    return [by_clock, by_work], f"{described}, settings {settings or 'default'}"


if __name__ == "__main__":
    arguments = parser(__doc__ or "", rows=1536)
    arguments.add_argument("--teachers", type=int, default=9, help="how many (at most 9)")
    arguments.add_argument("--settings", default="{}", help='of ExtractConfig, as JSON: {"hardware": {"threads": 2}}')
    chosen = arguments.parse_args()
    with workplace(chosen) as place:
        results, described = measure(chosen, place)
    conclude(results, chosen, described)
