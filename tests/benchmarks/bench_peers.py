"""Nine small teachers off one decode against nine passes of one teacher each through a plain DataLoader.

python tests/benchmarks/bench_peers.py [--teachers N] [--runs N] [--rows N] [--record]
"""

import argparse
import json
from pathlib import Path

from material import read_jpegs, write_lake, write_tiny_teachers
from paired import Comparison, compare_rates, conclude, parser, workplace

SHARD_ROWS = 512
PASS_ROWS = 1024
"""The passes' rate is that of so many rows; it does not depend on their number, and nine passes take long."""
TARGET = 3.0


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Comparison], str]:
    """Compare the passes and extract on one lake and one set of teachers."""
    settings, number = json.loads(options.settings), options.teachers
    order = {
        "lake": write_lake(folder / "lake", read_jpegs(options.data), options.rows, SHARD_ROWS),
        "teachers": write_tiny_teachers(folder, number),
        "settings": settings,
        "pass_rows": PASS_ROWS,
    }
    title = f"{number} teachers off one decode against one pass each"
    variants = {"extract, decode=fast": {**order, "settings": {**settings, "decode": "fast"}}}
    results = compare_rates(title, "passes", order, options, TARGET, variants)
    described = f"{number} tiny teachers, {options.rows} rows in shards of {SHARD_ROWS}"
    return results, f"{described}, settings {settings or 'default'}"


if __name__ == "__main__":
    arguments = parser(__doc__ or "", rows=12288)
    arguments.add_argument("--teachers", type=int, default=9, help="how many (at most 9)")
    arguments.add_argument("--settings", default="{}", help='of ExtractConfig, as JSON: {"hardware": {"threads": 2}}')
    chosen = arguments.parse_args()
    with workplace(chosen) as place:
        results, described = measure(chosen, place)
    conclude(results, chosen, described)
