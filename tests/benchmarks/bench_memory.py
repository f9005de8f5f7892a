"""Peak memory of a long extraction against a short one, and whether Ray's object store spills.

python tests/benchmarks/bench_memory.py [--runs N] [--rows N] [--record]
"""

import argparse
import json
from functools import partial
from pathlib import Path

from material import first_shards, read_jpegs, write_base_teacher, write_lake, write_tiny_teachers
from paired import Comparison, conclude, in_turn, parser, run_way, workplace

TENTH = 10
TARGET = 1.15
GIB = 1 << 30


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """Compare a lake with one of a tenth of its shards, each run in a Ray of its own."""
    shards = max(TENTH, options.rows // options.shard_rows)
    long = write_lake(folder / "long", read_jpegs(options.data), shards * options.shard_rows, options.shard_rows)
    short = first_shards(long, folder / "short", shards // TENTH)
    settings = json.loads(options.settings)
    bound = options.bound == "model"
    teachers = write_base_teacher(folder) if bound else write_tiny_teachers(folder, options.teachers)
    names = {short: f"{shards // TENTH * options.shard_rows} rows", long: f"{shards * options.shard_rows} rows"}
    comparisons = {
        "rss": Comparison("peak memory, RSS of all processes", "GiB", TARGET, at_most=True),
        "pss": Comparison("peak memory, shared pages counted once", "GiB", TARGET, at_most=True),
        "object_store": Comparison("peak of the object store", "GiB"),
    }
    spilled = []

    def watch(lake: str) -> None:
        found = run_way("watched", {"lake": lake, "teachers": teachers, "settings": settings})
        for name, comparison in comparisons.items():
            comparison.add(names[lake], found[name] / GIB)
        spilled.append(found["spilled"])

    in_turn(options.runs, {names[lake]: partial(watch, lake) for lake in (short, long)})
    said = "spilled nothing" if not any(spilled) else f"SPILLED up to {max(spilled) / GIB:.2f} GiB"
    print(f"\nThe object store {said} in {len(spilled)} runs (target: nothing).")
    kind = "1 ViT-B/32" if bound else f"{options.teachers} tiny teachers"
    described = f"{kind}, shards of {options.shard_rows}, settings {settings or 'default'}"
    return list(comparisons.values()), f"{described}; {said}"


if __name__ == "__main__":
    arguments = parser(__doc__ or "", runs=5, rows=20480)
    arguments.add_argument("--bound", choices=["model", "decode"], default="decode", help="model: a ViT-B/32, slow")
    arguments.add_argument("--teachers", type=int, default=2, help="how many (at most 9)")
    arguments.add_argument("--shard-rows", type=int, default=256, help="rows per shard")
    arguments.add_argument("--settings", default="{}", help='of ExtractConfig, as JSON: {"hardware": {"threads": 2}}')
    chosen = arguments.parse_args()
    with workplace(chosen) as place:
        results, described = measure(chosen, place)
    conclude(results, chosen, described)
