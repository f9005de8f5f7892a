"""Rejected rows, tried again: dead links that live now, pictures that were not there yet, limits that were raised.

``mmkd ingest --retry-rejects`` reads those rows of a source that the ledger has, and only those. What becomes of them
is an ingest like any other, with shards behind those that are there. When it is part of the lake, the rows that were
read leave the ledger of the earlier ingests; what failed again stands in its own. Which rows leave is written down
with the staged files before the ingest is part of the lake, so that whoever comes after a kill can finish it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from common.config import fingerprint
from common.lake import INGEST_REJECTS, READ_THREADS, Lake
from common.logs import logger
from common.storage import absolute_address, address_from
from common.storage_errors import without_secrets
from extractor.commit import REJECTS_NAME, finished_ingests, manifest_name
from extractor.sources.addresses import short_name
from extractor.sources.record import Part
from extractor.staging import ROW as STAGED_ROW
from extractor.staging import StagedPart, rejects_name, staged_name, staging_folder

REST = ("damaged parquet", "truncated tar")
"""Rejects that stand for all rows from theirs on."""
ROW = ["source", "source_key", "row"]
"""Columns that together name a row."""
Row = tuple[str, str, int]
"""Source, source key and place of a rejected row."""
RETRIED = "retried.parquet"
"""Among the staged files: the rows that leave the ledger."""


@dataclass(frozen=True)
class Retry:
    """What is to be read again."""

    parts: list[Part]
    rows: Counter[Row]
    """Of the ledger -> how often they are there."""
    rests: frozenset[Row]
    """Of these, those that stand for all rows from theirs on."""
    identity: str
    """Depends on the rows and on who rejected them last, so that a retry is never taken for an earlier one."""


def find_rejects(lake: Lake, parts: list[Part]) -> Retry:
    """The parts of some sources that hold rejected rows of finished ingests, reduced to these."""
    finished = {manifest["ingest_id"]: manifest for manifest in finished_ingests(lake)}
    parts_of: dict[str, dict[str, list[int]]] = {}
    for place, part in enumerate(parts):
        parts_of.setdefault(short_name(part.uri), {}).setdefault(part.name, []).append(place)
    first_rows = {
        (source, name): [parts[place].first_row for place in places]
        for source, names in parts_of.items()
        for name, places in names.items()
    }
    rows: Counter[Row] = Counter()
    rests: set[Row] = set()
    wanted: dict[int, set[int]] = {}
    entire: set[int] = set()
    files: list[str] = []
    unknown = 0
    for file in lake.storage.list_files(INGEST_REJECTS):
        found = REJECTS_NAME.match(file)
        if found is None or found[1] not in finished:
            continue
        manifest = finished[found[1]]
        for reject in lake.storage.read_table(f"{INGEST_REJECTS}/{file}", [*ROW, "reason"]).to_pylist():
            source, key, row = reject["source"], reject["source_key"], reject["row"]
            if row is None or source not in parts_of:
                continue
            name = next((name for name in parts_of[source] if key.startswith(f"{name}/")), None)
            places = parts_of[source].get(name or "", [])
            if not places or not _is_of(manifest, parts[places[0]].uri, lake):
                unknown += 1
                continue
            place = places[max(bisect_left(first_rows[source, str(name)], row) - 1, 0)]
            rows[source, key, row] += 1
            wanted.setdefault(place, set()).add(row)
            if reject["reason"] in REST:
                entire.add(place)
                rests.add((source, key, row))
            if not files or files[-1] != file:
                files.append(file)
    if unknown and not rows:
        logger.warning(
            "ingest: the ledger has %d rows of sources that are called like these, and were ingested from elsewhere: "
            "name the sources as you did then",
            unknown,
        )
    again = [
        replace(parts[place], rows=None if place in entire else tuple(sorted(found)))
        for place, found in sorted(wanted.items())
    ]
    return Retry(again, rows, frozenset(rests), fingerprint([sorted(rows), files]))


def _is_of(manifest: dict[str, Any], uri: str, lake: Lake) -> bool:
    """Whether an ingest read this file: what it was told of sources begins its address."""
    address = absolute_address(without_secrets(uri))
    roots = (re.split(r"[*?\[{]", address_from(source, lake.uri))[0] for source in manifest["sources"])
    return any(address.startswith(root) for root in roots)


def note_read(lake: Lake, ingest_id: str, staged: list[StagedPart], retry: Retry) -> int:
    """Write down which rows of the ledger were read, before they count; returns how many entries that are.

    A row that is another one by now, because its table was changed, keeps its entry.
    """
    read: set[Row] = set()
    for index, part in enumerate(staged):
        names = [staged_name(ingest_id, index, file) for file in range(len(part.rows))]
        for name in names:
            read |= _rows_in(lake, name, STAGED_ROW)
        if part.rejected:
            read |= _rows_in(lake, rejects_name(ingest_id, index), "row")
    struck = [row for row in retry.rows if row in read or row in retry.rests]
    if len(struck) < len(retry.rows):
        logger.warning(
            "ingest: %d rows of the ledger are not where they were, because their table was changed; they stay in it",
            len(retry.rows) - len(struck),
        )
    table = pa.table([list(column) for column in zip(*struck, strict=True)] or [[], [], []], names=ROW)
    schema = pa.schema([("source", pa.string()), ("source_key", pa.string()), ("row", pa.int64())])
    lake.storage.write_table(f"{staging_folder(ingest_id)}/{RETRIED}", table.cast(schema))
    return sum(retry.rows[row] for row in struck)


def _rows_in(lake: Lake, name: str, place: str) -> set[Row]:
    table = lake.storage.read_table(name, ["source", "source_key", place])
    return set(zip(*(table[column].to_pylist() for column in ("source", "source_key", place)), strict=True))


def finish_killed(lake: Lake) -> None:
    """Do what ingests that are part of the lake were killed before: strike out rows, and remove staged files.

    To be called by whoever holds the lease.
    """
    for ingest_id in lake.storage.list_folders("ingest"):
        if lake.storage.exists(manifest_name(ingest_id)):
            finish(lake, ingest_id)


def finish(lake: Lake, ingest_id: str) -> None:
    """The last step of an ingest that is part of the lake; doing it twice does no harm."""
    retried = f"{staging_folder(ingest_id)}/{RETRIED}"
    if lake.storage.exists(retried):
        _strike_out(lake, _rows_in(lake, retried, "row"), ingest_id)
    lake.storage.remove(staging_folder(ingest_id))


def _strike_out(lake: Lake, rows: set[Row], ingest_id: str) -> None:
    """Take rows out of the ledger of all ingests but one."""

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
