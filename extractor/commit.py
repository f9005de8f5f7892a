"""The second half of ingest: staged rows without their exact duplicates become shards of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import LeaseError
from common.lake import OWNER, READ_THREADS, Lake, shard_name
from common.lease import Lease
from common.logs import Progress, logger
from common.schemas import PAIRS, REJECTS
from extractor.staging import DIGEST_BYTES, StagedPart, rejects_name, staged_name
from extractor.tasks import Workers

REJECTS_PER_FILE = 50_000
FEW_SHARDS = 4
"""So many are written sooner than a local Ray starts."""

Piece = tuple[str, int, int]
"""A run of rows of a staged file: its name, first row, number of rows."""


@dataclass
class Committed:
    """What a commit added to the lake."""

    pairs: int = 0
    duplicates: int = 0
    modalities: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    first_shard: int = 0
    shards: int = 0


def manifest_name(ingest_id: str) -> str:
    """Name of the file that says that an ingest is part of the lake, relative to it."""
    return f"ingests/{ingest_id}.json"


def digests_name(ingest_id: str) -> str:
    """Name of the digests of an ingest's pairs, by which later ingests know duplicates."""
    return f"ingests/{ingest_id}.parquet"


def commit(
    lake: Lake,
    ingest_id: str,
    staged: list[StagedPart],
    shard_rows: int,
    workers: Workers,
    lease: Lease | None = None,
) -> Committed:
    """Write the shards, rejects and digests of a staged ingest; what a killed attempt wrote already is kept.

    Of exact duplicates the first in source order stays, or the one that is in the lake already.

    Raises:
        LeaseError: The lake is another ingest's to write by now.
    """
    files = [
        (staged_name(ingest_id, index, number), rows)
        for index, part in enumerate(staged)
        for number, rows in enumerate(part.rows)
    ]
    finished = finished_ingests(lake)
    digests = _read_digests(lake, [name for name, _ in files])
    keep = first_of_each(digests, _read_digests(lake, [digests_name(other["ingest_id"]) for other in finished]))
    plan = plan_shards(files, keep, shard_rows)
    first_shard, there = _clear_place(lake, ingest_id, finished, len(plan))
    pairs = int(keep.sum())
    done = Committed(pairs, len(keep) - pairs, first_shard=first_shard, shards=len(plan))
    todo = []
    for index, pieces in enumerate(plan, first_shard):
        if there.get(index) == sum(rows for _, _, rows in pieces):
            _count(done, _counts_of(lake.read_pairs(index, ["modality", "split"])))
        else:
            todo.append({"shard": index, "pieces": pieces})
    progress = Progress("ingest: writing", len(plan), "shards")
    progress.advance(len(plan) - len(todo))
    for _, counts in workers.run(todo, write_shard, lake, ingest_id, lease, few=FEW_SHARDS, threads=True):
        _count(done, counts)
        progress.advance(1)
    _write_rejects(lake, ingest_id, staged)
    lake.storage.write_table(digests_name(ingest_id), pa.table({"digest": _digest_array(digests[keep])}))
    return done


def first_of_each(digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which rows to keep: the first of each digest, unless it is known.

    Args:
        digests: bytes [N], one per row in source order.
        known: bytes [M], of pairs that are in the lake.

    Returns:
        bool [N]
    """
    keep = np.zeros(len(digests), bool)
    keep[np.unique(digests, return_index=True)[1]] = True
    return keep & ~np.isin(digests, known)


def plan_shards(files: list[tuple[str, int]], keep: np.ndarray, shard_rows: int) -> list[list[Piece]]:
    """Cut the kept rows of staged files, in order, into shards.

    Args:
        files: Name and number of rows of each staged file.
        keep: bool [N], one per row of all files together.
        shard_rows: Rows per shard; only the last may have fewer.
    """
    counts = np.array([rows for _, rows in files], np.int64)
    owner = np.repeat(np.arange(len(files)), counts)
    first = np.cumsum(counts) - counts
    kept = np.flatnonzero(keep)
    shards = []
    for begin in range(0, len(kept), shard_rows):
        rows = kept[begin : begin + shard_rows]
        is_break = (np.diff(rows) != 1) | (np.diff(owner[rows]) != 0)
        runs = np.split(rows, np.flatnonzero(is_break) + 1)
        shards.append([(files[owner[run[0]]][0], int(run[0] - first[owner[run[0]]]), len(run)) for run in runs])
    return shards


def write_shard(
    item: dict[str, Any], lake: Lake, ingest_id: str, lease: Lease | None = None
) -> dict[str, dict[str, int]]:
    """Copy staged rows into one shard of pairs; the task of a commit.

    Returns:
        Rows by modality and by split.
    """
    runs = []
    name, table = "", pa.table({})
    for wanted, begin, rows in item["pieces"]:
        if wanted != name:
            name, table = wanted, lake.storage.read_table(wanted, PAIRS.names)
        runs.append(table.slice(begin, rows))
    shard = pa.concat_tables(runs).cast(PAIRS)
    insist_on_lease(lake, lease)
    lake.storage.write_table(f"pairs/{shard_name(item['shard'])}", shard, {OWNER: ingest_id})
    return _counts_of(shard)


def insist_on_lease(lake: Lake, lease: Lease | None) -> None:
    """Before each file that others count on.

    Raises:
        LeaseError: Another ingest has taken over, because this one gave no sign of life for too long.
    """
    if lease is not None and not lease.is_held():
        raise LeaseError(
            f"{lake.uri} belongs to another ingest now, since this one was silent for {lease.seconds:g} s (a paused "
            "machine, or storage out of reach). Nothing more was written. Run the same command again when that other "
            "one has ended."
        )


def finished_ingests(lake: Lake) -> list[dict[str, Any]]:
    """Manifests of the ingests that are part of the lake."""
    names = lake.storage.list_files("ingests", ".json")
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(lambda name: dict(lake.storage.read_json(f"ingests/{name}")), names))


def _clear_place(lake: Lake, ingest_id: str, finished: list[dict[str, Any]], shards: int) -> tuple[int, dict[int, int]]:
    """Where this ingest's shards begin; shards that killed ingests left behind are removed.

    Returns:
        The first free index, and index -> rows of the shards this same ingest wrote before it was killed.
    """
    taken = {
        index for other in finished for index in range(other["first_shard"], other["first_shard"] + other["shards"])
    }
    unsure = [index for index in lake.files("pairs") if index not in taken]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        footers = pool.map(lambda index: lake.storage.read_metadata(f"pairs/{shard_name(index)}"), unsure)
        owners = {index: (rows, found.get(OWNER)) for index, (rows, found) in zip(unsure, footers, strict=True)}
    taken |= {index for index, (_, owner) in owners.items() if owner is None}  # written by hand: not ours to remove
    first = max(taken, default=-1) + 1
    ours = {index: rows for index, (rows, owner) in owners.items() if owner == ingest_id}
    ours = {index: rows for index, rows in ours.items() if first <= index < first + shards}
    for index in sorted(set(owners) - taken - set(ours)):
        logger.warning("ingest: removing shard %d, which an ingest that never finished left behind", index)
        lake.storage.remove(f"pairs/{shard_name(index)}")
    return first, ours


def _read_digests(lake: Lake, names: list[str]) -> np.ndarray:
    def read(name: str) -> bytes:
        column = lake.storage.read_table(name, ["digest"])["digest"]
        return b"".join(digest.as_py() for digest in column)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return np.frombuffer(b"".join(pool.map(read, names)), f"S{DIGEST_BYTES}")


def _digest_array(digests: np.ndarray) -> pa.Array:
    kind = pa.binary(DIGEST_BYTES)
    return pa.Array.from_buffers(kind, len(digests), [None, pa.py_buffer(digests.tobytes())])


def _counts_of(pairs: pa.Table) -> dict[str, dict[str, int]]:
    return {
        column: dict(Counter(value or "(none)" for value in pairs[column].to_pylist()))
        for column in ("modality", "split")
    }


def _count(done: Committed, counts: dict[str, dict[str, int]]) -> None:
    done.modalities.update(counts["modality"])
    done.splits.update(counts["split"])


def _write_rejects(lake: Lake, ingest_id: str, staged: Iterable[StagedPart]) -> None:
    """Gather the parts' rejects, in source order, into few files below ``rejects/stage=ingest/``."""
    names = [rejects_name(ingest_id, index) for index, part in enumerate(staged) if part.rejected]
    for number, table in enumerate(_merged(map(lake.storage.read_table, names))):
        lake.storage.write_table(f"rejects/stage=ingest/{ingest_id}-{number:06d}.parquet", table.cast(REJECTS))


def _merged(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= REJECTS_PER_FILE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
