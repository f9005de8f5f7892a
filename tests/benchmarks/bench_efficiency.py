"""Rows a second of extract against a loop written by hand, when the model bounds and when decoding bounds.

    python tests/benchmarks/bench_efficiency.py [--bound model|decode|both] [--runs N] [--rows N] [--record]

So many shards that those which are prepared ahead are under a tenth: with seven, as this bench once had, a run was over
before the engine had anything to wait for, and a driver that spun while it waited went unseen.
"""

import argparse
import json
from pathlib import Path

from material import read_jpegs, write_lake, write_small_teacher, write_tiny_teachers
from paired import Comparison, compare_rates, conclude, parser, workplace

ROWS = {"model": 4096, "decode": 12288}
SHARD_ROWS = {"model": 64, "decode": 256}
MICRO_BATCH = {"model": 64, "decode": 64}
TARGET = {"model": 0.90, "decode": 0.85}


def measure(bound: str, options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """Compare the loop and extract on a lake and teachers of their own."""
    rows, shard_rows, settings = options.rows or ROWS[bound], SHARD_ROWS[bound], json.loads(options.settings)
    order = {
        "lake": write_lake(folder / "lake", read_jpegs(options.data), rows, shard_rows),
        "teachers": write_small_teacher(folder) if bound == "model" else write_tiny_teachers(folder, 2),
        "micro_batch": MICRO_BATCH[bound],
        "settings": settings,
    }
    kind = "1 ViT-S/32" if bound == "model" else "2 tiny teachers"
    results = compare_rates(f"extract against a loop by hand, {bound} bounds", "loop", order, options, TARGET[bound])
    return results, f"{kind}, {rows} rows in shards of {shard_rows}, settings {settings or 'default'}"


if __name__ == "__main__":
    arguments = parser(__doc__ or "", rows=0)
    arguments.add_argument("--bound", choices=["model", "decode", "both"], default="both", help="what bounds the run")
    arguments.add_argument("--rows", type=int, help=f"rows of the lake (default {ROWS})")
    arguments.add_argument("--settings", default="{}", help='of ExtractConfig, as JSON: {"hardware": {"threads": 2}}')
    chosen = arguments.parse_args()
    for one in ["model", "decode"] if chosen.bound == "both" else [chosen.bound]:
        with workplace(chosen) as place:
            results, described = measure(one, chosen, place)
        conclude(results, chosen, described)
