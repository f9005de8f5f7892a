"""Counting everything in a lake without reading a picture or a vector: pairs, coverage, norms, rejects, equal pictures.

Memory grows by about ten bytes per pair, and eight more for the teacher that is being counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow as pa

from common.captions import captioned
from common.errors import LakeError, SchemaError, StorageError
from common.lake import Lake
from common.logs import logger

READERS = 8
NO_MODALITY = "(none)"
NameT = TypeVar("NameT")
TableT = TypeVar("TableT")


@dataclass
class Census:
    """The pairs of a lake, row by row in the order of the shards.

    Attributes:
        rows: Shard -> number of pairs, ascending.
        modalities: Names; a row's code is the place of its modality here.
        codes: int16 [pairs].
        digests: uint64 [pairs], equal where the pictures' bytes are.
        without_caption: How many pairs have none.
    """

    rows: dict[int, int]
    modalities: list[str]
    codes: np.ndarray
    digests: np.ndarray
    without_caption: int = 0

    @property
    def starts(self) -> dict[int, int]:
        """Shard -> position of its first pair."""
        ends = np.cumsum([0, *self.rows.values()])
        return dict(zip(self.rows, ends[:-1].tolist(), strict=True))

    def by_modality(self, chosen: np.ndarray | None = None) -> dict[str, int]:
        """Modality -> pairs, of all or of those chosen by a mask."""
        codes = self.codes if chosen is None else self.codes[chosen]
        counts = np.bincount(codes, minlength=len(self.modalities))
        return dict(zip(self.modalities, counts.tolist(), strict=True))

    def equal_pictures(self, most: int) -> tuple[int, int, list[tuple[int, int]]]:
        """How many pictures share their bytes with another, in how many groups, and two positions of some groups."""
        order = np.argsort(self.digests, kind="stable")
        _, first, counts = np.unique(self.digests[order], return_index=True, return_counts=True)
        heads = first[counts > 1]
        shown = heads[np.argsort(order[heads])[:most]]  # the first of the lake
        pairs = [(int(order[head]), int(order[head + 1])) for head in shown]
        return int(counts[counts > 1].sum()), len(heads), pairs


@dataclass
class Coverage:
    """What a teacher has of the lake.

    Attributes:
        rows: Modality -> rows of its files.
        images: Modality -> rows with an image vector.
        texts: Modality -> rows with a vector of the main caption.
        image_norms: Lengths before normalisation, float32 [vectors].
        text_norms: Likewise.
        missing: Shards that have no file yet.
        unreadable: Shards whose file cannot be read, or is not of this version.
    """

    rows: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    image_norms: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    text_norms: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    missing: list[int] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)


def count_pairs(lake: Lake) -> Census:
    """Read the modality and the hash of every pair, and whether it has a caption.

    Raises:
        StorageError: A shard cannot be read.
        SchemaError: A shard is not of this version.
    """
    codes, digests, rows = [np.empty(0, np.int16)], [np.empty(0, np.uint64)], {}
    names: dict[str, int] = {}
    without_caption = 0
    shards = lake.shards()
    for index, table in in_order(lambda shard: lake.read_pairs(shard, ["captions", "modality", "sha256"]), shards):
        modalities = [value or NO_MODALITY for value in table["modality"].to_pylist()]
        codes.append(np.array([names.setdefault(name, len(names)) for name in modalities], np.int16))
        digests.append(np.array([_digest(text) for text in table["sha256"].to_pylist()], np.uint64))
        rows[index] = table.num_rows
        without_caption += int((~captioned(table["captions"])).sum())
    # Names in alphabetical order, whatever order the shards brought them in.
    ordered = sorted(names)
    place = np.array([ordered.index(name) for name in names], np.int16)
    found = np.concatenate(codes)
    codes_N = place[found] if len(found) else found
    return Census(rows, ordered, codes_N, np.concatenate(digests), without_caption)


def count_vectors(lake: Lake, teacher: str, census: Census) -> Coverage:
    """Read the norms of all embeddings of a teacher: a vector is there where its norm is.

    Raises:
        LakeError: A file has another number of rows than its pairs.
    """
    present = set(lake.shards(lake.features_folder(teacher)))
    found = Coverage(missing=[index for index in census.rows if index not in present])
    masks = {name: np.zeros(len(census.codes), bool) for name in ("rows", "image_norm", "text_norm")}
    norms: dict[str, list[np.ndarray]] = {"image_norm": [], "text_norm": []}
    starts = census.starts

    def read(index: int) -> pa.Table | None:
        return read_or_none(lake, teacher, index, list(norms))

    for index, table in in_order(read, [index for index in census.rows if index in present]):
        if table is None:
            found.unreadable.append(index)
            continue
        if table.num_rows != census.rows[index]:
            raise LakeError(
                f"Shard {index} of teacher {teacher} in {lake.uri} has {table.num_rows} rows and its pairs have "
                f"{census.rows[index]}. The pairs were changed after extraction, or the file is damaged: "
                f"run `mmkd verify {lake.uri}`."
            )
        span = slice(starts[index], starts[index] + table.num_rows)
        masks["rows"][span] = True
        for name, kept in norms.items():
            values = table[name].to_numpy()  # null becomes NaN
            masks[name][span] = ~np.isnan(values)
            kept.append(values[~np.isnan(values)].astype(np.float32))
    found.rows, found.images, found.texts = (census.by_modality(mask) for mask in masks.values())
    found.image_norms, found.text_norms = (np.concatenate([np.empty(0, np.float32), *kept]) for kept in norms.values())
    return found


def read_or_none(lake: Lake, teacher: str, index: int, columns: list[str]) -> pa.Table | None:
    """A shard of a teacher's embeddings; None, with a line in the log, where its file is damaged or has just gone."""
    try:
        return lake.read_features(teacher, index, columns)
    except (FileNotFoundError, StorageError, SchemaError, pa.ArrowException) as error:
        logger.warning("shard %d of teacher %s cannot be read: %s", index, teacher, error)
        return None


def count_rejects(lake: Lake) -> Counter[tuple[str, str]]:
    """(stage, reason) -> rows, from all of ``rejects/``."""
    folders = [f"rejects/{stage}" for stage in lake.storage.list_folders("rejects")]
    folders += [f"{folder}/{name}" for folder in folders for name in lake.storage.list_folders(folder)]
    files = [f"{folder}/{name}" for folder in folders for name in lake.storage.list_files(folder, ".parquet")]
    counted: Counter[tuple[str, str]] = Counter()
    for _, table in in_order(lambda name: lake.storage.read_table(name, ["stage", "reason"]), files):
        counted.update(zip(table["stage"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return counted


def in_order(read: Callable[[NameT], TableT], names: Iterable[NameT]) -> Iterator[tuple[NameT, TableT]]:
    """Read files ahead on a few threads and give them in order; no more than ``READERS`` are held at once."""
    waiting = []
    with ThreadPoolExecutor(READERS) as pool:
        for name in names:
            waiting.append((name, pool.submit(read, name)))
            if len(waiting) == READERS:
                first, answer = waiting.pop(0)
                yield first, answer.result()
        for first, answer in waiting:
            yield first, answer.result()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
