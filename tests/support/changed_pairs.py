"""Lakes whose pairs are changed by hand, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from common.lake import Lake, shard_name


def change_rows(lake: Lake, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    """Write the pairs again with each row replaced by what ``change`` makes of its number in the lake and itself."""
    number = 0
    for shard in lake.shards():
        table = lake.read_pairs(shard)
        rows = [change(number + place, row) for place, row in enumerate(table.to_pylist())]
        number += table.num_rows
        lake.storage.write_table(f"pairs/{shard_name(shard)}", pa.Table.from_pylist(rows, schema=table.schema))


def without_captions(lake: Lake, which: Callable[[int], bool] = lambda number: True) -> Lake:
    """Take the captions away from the rows whose number is chosen, by default from all; returns the lake."""
    change_rows(lake, lambda number, row: {**row, "captions": [] if which(number) else row["captions"]})
    return lake
