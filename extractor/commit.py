"""The second half of ingest: staged rows become shards of pairs, once each."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import LeaseError, SourceError
from common.kept_columns import kept_schema
from common.lake import INGEST_REJECTS, OWNER, READ_THREADS, Lake, shard_name
from common.lease import Lease
from common.logs import Progress, logger
from common.schemas import REJECTS
from common.shard_files import CONTENT
from extractor.config import IngestConfig
from extractor.duplicates import (
    COMPARED,
    SPLITS,
    Conflict,
    Index,
    Verdicts,
    count_of,
    judge_rows,
    reason_of,
    settle_splits,
    split_codes,
    split_names,
    twin_ids,
)
from extractor.staging import (
    INDEX,
    ROW,
    StagedPart,
    another_id,
    digest_of,
    reject_row,
    rejects_name,
    staged_name,
    staging_folder,
)
from extractor.tasks import Workers
from extractor.tending.integrity import content_hash

DESCRIBED = ["sample_id", "source", "source_key", "sha256", *COMPARED]
"""What is read of rows that are of the same pair."""
REJECTS_PER_FILE = 50_000
REJECTS_NAME = re.compile(r"^([0-9a-f]{16})-\d{6}\.parquet$")
"""Of a file of rejects, as ingests write them; begins with the ingest's id."""
FEW_SHARDS = 4
"""So many are written sooner than a local Ray starts."""

MADE_OF = "mmkd.made_of"
"""Key of a shard's file metadata: a hash of the staged rows that it was made of."""

Piece = tuple[str, int, int]
"""A run of rows of a staged file: its name, first row, number of rows."""


@dataclass
class Committed:
    """What a commit added to the lake."""

    pairs: int = 0
    duplicates: int = 0
    merged: int = 0
    """Rows whose labels were added to a pair's."""
    contradictions: Counter[str] = field(default_factory=Counter)
    """Reason -> rows that were rejected because they contradict others."""
    without_captions: int = 0
    straddling: int = 0
    """Groups in several splits, as their sources have it."""
    modalities: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    first_shard: int = 0
    shards: int = 0


def manifest_name(ingest_id: str) -> str:
    """Name of the file that says that an ingest is part of the lake, relative to it."""
    return f"ingests/{ingest_id}.json"


def index_name(ingest_id: str) -> str:
    """Name of what tells an ingest's pairs apart, by which later ingests know duplicates; merged rows come behind."""
    return f"ingests/{ingest_id}.parquet"


def commit(
    lake: Lake,
    ingest_id: str,
    staged: list[StagedPart],
    config: IngestConfig,
    kept: Mapping[str, str],
    workers: Workers,
    lease: Lease | None = None,
) -> Committed:
    """Write the shards, rejects and index of a staged ingest; what a killed attempt wrote already is kept.

    What becomes of rows of the same pair is decided by :mod:`extractor.duplicates`.

    Args:
        lake: Where.
        ingest_id: Which.
        staged: Its parts, in source order.
        config: Shard size, and what becomes of contradictions.
        kept: Name -> type of the columns that the lake keeps beside its own.
        workers: Write the shards.
        lease: On the lake's pairs.

    Raises:
        SourceError: Two rows have one and the same id.
        LeaseError: The lake is another ingest's to write by now.
    """
    files = StagedFiles(lake, ingest_id, staged, kept)
    earlier = EarlierPairs(lake, finished_ingests(lake), kept)
    verdicts = judge_rows(
        files.index, earlier.index, earlier.merged, files.rows, earlier.rows, config.contradictions == "keep"
    )
    _refuse_twins(files, earlier, verdicts.keep_N)
    split_N, straddling = settle_splits(files.index, files.split_N, verdicts.keep_N, earlier.settled())
    changes = _changes(files, verdicts, split_N)
    plan = plan_shards(files.files, verdicts.keep_N, config.shard_rows)
    first_shard, there = _clear_place(lake, ingest_id, earlier.manifests, len(plan))
    places = np.flatnonzero(verdicts.keep_N)
    done = Committed(len(places), verdicts.duplicates, verdicts.merged, first_shard=first_shard, shards=len(plan))
    done.straddling = straddling
    if config.contradictions == "reject":
        done.contradictions = count_of(verdicts.conflicts)
    todo = []
    for index, pieces in enumerate(plan, first_shard):
        begin = (index - first_shard) * config.shard_rows
        rows = places[begin : begin + config.shard_rows]
        changed = {str(i): changes[row] for i, row in enumerate(rows.tolist()) if row in changes}
        # A part that was read anew may have brought other rows, and all but the last shard have as many.
        made_of = digest_of([pieces, changed, files.index.row_N[rows].tobytes().hex()]).hex()
        if there.get(index) == made_of:
            _count(done, _counts_of(lake.read_pairs(index, COUNTED)))
        else:
            todo.append({"shard": index, "pieces": pieces, "changes": changed, "made_of": made_of})
    progress = Progress("ingest: writing", len(plan), "shards")
    progress.advance(len(plan) - len(todo))
    for _, counts in workers.run(todo, write_shard, lake, ingest_id, dict(kept), lease, few=FEW_SHARDS, threads=True):
        _count(done, counts)
        progress.advance(1)
    conflicts = verdicts.conflicts if done.contradictions else []
    _write_rejects(lake, ingest_id, staged, conflicts, {manifest["ingest_id"] for manifest in earlier.manifests})
    lake.storage.write_table(index_name(ingest_id), _final_index(files, verdicts, split_N))
    return done


class StagedFiles:
    """The staged rows of an ingest, in source order.

    Attributes:
        files: Name and number of rows of each file.
        index: What tells the rows apart.
        split_N: Where each would be, given or drawn; places in ``SPLITS``.
    """

    def __init__(self, lake: Lake, ingest_id: str, staged: list[StagedPart], kept: Mapping[str, str]) -> None:
        self._lake = lake
        self._columns = [*DESCRIBED, *kept, "mmkd_split", ROW]
        self.files = [
            (staged_name(ingest_id, index, number), rows)
            for index, part in enumerate(staged)
            for number, rows in enumerate(part.rows)
        ]
        self._first = np.cumsum([0, *(rows for _, rows in self.files)])
        tables = _read_all(lake, [name for name, _ in self.files], [*INDEX.names, "split"])
        self.index = Index.of(table.select(INDEX.names) for table in tables)
        self.split_N = np.concatenate([np.empty(0, np.int8), *(split_codes(table["split"]) for table in tables)])

    def rows(self, places: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows without their pictures; ``places`` ascend, and ``split`` is what the source gave."""
        place_K = np.array(places, np.int64)
        owner_K = np.searchsorted(self._first, place_K, side="right") - 1
        for run in np.split(place_K, np.flatnonzero(np.diff(owner_K)) + 1) if len(place_K) else ():
            file = int(np.searchsorted(self._first, run[0], side="right")) - 1
            table = self._lake.storage.read_table(self.files[file][0], self._columns)
            for row in table.take(run - self._first[file]).to_pylist():
                yield {**row, "split": row["mmkd_split"]}


class EarlierPairs:
    """The pairs of the ingests that are part of the lake.

    Attributes:
        manifests: Of the ingests, in the order of their shards.
        index: What tells the pairs apart; splits are those that their sources gave.
        merged: Row digests that were merged into them, bytes [M].
    """

    def __init__(self, lake: Lake, manifests: list[dict[str, Any]], kept: Mapping[str, str]) -> None:
        self._lake = lake
        self._columns = [*DESCRIBED, *kept]
        self._rows = int(lake.info()["shard_rows"])
        self.manifests = sorted(manifests, key=lambda manifest: int(manifest["first_shard"]))
        tables = _read_all(lake, [index_name(manifest["ingest_id"]) for manifest in self.manifests])
        pairs = [int(manifest["pairs"]) for manifest in self.manifests]
        self._first = np.cumsum([0, *pairs])
        mains = [table.slice(0, count) for table, count in zip(tables, pairs, strict=True)]
        self.index = Index.of(main.select(INDEX.names) for main in mains)
        self.merged = Index.of(
            table.slice(count).select(INDEX.names) for table, count in zip(tables, pairs, strict=True)
        ).row_N
        self._split_N = np.concatenate([np.empty(0, np.int8), *(split_codes(main["split"]) for main in mains)])

    def settled(self) -> Index:
        """The index with the splits in which the pairs are."""
        return replace(self.index, split_N=self._split_N)

    def place(self, row: int) -> tuple[int, int]:
        """Shard and row within it."""
        owner = int(np.searchsorted(self._first, row, side="right")) - 1
        inside = row - int(self._first[owner])
        return int(self.manifests[owner]["first_shard"]) + inside // self._rows, inside % self._rows

    def rows(self, places: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows without their pictures; ``places`` ascend, and ``split`` is what the source gave."""
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for place in places:
            shard, row = self.place(place)
            by_shard.setdefault(shard, []).append((place, row))
        for shard, wanted in by_shard.items():
            table = self._lake.read_pairs(shard, self._columns).take([row for _, row in wanted])
            for (place, _), row in zip(wanted, table.to_pylist(), strict=True):
                yield {**row, "split": SPLITS[self.index.split_N[place]] or None}


def _read_all(lake: Lake, names: list[str], columns: list[str] | None = None) -> list[pa.Table]:
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(lambda name: lake.storage.read_table(name, columns), names))


def _refuse_twins(files: StagedFiles, earlier: EarlierPairs, keep_N: np.ndarray) -> None:
    twins = twin_ids(files.index, keep_N, earlier.index)
    if twins is None:
        return
    of_lake, first, later = twins
    (found,) = files.rows([later])
    (other,) = earlier.rows([of_lake]) if of_lake is not None else files.rows([int(first or 0)])
    where = "in the lake already" if of_lake is not None else f"row {other[ROW]} of {other['source']}"
    raise SourceError(
        f"The id {found['source_id']!r} names two rows: {other['source_key']} ({where}) and {found['source_key']} (row "
        f"{found[ROW]} of {found['source']}). Ids tell rows apart: mend the column, or name another with --id-column."
    )


def _changes(files: StagedFiles, verdicts: Verdicts, split_N: np.ndarray) -> dict[int, dict[str, Any]]:
    """Row -> column -> value, where a pair is not as its row was staged."""
    changes: dict[int, dict[str, Any]] = {}
    for row, labels in verdicts.labels.items():
        changes.setdefault(row, {})["labels"] = labels
    for row in np.flatnonzero(split_N != files.split_N).tolist():
        changes.setdefault(row, {})["split"] = SPLITS[split_N[row]]
    for conflict in verdicts.conflicts:
        if verdicts.keep_N[conflict.row]:
            found = conflict.found
            name = another_id(found["sample_id"], files.index.row_N[conflict.row])
            changes.setdefault(conflict.row, {})["sample_id"] = name
    return changes


def _conflict_row(conflict: Conflict) -> dict[str, Any]:
    """A row that contradicts another, for the ledger."""
    found, kept = conflict.found, conflict.kept
    said = "; ".join(f"{name} is {found.get(name)!r}, not {kept.get(name)!r}" for name in conflict.columns)
    detail = f"row {found[ROW]}: like {kept['source_key']} (sample {kept['sample_id']}), but {said}"
    return reject_row(
        found["source"],
        found["source_key"],
        found["source_id"],
        found[ROW],
        reason_of(conflict),
        detail,
        found["sha256"],
    )


def _final_index(files: StagedFiles, verdicts: Verdicts, split_N: np.ndarray) -> pa.Table:
    """The index of the pairs with the splits in which they are; rows that were merged into them come behind."""
    merged = np.array([row for row, _ in verdicts.also], np.int64)
    rows = np.concatenate([np.flatnonzero(verdicts.keep_N), merged]).astype(np.int64)
    return files.index.take(rows).table().append_column("split", split_names(split_N[rows]))


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
    item: dict[str, Any], lake: Lake, ingest_id: str, kept: Mapping[str, str], lease: Lease | None = None
) -> dict[str, dict[str, int]]:
    """Copy staged rows into one shard of pairs; the task of a commit.

    Returns:
        Rows by modality, by split, and by whether they have captions.
    """
    schema = kept_schema(kept)
    runs = []
    name, table = "", pa.table({})
    for wanted, begin, rows in item["pieces"]:
        if wanted != name:
            name, table = wanted, lake.storage.read_table(wanted, schema.names)
        runs.append(table.slice(begin, rows))
    shard = pa.concat_tables(runs).cast(schema)
    changes: dict[str, dict[int, Any]] = {}
    for row, values in item["changes"].items():
        for name, value in values.items():
            changes.setdefault(name, {})[int(row)] = value
    for name, by_row in changes.items():
        values = [by_row.get(row, value) for row, value in enumerate(shard[name].to_pylist())]
        place = schema.get_field_index(name)
        shard = shard.set_column(place, schema.field(place), pa.array(values, schema.field(place).type))
    metadata = {OWNER: ingest_id, MADE_OF: item["made_of"], CONTENT: content_hash(shard)}
    insist_on_lease(lake, lease)
    lake.storage.write_table(f"pairs/{shard_name(item['shard'])}", shard, metadata)
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


def _clear_place(lake: Lake, ingest_id: str, finished: list[dict[str, Any]], shards: int) -> tuple[int, dict[int, str]]:
    """Where this ingest's shards begin; shards that killed ingests left behind are removed.

    Returns:
        The first free index, and index -> what it is made of, for shards this same ingest wrote before it was killed.
    """
    taken, unclaimed = _unclaimed(lake, finished)
    taken |= {index for index, footer in unclaimed.items() if OWNER not in footer}  # by hand: not ours to remove
    first = max(taken, default=-1) + 1
    ours = {index: footer.get(MADE_OF, "") for index, footer in unclaimed.items() if footer.get(OWNER) == ingest_id}
    ours = {index: made_of for index, made_of in ours.items() if first <= index < first + shards}
    for index in sorted(set(unclaimed) - taken - set(ours)):
        logger.warning("ingest: removing shard %d, which an ingest that never finished left behind", index)
        lake.storage.remove(f"pairs/{shard_name(index)}")
    return first, ours


def _unclaimed(lake: Lake, finished: list[dict[str, Any]]) -> tuple[set[int], dict[int, dict[str, str]]]:
    """Shards that finished ingests claim, and the footers of the others that are there."""
    taken = {
        index for other in finished for index in range(other["first_shard"], other["first_shard"] + other["shards"])
    }
    unsure = [index for index in lake.files("pairs") if index not in taken]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        footers = pool.map(lambda index: lake.storage.read_metadata(f"pairs/{shard_name(index)}")[1], unsure)
        return taken, dict(zip(unsure, footers, strict=True))


def withdraw(lake: Lake, ingest_id: str) -> None:
    """Take away all that an ingest wrote which cannot be finished: staged files last, for they hide its shards."""
    _, unclaimed = _unclaimed(lake, finished_ingests(lake))
    for index, footer in unclaimed.items():
        if footer.get(OWNER) == ingest_id:
            lake.storage.remove(f"pairs/{shard_name(index)}")
    for name in lake.storage.list_files(INGEST_REJECTS):
        if name.startswith(f"{ingest_id}-"):
            lake.storage.remove(f"{INGEST_REJECTS}/{name}")
    lake.storage.remove(staging_folder(ingest_id))


COUNTED = ["modality", "split", "captions"]


def _counts_of(pairs: pa.Table) -> dict[str, dict[str, int]]:
    counts = {
        column: dict(Counter(value or "(none)" for value in pairs[column].to_pylist()))
        for column in ("modality", "split")
    }
    lengths = pc.list_value_length(pairs["captions"])
    return {**counts, "captions": {"none": int(pc.sum(pc.equal(lengths, 0)).as_py() or 0)}}


def _count(done: Committed, counts: dict[str, dict[str, int]]) -> None:
    done.modalities.update(counts["modality"])
    done.splits.update(counts["split"])
    done.without_captions += counts["captions"]["none"]


def _write_rejects(
    lake: Lake, ingest_id: str, staged: Iterable[StagedPart], conflicts: list[Conflict], finished: set[str]
) -> None:
    """Gather the parts' rejects, in source order, and contradictions into few files below ``rejects/ingest/``.

    What this ingest, or one that never finished, left there before is removed.
    """
    names = [rejects_name(ingest_id, index) for index, part in enumerate(staged) if part.rejected]
    written = set()
    for number, table in enumerate(_merged(itertools.chain(map(lake.storage.read_table, names), _tables(conflicts)))):
        written.add(f"{ingest_id}-{number:06d}.parquet")
        lake.storage.write_table(f"{INGEST_REJECTS}/{ingest_id}-{number:06d}.parquet", table.cast(REJECTS))
    for name in lake.storage.list_files(INGEST_REJECTS):
        found = REJECTS_NAME.match(name)  # others were written by hand
        if found and name not in written and found[1] not in finished:
            lake.storage.remove(f"{INGEST_REJECTS}/{name}")


def _tables(conflicts: list[Conflict]) -> Iterator[pa.Table]:
    for begin in range(0, len(conflicts), REJECTS_PER_FILE):
        rows = [_conflict_row(conflict) for conflict in conflicts[begin : begin + REJECTS_PER_FILE]]
        yield pa.Table.from_pylist(rows, schema=REJECTS)


def _merged(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= REJECTS_PER_FILE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
