"""Whether a file of embeddings is what was written, and belongs to its pairs: hashes for the footer, the full check."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.config import fingerprint
from common.listing import Place
from common.parquet_reading import single_chunk
from common.schemas import features_schema
from common.shard_files import UNREADABLE, DamagedFileError, ShardFacts, ShardFile
from common.storage import Storage

UNIT_TOLERANCE = 2e-3
"""How far from 1 a stored vector's length may be: rounding to bfloat16 moves it by 2 ** -9 at most."""


class Fault(NamedTuple):
    """What is wrong with one shard of embeddings."""

    sentence: str
    other_samples: bool = False
    """The file is whole, but not of the samples that its pairs shard holds."""


class Expected(NamedTuple):
    """What a pairs shard demands of the embeddings beside it; None where the pairs cannot be read."""

    rows: int | None
    samples: str | None


def samples_hash(ids: pa.ChunkedArray) -> str:
    """Sha256 over sample ids, joined by newlines."""
    return hashlib.sha256("\n".join(ids.to_pylist()).encode()).hexdigest()


def content_hash(table: pa.Table) -> str:
    """Sha256 over the columns' names, kinds, validity and values, whatever the chunking, encoding and compression.

    Values beneath a null do not count: what Parquet gives back there is not what was in memory.
    """
    digest = hashlib.sha256()
    for name in table.column_names:
        digest.update(f"{name}\n".encode())
        _feed(digest, single_chunk(table[name]))
    return digest.hexdigest()


def _feed(digest: Any, array: pa.Array) -> None:
    present = array.is_valid().to_numpy(zero_copy_only=False)
    digest.update(len(array).to_bytes(8, "little") + np.packbits(present).tobytes())
    kept = array.drop_null() if array.null_count else array
    kind = kept.type
    # Not the type's own text, which names a list's items differently in memory and in Parquet.
    if pa.types.is_fixed_size_list(kind):
        digest.update(b"vector %d\n" % kind.list_size)
        _feed(digest, kept.flatten())
    elif pa.types.is_list(kind):
        digest.update(b"list\n")
        digest.update(pc.list_value_length(kept).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        _feed(digest, kept.flatten())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        lengths = pc.binary_length(kept).to_numpy(zero_copy_only=False).astype("<i4")
        _, offsets, data = kept.buffers()
        begin = int(np.frombuffer(offsets, np.int32)[kept.offset]) if len(kept) else 0
        digest.update(lengths.tobytes())
        digest.update(memoryview(data)[begin : begin + int(lengths.sum())] if data is not None else b"")
    else:
        digest.update(f"{kind}\n".encode())
        digest.update(np.ascontiguousarray(kept.to_numpy(zero_copy_only=False)).tobytes())


def check_file(
    storage: Storage, folder: str, place: Place, expected: dict[int, Expected], identity: dict[str, Any]
) -> dict[int, Fault | None]:
    """Read a file of embeddings and hold it against its pairs and its producer.

    Args:
        storage: The lake.
        folder: The teacher's folder.
        place: Name and mark of a file there: one shard's own, or a pack.
        expected: Shard -> what its pairs demand; only these shards are looked at.
        identity: What the teacher's manifest records as its producer.

    Returns:
        Shard -> what is wrong with it, or None.

    Raises:
        FileNotFoundError: The file is gone.
        StorageError: The storage does not answer; nothing is said of the file.
    """
    try:
        file = ShardFile(storage, f"{folder}/{place.name}", place.mark.size)
    except DamagedFileError as error:
        return dict.fromkeys(expected, Fault(error.what))
    wanted = fingerprint(identity)
    if file.fingerprint != wanted:
        strange = f"it was made by another producer (fingerprint {file.fingerprint}, the manifest has {wanted})"
        return dict.fromkeys(expected, Fault(strange))
    return {index: _check_shard(file, index, wish, identity) for index, wish in expected.items()}


def _check_shard(file: ShardFile, index: int, expected: Expected, identity: dict[str, Any]) -> Fault | None:
    try:
        return check_features(file.read(index), file.facts[index], expected, identity)
    except DamagedFileError as error:
        return Fault(error.what)
    except UNREADABLE as error:  # such as text that is no UTF-8
        return Fault(f"its values do not decode ({error})")


def check_features(table: pa.Table, facts: ShardFacts, expected: Expected, identity: dict[str, Any]) -> Fault | None:
    """Hold one shard's embeddings against what was written, the teacher's widths and the pairs' samples.

    Args:
        table: All columns of the shard.
        facts: What the file's footer says of it.
        expected: What its pairs demand.
        identity: What the teacher's manifest records as its producer.

    Returns:
        The first thing that is wrong, or None.
    """
    wrong = _check_columns(table, identity)
    if wrong is None and facts.content is not None and content_hash(table) != facts.content:
        wrong = "its values are not those that were written (the checksum in the footer differs)"
    wrong = wrong or next(_bad_values(table), None)
    if wrong is None and expected.rows is not None and table.num_rows != expected.rows and facts.content is None:
        wrong = f"it has {table.num_rows} rows and its pairs have {expected.rows}"
    if wrong is not None:
        return Fault(wrong)
    if expected.samples is not None and samples_hash(table["sample_id"]) != expected.samples:
        strange = f"it holds other samples than its pairs shard ({table.num_rows} rows against {expected.rows})"
        return Fault(strange, other_samples=True)
    return None


def _check_columns(table: pa.Table, identity: dict[str, Any]) -> str | None:
    if "image_dim" not in identity or "text_dim" not in identity:
        return None  # a partition written by other tools, whose producer states no widths
    wanted = features_schema(identity["image_dim"], identity["text_dim"], "view_boxes" in table.column_names)
    if table.column_names != wanted.names:
        return f"it has the columns {', '.join(table.column_names)}; expected {', '.join(wanted.names)}"
    differing = [field for field in wanted if table.schema.field(field.name).type != field.type]
    if differing:
        found = table.schema.field(differing[0].name).type
        return f"its column {differing[0].name} is {found}; this teacher's is {differing[0].type}"
    return None


def _bad_values(table: pa.Table) -> Iterator[str]:
    """Sentences about vectors that are not finite or not of length 1, and about norms that do not go with them."""
    for name in table.column_names:
        column = single_chunk(table[name])
        if name.endswith("_embeddings"):
            column = column.flatten()
        if name.endswith(("_embedding", "_embeddings")):
            present = column.drop_null()
            flat = present.flatten().to_numpy(zero_copy_only=False)
            vectors_ND = flat.reshape(len(present), present.type.list_size)
            with np.errstate(over="ignore", invalid="ignore"):
                length_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))
            bad = ~(np.abs(length_N - 1) <= UNIT_TOLERANCE)
            if bad.any():
                yield f"{int(bad.sum())} of {len(bad)} vectors of {name} are not finite or not of length 1"
        norms = name.replace("_embedding", "_norm")
        if name.endswith("_embedding") and norms in table.column_names:
            norm = single_chunk(table[norms])
            values = norm.drop_null().to_numpy(zero_copy_only=False)
            if not norm.is_valid().equals(column.is_valid()) or not (np.isfinite(values) & (values > 0)).all():
                yield f"{norms} is not a positive number wherever {name} is there"
