"""Lakes with embeddings of made-up teachers: right in every respect that a check looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.lake import Lake
from common.schemas import features_schema
from common.seeding import seed_of
from common.teachers_table import refresh_teachers
from extractor.partitions import claim_teacher
from extractor.sink import write_features


def identity_of(teacher: str, dim: int = 16) -> dict[str, Any]:
    return {"weights_sha256": f"weights of {teacher}", "image_dim": dim, "text_dim": dim}


def vector_column(rng: np.random.Generator, rows: int, dim: int, absent: tuple[int, ...] = ()) -> pa.Array:
    vectors = rng.normal(size=(rows, dim))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(unit.reshape(-1)), dim, mask=pa.array(np.isin(range(rows), absent))
    )


def features_of(lake: Lake, teacher: str, index: int, dim: int = 16) -> pa.Table:
    """Vectors that follow from teacher and shard; the second row lacks an image's, rows without captions a text's."""
    pairs = lake.read_pairs(index, ["sample_id", "captions"])
    rows, captions = pairs.num_rows, pairs["captions"].to_pylist()
    extra, silent = [len(row[1:]) for row in captions], tuple(row for row in range(rows) if not captions[row])
    rng = np.random.default_rng(seed_of(teacher, index))
    offsets = pa.array(np.cumsum([0, *extra]).astype(np.int32))
    columns = [
        pairs["sample_id"].combine_chunks(),
        vector_column(rng, rows, dim, absent=(1,)),
        pa.array(rng.uniform(1, 9, rows).astype(np.float32), mask=np.arange(rows) == 1),
        vector_column(rng, rows, dim, absent=silent),
        pa.array(rng.uniform(1, 9, rows).astype(np.float32), mask=np.isin(range(rows), silent)),
        pa.ListArray.from_arrays(offsets, vector_column(rng, sum(extra), dim)),
    ]
    return pa.table(columns, schema=features_schema(dim, dim))


def embed(lake: Lake, teacher: str, dim: int = 16, shards: list[int] | None = None) -> dict[int, int]:
    """Embed shards of a lake (default: all); the second row of each is a reject. Returns shard -> bytes."""
    identity = identity_of(teacher, dim)
    facts = {"spec": {"name": teacher, "path": f"/models/{teacher}"}, "license": "MIT", "derivatives": "allowed"}
    manifest = claim_teacher(lake, teacher, identity, facts)
    written = {}
    for index in lake.shards() if shards is None else shards:
        features = features_of(lake, teacher, index, dim)
        rejects = [(features["sample_id"][1].as_py(), "image not decodable", "made up")] if len(features) > 1 else []
        written[index] = write_features(lake, teacher, index, features, rejects, manifest)
    refresh_teachers(lake)
    return written


def with_a_flipped_bit(path: Path, column: str = "text_embedding", group: int = 0) -> bytes:
    """A file's bytes with one bit of a column's data page changed."""
    chunks = pq.read_metadata(path).row_group(group)
    found = [chunks.column(number) for number in range(chunks.num_columns)]
    chunk = next(chunk for chunk in found if chunk.path_in_schema.split(".")[0] == column)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0x10
    return bytes(data)
