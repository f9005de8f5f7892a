"""Which rows of an ingest become pairs: exact duplicates, rows that say more about a pair, and contradictions.

Two rows are of the same pair if they have the same picture and the same captions. If every column that is kept is
equal, too, the later one is an exact duplicate. If only their labels differ they are merged into the first, which gets
the labels of both. Otherwise they contradict each other, and the later one is rejected (or kept, by a setting), with
the names of the columns. Rows of earlier ingests come first; their shards are never rewritten, so that new labels for
them are contradictions, too.

The driver has some fifty bytes in memory for each row, and about a kilobyte for each that is of the same pair as
another without being its exact duplicate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.schemas import PAIRS
from extractor.staging import DIGEST_BYTES, INDEX

SPLITS = ("", "train", "val", "test")
"""Codes of splits; 0 is none given."""
CONTRADICTS = "contradicts another row"
"""How the reason of such a reject begins; the columns come behind."""
COMPARED = ("split", "modality", "dataset", "group_id", "source_id", "license", "labels")
"""Columns in the order in which a contradiction names them; those that the lake keeps beside come behind."""


@dataclass(frozen=True)
class Index:
    """What tells rows apart, one entry for each row, in order; N rows."""

    pair_N: np.ndarray
    """bytes [N]"""
    row_N: np.ndarray
    """bytes [N]"""
    group_N: np.ndarray
    """uint64 [N], 0 for none"""
    id_N: np.ndarray
    """uint64 [N], 0 for none"""
    split_N: np.ndarray
    """int8 [N], places in ``SPLITS``"""

    def __len__(self) -> int:
        return len(self.pair_N)

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> Index:
        """The index of tables with the columns of ``INDEX``."""
        found = list(tables)
        table = pa.concat_tables(found) if found else INDEX.empty_table()
        return cls(
            _bytes(table["mmkd_pair"]),
            _bytes(table["mmkd_row"]),
            table["mmkd_group"].to_numpy().astype(np.uint64),
            table["mmkd_id"].to_numpy().astype(np.uint64),
            split_codes(table["mmkd_split"]),
        )

    def take(self, rows: np.ndarray) -> Index:
        """Some rows."""
        columns = (self.pair_N, self.row_N, self.group_N, self.id_N, self.split_N)
        return Index(*(column[rows] for column in columns))

    def table(self) -> pa.Table:
        """The inverse of :meth:`of`."""
        kind = pa.binary(DIGEST_BYTES)
        digests = (
            pa.Array.from_buffers(kind, len(self), [None, pa.py_buffer(np.ascontiguousarray(column).tobytes())])
            for column in (self.pair_N, self.row_N)
        )
        columns = [*digests, pa.array(self.group_N), pa.array(self.id_N), split_names(self.split_N)]
        return pa.table(columns, schema=INDEX)


def split_codes(column: pa.ChunkedArray) -> np.ndarray:
    """Names of splits, or null, as places in ``SPLITS``: int8 [N]."""
    found = pc.fill_null(pc.index_in(column, value_set=pa.array(SPLITS[1:])), -1)
    return found.to_numpy().astype(np.int8) + np.int8(1)


def split_names(codes: np.ndarray) -> pa.Array:
    """The inverse."""
    return pa.array([None, *SPLITS[1:]], pa.string()).take(pa.array(codes))


def _bytes(column: pa.ChunkedArray) -> np.ndarray:
    buffers = (
        chunk.buffers()[1].slice(chunk.offset * DIGEST_BYTES, len(chunk) * DIGEST_BYTES)
        for chunk in column.chunks
        if len(chunk)
    )
    return np.frombuffer(b"".join(buffers), f"S{DIGEST_BYTES}")


@dataclass
class Conflict:
    """A row that contradicts another of the same pair."""

    row: int
    """Place among the staged rows."""
    columns: tuple[str, ...]
    """Where they differ."""
    kept: dict[str, Any]
    """The row that stands."""
    found: dict[str, Any]
    """The row that does not."""


@dataclass
class Verdicts:
    """What becomes of the staged rows; N of them."""

    keep_N: np.ndarray
    """bool [N]: which become pairs."""
    duplicates: int = 0
    merged: int = 0
    labels: dict[int, list[str]] = field(default_factory=dict)
    """Row -> its labels and those of the rows merged into it."""
    also: list[tuple[int, int]] = field(default_factory=list)
    """(merged row, the row that has its labels now)"""
    conflicts: list[Conflict] = field(default_factory=list)


def judge_rows(
    staged: Index,
    lake: Index,
    merged: np.ndarray,
    read_staged: Callable[[Sequence[int]], Iterator[dict[str, Any]]],
    read_lake: Callable[[Sequence[int]], Iterator[dict[str, Any]]],
    keep_contradictions: bool,
) -> Verdicts:
    """Decide about all rows of an ingest.

    Args:
        staged: Its rows, in source order.
        lake: The pairs of earlier ingests.
        merged: Row digests that earlier ingests merged into those, bytes [M].
        read_staged: From rows to their columns but the picture, in the same order.
        read_lake: The same of the lake's rows; ``split`` is what the source gave in both.
        keep_contradictions: Whether rows that contradict others become pairs, too.
    """
    known = np.isin(staged.row_N, np.concatenate([lake.row_N, merged]))
    first = np.zeros(len(staged), bool)
    first[np.unique(staged.row_N, return_index=True)[1]] = True
    distinct = first & ~known
    verdicts = Verdicts(distinct.copy(), duplicates=int((~distinct).sum()))
    # Of the rows that are left, those whose pair is there already.
    rows = np.flatnonzero(distinct)
    pairs, codes = np.unique(np.concatenate([lake.pair_N, staged.pair_N[rows]]), return_inverse=True)
    in_lake, of_rows = codes[: len(lake)], codes[len(lake) :]
    counts = np.bincount(of_rows, minlength=len(pairs))
    shared = (counts > 1) | ((counts > 0) & np.isin(np.arange(len(pairs)), in_lake))
    doubtful, doubtful_pairs = rows[shared[of_rows]], of_rows[shared[of_rows]]
    if not len(doubtful):
        return verdicts
    standing: dict[int, list[tuple[int | None, dict[str, Any]]]] = {}
    lake_rows = np.flatnonzero(shared[in_lake])
    for place, found in zip(lake_rows, read_lake(lake_rows.tolist()), strict=True):
        standing.setdefault(int(in_lake[place]), []).append((None, found))
    places = doubtful.tolist()
    for row, pair, found in zip(places, doubtful_pairs.tolist(), read_staged(places), strict=True):
        others = standing.setdefault(pair, [])
        if others and not _settle(verdicts, row, found, others, keep_contradictions):
            continue
        others.append((row, found))
    return verdicts


def _settle(
    verdicts: Verdicts,
    row: int,
    found: dict[str, Any],
    others: list[tuple[int | None, dict[str, Any]]],
    keep_contradictions: bool,
) -> bool:
    """Judge a row whose pair is there already; returns whether it is to be one, too."""
    for place, other in others:
        if differing(other, found) not in ((), ("labels",)):
            continue
        more = [label for label in found["labels"] if label not in other["labels"]]
        if not more:
            verdicts.keep_N[row] = False
            verdicts.duplicates += 1
            return False
        if place is None:
            continue  # it is in the lake, and shards are never rewritten
        verdicts.keep_N[row] = False
        other["labels"] = [*other["labels"], *more]
        verdicts.labels[place] = other["labels"]
        verdicts.also.append((row, place))
        verdicts.merged += 1
        return False
    other = others[0][1]
    verdicts.conflicts.append(Conflict(row, differing(other, found), other, found))
    verdicts.keep_N[row] = keep_contradictions
    return keep_contradictions


def differing(left: dict[str, Any], right: dict[str, Any]) -> tuple[str, ...]:
    """Names of the columns in which two rows of the same pair differ, as the source gave them."""
    kept = [name for name in right if name not in PAIRS.names and not name.startswith("mmkd_")]
    return tuple(name for name in (*COMPARED, *kept) if left.get(name) != right.get(name))


def settle_splits(staged: Index, drawn_N: np.ndarray, keep_N: np.ndarray, lake: Index) -> tuple[np.ndarray, int]:
    """Give rows without a split of their own that of their group, where a source or the lake says it.

    Args:
        staged: The rows of an ingest; ``split_N`` is what the source gave.
        drawn_N: The split that each has otherwise: given, or drawn for it; places in ``SPLITS``.
        keep_N: bool [N], which of them become pairs.
        lake: The pairs of earlier ingests; ``split_N`` is where they are.

    Returns:
        int8 [N], where the rows are; and how many groups of this ingest are in several splits because a source says so.
    """
    says_N = keep_N & (staged.group_N > 0) & (staged.split_N > 0)
    in_lake = lake.group_N > 0
    group_M = np.concatenate([lake.group_N[in_lake], staged.group_N[says_N]])
    split_M = np.concatenate([lake.split_N[in_lake], staged.split_N[says_N]])
    known, first = np.unique(group_M, return_index=True)
    if not len(known):
        return drawn_N, 0
    several = np.unique(np.stack([group_M, split_M.astype(np.uint64)]), axis=1)
    groups, splits = np.unique(several[0], return_counts=True)
    straddling = int(np.isin(groups[splits > 1], staged.group_N[says_N]).sum())
    open_rows = np.flatnonzero(keep_N & (staged.group_N > 0) & (staged.split_N == 0))
    place = np.minimum(np.searchsorted(known, staged.group_N[open_rows]), len(known) - 1)
    is_known = known[place] == staged.group_N[open_rows]
    settled_N = drawn_N.copy()
    settled_N[open_rows[is_known]] = split_M[first[place[is_known]]]
    return settled_N, straddling


def twin_ids(staged: Index, keep_N: np.ndarray, lake: Index) -> tuple[int | None, int | None, int] | None:
    """Two rows that would have one and the same id: (row of the lake, None, row) or (None, row, later row)."""
    rows = np.flatnonzero(keep_N & (staged.id_N > 0))
    if not len(rows):
        return None
    there = np.isin(staged.id_N[rows], lake.id_N[lake.id_N > 0])
    if there.any():
        row = int(rows[np.flatnonzero(there)[0]])
        return int(np.flatnonzero(lake.id_N == staged.id_N[row])[0]), None, row
    _, first, counts = np.unique(staged.id_N[rows], return_index=True, return_counts=True)
    if counts.max() == 1:
        return None
    row = int(rows[first[counts > 1].min()])
    later = rows[np.flatnonzero(staged.id_N[rows] == staged.id_N[row])[1]]
    return None, row, int(later)


def count_of(conflicts: Iterable[Conflict]) -> Counter[str]:
    """Reason -> rows, for the account."""
    return Counter(reason_of(conflict) for conflict in conflicts)


def reason_of(conflict: Conflict) -> str:
    """Why a row is rejected."""
    return f"{CONTRADICTS}: {', '.join(conflict.columns)}"
