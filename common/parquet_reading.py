"""Reading of Parquet from a storage, without Arrow ever holding a Python file in a thread of its own.

Arrow reads ahead in threads that outlive the call. Given a file that is a Python object, such a thread may have to free
a Python buffer while the interpreter is on its way out, and the process ends with ``terminate called without an active
exception`` (seen with pyarrow 26: every eighth ``mmkd plan``). So local files are opened by Arrow itself, and of others
the calling thread fetches the wanted bytes beforehand, in few requests.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from common.storage_errors import explained
from common.vector_pages import OtherLayoutError, decode_vectors, expects, is_vectors

if TYPE_CHECKING:
    from common.storage import Storage

HOLE_BYTES = 1 << 20
"""Two ranges with fewer bytes between them are fetched as one: a request costs more than they do."""
REQUEST_BYTES = 64 << 20
"""Greatest size of one request."""


class _SizedFile(io.RawIOBase):
    """What Arrow asks of a file before it reads."""

    def __init__(self, size: int) -> None:
        self.size, self.position = size, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from the beginning."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; see :meth:`io.IOBase.seek`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position


class RangedFile(_SizedFile):
    """A stored file as Arrow reads one: each read asks for exactly its range, unless it was fetched before."""

    def __init__(self, storage: Storage, relative: str, size: int) -> None:
        super().__init__(size)
        self.storage, self.relative = storage, relative
        self.fetched: list[tuple[int, memoryview]] = []

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes from here on, in one request."""
        begin = self.position
        end = self.size if size is None or size < 0 else min(begin + size, self.size)
        data = self._at(begin, end) if begin < end else b""
        self.position += len(data)
        return data

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Get ranges of bytes, from begin to end each, for the reads to come; what was fetched before is forgotten."""
        self.fetched = [(begin, memoryview(self._request(begin, end))) for begin, end in joined(ranges)]

    def _at(self, begin: int, end: int) -> bytes:
        for start, piece in self.fetched:
            if start <= begin and end <= start + len(piece):
                return bytes(piece[begin - start : end - start])
        return self._request(begin, end)

    def _request(self, begin: int, end: int) -> bytes:
        return b"".join(self.storage.pieces(self.relative, begin, end, min(end - begin, REQUEST_BYTES)))


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those with little between them made one."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and begin - found[-1][1] < HOLE_BYTES:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def read_footer(storage: Storage, relative: str, size: int) -> pq.FileMetaData:
    """The footer of a Parquet file of ``size`` bytes.

    Raises:
        FileNotFoundError: There is no such file.
        OSError, pyarrow.ArrowException: It is not Parquet.
    """
    return pq.read_metadata(RangedFile(storage, relative, size))


def table_of(data: bytes) -> pa.Table:
    """The table in a whole Parquet file that was read into memory.

    Raises:
        OSError, pyarrow.ArrowException: It is not Parquet.
    """
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:
        return file.read(use_threads=False)


def read_columns(
    storage: Storage,
    relative: str,
    size: int,
    columns: list[str] | None = None,
    groups: list[int] | None = None,
    footer: pq.FileMetaData | None = None,
) -> pa.Table:
    """Columns of some row groups of a Parquet file; all of either where None.

    In the caller's thread: a task has one core, and Arrow's threads and its reading ahead only add to the work.

    Args:
        storage: Where the file lies.
        relative: Its path there.
        size: Its size in bytes.
        columns: Names of columns.
        groups: Indices of row groups.
        footer: The file's footer, if at hand.

    Raises:
        FileNotFoundError: There is no such file.
        StorageError: The storage does not give it, which says nothing of the file.
        OSError, ValueError, pyarrow.ArrowException: It is damaged, or lacks a column.
    """
    if storage.is_local:
        try:
            with (
                pa.OSFile(storage.path(relative)) as local,
                pq.ParquetFile(local, metadata=footer, pre_buffer=False) as file,
            ):
                _insist_on(columns, file.metadata, relative)
                return _read(file, local, size, columns, _groups(file.metadata, groups))
        except OSError as error:
            if error.errno is None:  # Arrow's own, about the content
                raise
            with explained(f"read {storage.path(relative)}"):
                raise
    source = RangedFile(storage, relative, size)
    footer = footer or pq.read_metadata(source)
    _insist_on(columns, footer, relative)
    groups = _groups(footer, groups)
    source.fetch(_places(ChunkFinder(footer, size), columns, groups))
    with pq.ParquetFile(source, metadata=footer, pre_buffer=False) as file:
        return _read(file, source, size, columns, groups)


def single_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; ``combine_chunks`` would copy it even if it is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class ChunkFinder(_SizedFile):
    """Where the columns' parts lie in a file, by asking Arrow to read them from here, which has nothing to read.

    A footer also tells it by itself. But pyarrow 26 lets no exception of Arrow's through where it is asked about a
    part, and with one flipped bit in the wrong place the process ends with ``terminate called``. Arrow's readers check
    the same, and raise.

    Args:
        footer: Of the file.
        size: Of the file in bytes.
    """

    class FoundError(Exception):
        """Arrow wants to read."""

    def __init__(self, footer: pq.FileMetaData, size: int) -> None:
        super().__init__(size)
        self.footer = footer
        self._reader = pq.ParquetFile(self, metadata=footer, pre_buffer=False).reader
        self.leaves = [footer.schema.column(leaf).path for leaf in range(footer.num_columns)]
        """Paths of all columns of numbers, such as ``image_embedding.list.element``."""

    def read(self, size: int = -1) -> bytes:
        """Nothing: what is asked for is all there is to know."""
        raise self.FoundError(self.position, self.position + size)

    def find(self, group: int, leaf: int) -> tuple[int, int] | None:
        """Begin and end of a column's part in a row group; None if it has none, since the group has no rows.

        Raises:
            OSError, pyarrow.ArrowException: The footer is damaged there.
        """
        try:
            next(self._reader.iter_batches(1, row_groups=[group], column_indices=[leaf], use_threads=False), None)
        except self.FoundError as found:
            return found.args
        return None


def _read(
    file: pq.ParquetFile, source: pa.OSFile | RangedFile, size: int, columns: list[str] | None, groups: list[int]
) -> pa.Table:
    """Columns of row groups of an opened file, vectors by our own decoder where it knows their layout."""
    schema = file.schema_arrow
    wanted = schema.names if columns is None else list(dict.fromkeys(columns))
    decoded: dict[str, pa.ChunkedArray] = {}
    if len(set(schema.names)) == len(schema.names):  # else Arrow tells those of one name apart
        vectors = [schema.field(name) for name in wanted if is_vectors(schema.field(name).type)]
        decoded = _vectors(ChunkFinder(file.metadata, size), source, vectors, groups) if vectors else {}
    if not decoded:
        return file.read_row_groups(groups, columns, use_threads=False)
    arrays = dict(decoded)
    if others := [name for name in wanted if name not in decoded]:
        read = file.read_row_groups(groups, others, use_threads=False)
        arrays.update({name: read[name] for name in others})
    kept = pa.schema([schema.field(name) for name in wanted], metadata=schema.metadata)
    return pa.Table.from_arrays([arrays[name] for name in wanted], schema=kept)


def _vectors(
    finder: ChunkFinder, source: pa.OSFile | RangedFile, fields: list[pa.Field], groups: list[int]
) -> dict[str, pa.ChunkedArray]:
    """Columns of vectors, a chunk for each row group; without those that Arrow is to read."""
    found = {field.name: _vector_column(finder, source, field, groups) for field in fields}
    return {name: column for name, column in found.items() if column is not None}


def _vector_column(
    finder: ChunkFinder, source: pa.OSFile | RangedFile, field: pa.Field, groups: list[int]
) -> pa.ChunkedArray | None:
    path, footer = f"{field.name}.list.element", finder.footer
    leaf = finder.leaves.index(path) if path in finder.leaves else None
    if leaf is None or not expects(footer.schema.column(leaf)):
        return None
    arrays = []
    for group in groups:
        place = finder.find(group, leaf)
        if place is None:
            return None
        source.seek(place[0])
        pages = memoryview(source.read(place[1] - place[0]))
        try:
            arrays.append(decode_vectors(pages, footer.row_group(group).num_rows, field.type))
        except OtherLayoutError:
            return None
    return pa.chunked_array(arrays, field.type)


def _insist_on(columns: list[str] | None, footer: pq.FileMetaData, relative: str) -> None:
    """Arrow leaves columns out that are not there."""
    have = {footer.schema.column(index).path.split(".", 1)[0] for index in range(footer.num_columns)}
    lacking = [name for name in columns or () if name not in have]
    if lacking:
        raise pa.ArrowInvalid(f"{relative} has no column {', '.join(lacking)}; it has {', '.join(sorted(have))}")


def _groups(footer: pq.FileMetaData, groups: list[int] | None) -> list[int]:
    return list(range(footer.num_row_groups)) if groups is None else groups


def _places(finder: ChunkFinder, columns: list[str] | None, groups: list[int]) -> list[tuple[int, int]]:
    """Where the columns' bytes lie in the file."""
    wanted = [leaf for leaf, path in enumerate(finder.leaves) if columns is None or path.split(".", 1)[0] in columns]
    found = (finder.find(group, leaf) for group in groups for leaf in wanted)
    return [place for place in found if place is not None]
