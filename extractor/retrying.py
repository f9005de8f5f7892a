"""Rejected rows, tried again: dead links that live now, pictures that were not there yet, limits that were raised.

``mmkd ingest --retry-rejects`` reads those rows of a source that the ledger has, and only those. What becomes of them
is an ingest like any other, with shards behind those that are there. When it is part of the lake, the rows leave the
ledger of the earlier ingests; what failed again stands in its own.
"""

from __future__ import annotations

from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa

from common.config import fingerprint
from common.lake import INGEST_REJECTS, READ_THREADS, Lake
from extractor.sources.addresses import short_name
from extractor.sources.record import Part

REST = ("damaged parquet", "truncated tar")
"""Rejects that stand for all rows from theirs on."""

ROW = ["source", "source_key", "row"]
"""Columns that together name a row."""
Row = tuple[str, str, int]
"""Source, source key and place of a rejected row."""


@dataclass(frozen=True)
class Retry:
    """What is to be read again."""

    parts: list[Part]
    rows: frozenset[Row]
    """Of the ledger."""
    identity: str
    """Depends on the rows, so that a later retry of others is another."""


def find_rejects(lake: Lake, parts: list[Part]) -> Retry:
    """The parts of some sources that hold rejected rows, reduced to these."""
    by_source: dict[str, list[int]] = {}
    for place, part in enumerate(parts):
        by_source.setdefault(short_name(part.uri), []).append(place)
    rows: set[Row] = set()
    wanted: dict[int, set[int]] = {}
    entire: set[int] = set()
    for name in lake.storage.list_files(INGEST_REJECTS):
        for reject in lake.storage.read_table(f"{INGEST_REJECTS}/{name}", [*ROW, "reason"]).to_pylist():
            key, row = reject["source_key"], reject["row"]
            places = [i for i in by_source.get(reject["source"], ()) if key.startswith(f"{parts[i].name}/")]
            if row is None or not places:
                continue
            place = places[max(bisect_left([parts[i].first_row for i in places], row) - 1, 0)]
            rows.add((reject["source"], key, row))
            wanted.setdefault(place, set()).add(row)
            if reject["reason"] in REST:
                entire.add(place)
    again = [
        replace(parts[place], rows=None if place in entire else tuple(sorted(found)))
        for place, found in sorted(wanted.items())
    ]
    return Retry(again, frozenset(rows), fingerprint(sorted(rows)))


def strike_out(lake: Lake, rows: frozenset[Row], ingest_id: str) -> None:
    """Take rows out of the ledger of all ingests but one; doing it twice does no harm."""

    def shorten(name: str) -> None:
        path = f"{INGEST_REJECTS}/{name}"
        table = lake.storage.read_table(path)
        there = zip(*(table[column].to_pylist() for column in ROW), strict=True)
        left = table.filter(pa.array([row not in rows for row in there], pa.bool_()))
        if left.num_rows == 0:
            lake.storage.remove(path)
        elif left.num_rows < table.num_rows:
            lake.storage.write_table(path, left)

    others = [name for name in lake.storage.list_files(INGEST_REJECTS) if not name.startswith(f"{ingest_id}-")]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(shorten, others))
