"""Which rows of a lake are looked at closely, and their vectors: a few shards are read, however large the lake.

N = rows, D = width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from common.lake import Lake, check_same_samples
from common.seeding import rng
from extractor.inspecting.census import Census, read_or_none

SHARDS_DRAWN = 64
"""Reading every vector of a lake of millions takes hours; so many shards take minutes."""


@dataclass(frozen=True)
class Sample:
    """The rows whose vectors are looked at, in the order of the lake.

    Attributes:
        rows: Shard -> rows in it, ascending.
        ids: Shard -> sample ids of all its rows, to compare with the embeddings'.
        positions: Position of each row in the lake, [N].
        modalities: Of each row.
        captions: The main one of each row.
    """

    rows: dict[int, np.ndarray]
    ids: dict[int, pa.Table]
    positions: np.ndarray
    modalities: np.ndarray
    captions: list[str]


def draw_sample(lake: Lake, census: Census, size: int, seed: int) -> Sample:
    """Draw shards, then rows of those; with few shards that is a plain random sample of the rows."""
    draw = rng(seed, "inspect")
    shards = sorted(draw.permutation(list(census.rows))[:SHARDS_DRAWN].tolist())
    starts = census.starts
    candidates = np.concatenate([starts[index] + np.arange(census.rows[index]) for index in shards])
    positions = np.sort(draw.permutation(candidates)[:size])
    rows, ids, captions = {}, {}, []
    for index in shards:
        inside = positions[(positions >= starts[index]) & (positions < starts[index] + census.rows[index])]
        if len(inside):
            table = lake.read_pairs(index, ["sample_id", "captions"])
            rows[index], ids[index] = inside - starts[index], table.select(["sample_id"])
            captions += [main_caption(row) for row in table["captions"].take(rows[index]).to_pylist()]
    return Sample(rows, ids, positions, np.array(census.modalities, object)[census.codes[positions]], captions)


def main_caption(captions: Sequence[str | None] | None) -> str:
    """The first caption; empty where a lake made by hand has none."""
    return (captions[0] if captions else None) or ""


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of those sampled rows that have one; ``places`` are places in the sample, ascending."""

    places: np.ndarray
    vectors_ND: np.ndarray

    def at(self, places: np.ndarray) -> np.ndarray:
        """The vectors of some places, all of which have one."""
        return self.vectors_ND[np.searchsorted(self.places, places)]


def read_vectors(lake: Lake, teacher: str, drawn: Sample) -> tuple[Vectors, Vectors]:
    """Image and text vectors of the sampled rows; rows of missing and of damaged shards have none.

    Raises:
        LakeError: The embeddings are not those of the pairs.
    """
    present = set(lake.shards(lake.features_folder(teacher)))
    columns = ("image_embedding", "text_embedding")
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {column: [] for column in columns}
    before = 0
    for index, rows in drawn.rows.items():
        table = read_or_none(lake, teacher, index, ["sample_id", *columns]) if index in present else None
        if table is not None:
            check_same_samples(drawn.ids[index], table, f"{lake.uri}: shard {index} of teacher {teacher}")
            for column in columns:
                inside, vectors = _unit_vectors(table[column].take(rows).combine_chunks())
                parts[column].append((inside + before, vectors))
        before += len(rows)
    image, text = (_joined(found) for found in parts.values())
    return image, text


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> Vectors:
    full = [(places, vectors) for places, vectors in parts if len(places)]
    if not full:
        return Vectors(np.empty(0, np.int64), np.empty((0, 1), np.float32))
    return Vectors(np.concatenate([places for places, _ in full]), np.concatenate([vectors for _, vectors in full]))


def _unit_vectors(column: pa.FixedSizeListArray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that have a finite vector with a direction, and the vectors at unit length."""
    rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    # flatten leaves out the null rows
    vectors_ND = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    norms_N = np.linalg.norm(vectors_ND, axis=1)
    good_N = np.isfinite(norms_N) & (norms_N > 0)
    return rows[good_N], (vectors_ND[good_N] / norms_N[good_N, None]).astype(np.float32)
