"""Decoding of the lake's columns of vectors, faster than by Arrow's reader of nested lists (docs/benchmarks.md).

Arrow assembles lists from two streams of levels, number by number. The lake's vectors are all of one width, so the
levels only say which rows are null, and the numbers can be put together by byte plane in whole pages. Whatever looks
different from what :meth:`common.storage.Storage.write_table` writes is left to Arrow, which also words what is wrong.

Sources: Apache Parquet's format, ``parquet.thrift`` (page headers) and ``Encodings.md`` (RLE, BYTE_STREAM_SPLIT), and
Apache Thrift's compact protocol.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_DATA_PAGE, _RLE, _BYTE_STREAM_SPLIT = 0, 3, 9
_NULL, _PRESENT = 0, 2
"""Definition levels of a list that may be null and whose numbers may not; 1 would be a list without any."""
_LEVEL_BITS = 2
_UNEXPECTED = (
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    pa.ArrowException,
)
"""What decoding raises for bytes that are not what they seem."""


class OtherLayoutError(Exception):
    """The bytes are not laid out as these functions expect; Arrow may well read them."""


def is_vectors(kind: pa.DataType) -> bool:
    """Whether a column's type is that of :func:`common.schemas.vector_type`."""
    return (
        pa.types.is_fixed_size_list(kind)
        and pa.types.is_float32(kind.value_type)
        and not kind.value_field.nullable
        and kind.list_size > 0
    )


def expects(column: pq.ColumnSchema) -> bool:
    """Whether :func:`decode_vectors` can be tried on a column; what else must be right, its pages tell."""
    return column.max_definition_level == _PRESENT and column.max_repetition_level == 1


def decode_vectors(pages: memoryview, rows: int, kind: pa.FixedSizeListType) -> pa.FixedSizeListArray:
    """Vectors from the bytes of a column's part in a row group; beneath a null lie zeros.

    Args:
        pages: All pages, headers included.
        rows: How many lists they hold, nulls counted.
        kind: Their type, with the width.

    Raises:
        OtherLayoutError: They are laid out differently, or damaged.
    """
    width = kind.list_size
    end, runs = 0, []
    try:
        packed = _numbers(rows * width)
        for planes, levels in _pages(pages):
            begin, end = end, end + planes.shape[1]
            _join_planes(planes, packed[begin:end])
            runs += definition_runs(*levels)
        absent = _absent(runs, end, rows, width)
        numbers = packed
        if absent is not None:
            numbers = _numbers(rows * width)
            numbers.reshape(rows, width)[absent] = 0
            numbers.reshape(rows, width)[~absent] = packed[:end].reshape(-1, width)
    except _UNEXPECTED as error:
        raise OtherLayoutError(str(error)) from error
    flat = pa.Array.from_buffers(pa.float32(), len(numbers), [None, pa.py_buffer(numbers)])
    return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=None if absent is None else pa.array(absent))


def _numbers(count: int) -> np.ndarray:
    """Memory for so many numbers, their bits as uint32: Arrow's, which is warm; numpy's comes fresh from the kernel."""
    return np.frombuffer(pa.allocate_buffer(4 * count), np.uint32)


def _absent(runs: list[tuple[int, int]], numbers: int, rows: int, width: int) -> np.ndarray | None:
    """Which of the rows are null, by the runs of levels of a whole column: bool [rows]; None if none is."""
    level_R, count_R = np.array(runs, np.int64).reshape(-1, 2).T
    null_R = level_R == _NULL
    if not np.all(null_R | (level_R == _PRESENT)):
        raise OtherLayoutError("a list without numbers")
    before_R = np.cumsum(np.where(null_R, 0, count_R))
    nulls = int(count_R[null_R].sum())
    total = int(before_R[-1]) if len(before_R) else 0
    if np.any(before_R[null_R] % width) or total != numbers or numbers != (rows - nulls) * width:
        raise OtherLayoutError(f"{total} levels of {numbers} numbers and {nulls} nulls in {rows} rows of {width}")
    if not nulls:
        return None
    absent = np.zeros(rows, bool)
    absent[np.repeat(before_R[null_R] // width, count_R[null_R]) + np.arange(nulls)] = True
    return absent


def _join_planes(planes: np.ndarray, into: np.ndarray) -> None:
    """From uint8 [4, N], the least significant bytes first, to uint32 [N]."""
    if len(into) != planes.shape[1]:
        raise OtherLayoutError("more numbers than rows")
    into[:] = planes[3]
    for plane in planes[2:0:-1]:
        into <<= 8
        into |= plane
    into <<= 8
    if planes[0].any():  # of a number rounded to half precision it is zero
        into |= planes[0]


def _pages(data: memoryview) -> Iterator[tuple[np.ndarray, tuple[bytes, int]]]:
    """For each page its numbers' bytes, uint8 [4, N], and its encoded definition levels and their number."""
    codec, position = pa.Codec("zstd"), 0
    while position < len(data):
        header, position = thrift_struct(data, position)
        kind, whole_size, stored_size = header[1], header[2], header[3]
        if kind != _DATA_PAGE:
            raise OtherLayoutError("another kind of page")
        page: dict[int, int] = header[5]
        count, *encodings = page[1], page[2], page[3], page[4]
        end = position + stored_size
        if encodings != [_BYTE_STREAM_SPLIT, _RLE, _RLE] or not position <= end <= len(data):
            raise OtherLayoutError("another encoding, or a page that is cut off")
        content = memoryview(codec.decompress(data[position:end], whole_size))
        position = end
        _, rest = _sized(content)  # repetition levels: where lists begin follows from their width
        levels, numbers = _sized(rest)
        yield np.frombuffer(numbers, np.uint8).reshape(4, -1), (bytes(levels), count)


def _sized(content: memoryview) -> tuple[memoryview, memoryview]:
    """What follows a length of four bytes, and the rest."""
    end = 4 + int.from_bytes(content[:4], "little")
    if end > len(content):
        raise OtherLayoutError("levels are cut off")
    return content[4:end], content[end:]


def definition_runs(encoded: bytes, count: int) -> list[tuple[int, int]]:
    """Definition levels in the hybrid encoding of runs and literals, as (level, how often in a row).

    Neighbours may be of the same level.

    Raises:
        OtherLayoutError: There are fewer than ``count``.
        IndexError: They are cut off.
    """
    found: list[tuple[int, int]] = []
    position, left = 0, count
    while left > 0:
        header = encoded[position]
        position += 1
        if header & 128:  # _varint, written out: this loop is what a column with many nulls takes
            header = header & 127 | encoded[position] << 7
            position += 1
            if header >= 1 << 14:
                header, position = _varint(encoded, position - 2)
        if header & 1:
            size = (header >> 1) * _LEVEL_BITS
            pieces, length = _literal_runs(encoded[position : position + size])
            position += size
            found += pieces
        else:
            length = header >> 1
            found.append((encoded[position], length))
            position += 1
        left -= length
        if not length:
            raise OtherLayoutError("levels are cut off")
    if left < 0:  # the last group is filled up
        found = _without_filling(found, -left)
    return found


def _without_filling(runs: list[tuple[int, int]], surplus: int) -> list[tuple[int, int]]:
    while surplus:
        level, length = runs.pop()
        if length > surplus:
            runs.append((level, length - surplus))
        surplus -= min(length, surplus)
    return runs


@lru_cache(1 << 12)
def _literal_runs(packed: bytes) -> tuple[tuple[tuple[int, int], ...], int]:
    """Literals as runs, and their number; kept, since a null among vectors makes few patterns."""
    whole = int.from_bytes(packed, "little")
    levels = [whole >> place & 3 for place in range(0, 8 * len(packed), _LEVEL_BITS)]
    return tuple((level, len(list(same))) for level, same in itertools.groupby(levels)), len(levels)


def _varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """A number in groups of seven bits, the least significant first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def thrift_struct(data: memoryview, position: int) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol as field number -> value, and where it ends.

    Raises:
        OtherLayoutError: It holds something that no page header has, such as a map.
        IndexError: It is cut off.
    """
    fields: dict[int, Any] = {}
    number = 0
    while True:
        byte = data[position]
        position += 1
        if byte == 0:
            return fields, position
        kind, step = byte & 15, byte >> 4
        if step:
            number += step
        else:
            number, position = _signed(data, position)
        if kind in {1, 2}:  # a truth value lies in its kind
            fields[number] = kind == 1
        elif kind in {4, 5, 6}:
            fields[number], position = _signed(data, position)
        elif kind == 8:
            length, position = _varint(data, position)
            fields[number], position = bytes(data[position : position + length]), position + length
        elif kind == 12:
            fields[number], position = thrift_struct(data, position)
        else:
            raise OtherLayoutError(f"a field of kind {kind} in a page header")


def _signed(data: memoryview, position: int) -> tuple[int, int]:
    """A zigzag number and where it ends."""
    value, position = _varint(data, position)
    return value >> 1 ^ -(value & 1), position
