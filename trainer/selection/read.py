"""Shards as selection reads them: the pairs' light columns and one teacher's vectors, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from common.captions import captioned
from common.errors import LakeError
from common.lake import Lake, check_same_samples, shard_name
from common.parquet_reading import single_chunk
from common.seeding import seed_of

NO_MODALITY = "unknown"


@dataclass(frozen=True)
class ShardRows:
    """One shard of pairs, without pictures; N rows."""

    shard: int
    sample_id: list[str]
    modality_N: np.ndarray
    is_train_N: np.ndarray
    has_caption_N: np.ndarray
    """Bool: a row without one is never scored, and no teacher speaks for it, since stage 2 does not train on it."""
    caption_key_N: np.ndarray
    """Int64: equal for captions that differ in case and outer space only; 0 without one."""
    order_N: np.ndarray
    """Int64: a draw by the seed and the sample's id, by which candidates are sampled whatever the shards' order."""


@dataclass(frozen=True)
class ShardVectors:
    """One teacher's unit vectors of a shard, with NaN rows for nulls and for texts of rows without a caption."""

    image_ND: np.ndarray
    text_ND: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """Bool [N]: rows of which both sides are there, in one space."""
        if self.image_ND.shape[1] != self.text_ND.shape[1]:
            return np.zeros(len(self.image_ND), bool)
        return np.isfinite(self.image_ND[:, 0]) & np.isfinite(self.text_ND[:, 0])


def read_rows(lake: Lake, shard: int, seed: int) -> ShardRows:
    """The light columns of a shard of pairs."""
    table = lake.read_pairs(shard, ["sample_id", "captions", "modality", "split"])
    ids, captions = table["sample_id"].to_pylist(), table["captions"].to_pylist()
    return ShardRows(
        shard=shard,
        sample_id=ids,
        modality_N=np.array(table["modality"].fill_null(NO_MODALITY).to_pylist(), object),
        is_train_N=np.array(table["split"].to_pylist(), object) == "train",
        has_caption_N=captioned(table["captions"]),
        caption_key_N=np.array([seed_of(row[0].strip().lower()) >> 1 if row else 0 for row in captions], np.int64),
        order_N=np.array([seed_of(seed, sample_id) >> 1 for sample_id in ids], np.int64),
    )


def read_shards(lake: Lake, teacher: str, shards: list[int], seed: int) -> Iterator[tuple[ShardRows, ShardVectors]]:
    """Every shard with a teacher's vectors, one at a time.

    Raises:
        LakeError: A shard of the teacher does not hold the same samples as the pairs'.
    """
    for shard in shards:
        rows = read_rows(lake, shard, seed)
        table = lake.read_features(teacher, shard, ["sample_id", "image_embedding", "text_embedding"])
        ids = pa.table({"sample_id": pa.array(rows.sample_id, pa.string())})
        place = f"{lake.uri}/{lake.features_folder(teacher)}/{shard_name(shard)}"
        check_same_samples(table.select(["sample_id"]), ids, place)
        text_ND = vectors_of(table["text_embedding"])
        # Other tools may have stored a vector of whatever text they had.
        text_ND[~rows.has_caption_N] = np.nan
        yield rows, ShardVectors(vectors_of(table["image_embedding"]), text_ND)


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-size-list column as float32 [N, D], with NaN rows where it is null."""
    array = single_chunk(column)
    width = array.type.list_size
    flat = array.values.slice(array.offset * width, len(array) * width).to_numpy(zero_copy_only=False)
    vectors = flat.reshape(-1, width).astype(np.float32)
    vectors[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return vectors


def check_complete(lake: Lake, teacher: str, shards: list[int]) -> None:
    """Insist that a teacher has every shard of the pairs.

    Raises:
        LakeError: Names the missing shards and the command that computes them.
    """
    missing = sorted(set(shards) - set(lake.shards(lake.features_folder(teacher))))
    if missing:
        raise LakeError(
            f"Teacher {teacher!r} lacks {len(missing)} of {len(shards)} shards (first: {missing[:5]}). "
            f"Run `mmkd extract {lake.uri} --teachers {teacher}` again; it computes only what is missing."
        )
