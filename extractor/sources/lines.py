"""Text files in pieces: where every so many rows begin, and the lines of one piece."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import cast

import fsspec
from fsspec.utils import infer_compression

from common.errors import SourceError
from common.storage import Storage
from common.storage_errors import explained, without_secrets
from extractor.sources.addresses import base_name

ROWS_PER_PART = 512
"""Rows one task reads: a few seconds of decoding."""
MAX_LINE_BYTES = 64 << 20
"""A longer line is cut, which makes its pieces malformed rows: a file without line ends must not fill the memory."""

Line = tuple[int, bytes]
"""Offset just behind a line, and the line itself; empty lines are left out."""


@contextlib.contextmanager
def open_lines(uri: str, begin: int = 0, end: int | None = None) -> Iterator[Iterator[Line]]:
    """The non-empty lines that begin in [begin, end) of a text file; ``.gz`` and the like are unpacked.

    Raises:
        StorageError: The file cannot be reached.
        SourceError: It is compressed and damaged.
    """
    Storage(uri).exists()  # says in plain words what is wrong with the storage, if anything
    compression = infer_compression(base_name(uri))
    with explained(f"read {uri}"), fsspec.open(uri, "rb", compression=compression) as stream:
        try:
            # Remote files of fsspec know no length limit in readline.
            yield _lines(io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20), begin, end)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SourceError(
                f"{without_secrets(uri)} is damaged or cut off ({error}). Unpack it to see how far it goes."
            ) from error


def _lines(stream: io.BufferedReader, begin: int, end: int | None) -> Iterator[Line]:
    stream.seek(begin)
    offset = begin
    while end is None or offset < end:
        line = stream.readline(MAX_LINE_BYTES)
        if not line:
            return
        offset += len(line)
        if line.strip():
            yield offset, line


def plan_lines(
    uri: str, begin: int = 0, rows: Callable[[Iterator[Line]], Iterator[int]] | None = None
) -> list[tuple[int, int, int]]:
    """Cut a text file into pieces of ``ROWS_PER_PART`` rows.

    Args:
        uri: The file.
        begin: Where its first row begins.
        rows: From lines to the offset behind each row, where a row can span lines; None: a row is a line.

    Returns:
        First byte, byte behind the last, and number of the first row, for each piece.
    """
    pieces: list[tuple[int, int, int]] = []
    count = first = 0
    start = behind = begin
    with open_lines(uri, begin) as lines:
        for behind in rows(lines) if rows else (offset for offset, _ in lines):
            count += 1
            if count % ROWS_PER_PART == 0:
                pieces.append((start, behind, first))
                start, first = behind, count
    if count > first:
        pieces.append((start, behind, first))
    return pieces
