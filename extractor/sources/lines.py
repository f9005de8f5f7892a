"""Text files in pieces: where every so many rows begin, and the lines of one piece.

A line ends with a line feed, a carriage return, or both. Files in UTF-16 (with its byte order mark) are read as the
UTF-8 they would be.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fsspec
from fsspec.utils import infer_compression

from common.errors import SourceError
from common.storage import Storage
from common.storage_errors import explained, without_secrets
from extractor.sources.addresses import base_name
from extractor.sources.record import UTF16_MARKS

ROWS_PER_PART = 512
"""Rows one task reads: a few seconds of decoding."""
READ_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
"""A longer line is cut, which makes its pieces malformed rows: a file without line ends must not fill the memory."""

Line = tuple[int, bytes]
"""Offset just behind a line, and the line itself."""


@contextlib.contextmanager
def open_lines(uri: str, begin: int = 0, end: int | None = None, blank: bool = False) -> Iterator[Iterator[Line]]:
    """The lines that begin in [begin, end) of a text file; ``.gz`` and the like are unpacked.

    Args:
        uri: The file.
        begin: First byte; other than 0 only in files that :func:`is_read_whole` is false of.
        end: One past the last; None reads to the end.
        blank: Give empty lines, too.

    Raises:
        StorageError: The file cannot be reached.
        SourceError: It is compressed and damaged.
    """
    Storage(uri).exists()  # says in plain words what is wrong with the storage, if anything
    compression = infer_compression(base_name(uri))
    with explained(f"read {uri}"), fsspec.open(uri, "rb", compression=compression) as stream:
        try:
            yield _lines(stream, begin, end, blank)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SourceError(
                f"{without_secrets(uri)} is damaged or cut off ({error}). Unpack it to see how far it goes."
            ) from error


def is_read_whole(uri: str) -> bool:
    """Whether a piece of a file is had only by reading all that comes before it: it is packed, or in UTF-16."""
    if infer_compression(base_name(uri)) is not None:
        return True
    with fsspec.open(uri, "rb") as stream:
        return stream.read(2) in UTF16_MARKS


def _lines(stream: Any, begin: int, end: int | None, blank: bool) -> Iterator[Line]:
    offset = begin
    if end is not None and offset >= end:
        return
    for line in _split(_utf8(stream, begin)):
        offset += len(line)
        if blank or line.strip():
            yield offset, line
        if end is not None and offset >= end:
            return


def _utf8(stream: Any, begin: int) -> Iterator[bytes]:
    """The file from a byte on, in pieces."""
    if begin:
        stream.seek(begin)
    piece = stream.read(READ_BYTES)
    if begin or not piece.startswith(UTF16_MARKS):
        while piece:
            yield piece
            piece = stream.read(READ_BYTES)
        return
    # A surrogate without its partner passes through, so that only its own row is found not to be UTF-8.
    decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
    while piece:
        yield decoder.decode(piece).encode("utf-8", "surrogatepass")
        piece = stream.read(READ_BYTES)
    try:
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # half a character is left: the last row is damaged
        yield b"\xff"


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends."""
    rest = b""
    for piece in pieces:
        lines = (rest + piece).splitlines(keepends=True)
        # A carriage return at the end of a piece may have its line feed in the next.
        rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for line in lines:
            yield from _cut(line)
        *whole, rest = list(_cut(rest)) or [b""]
        yield from whole
    yield from _cut(rest)


def _cut(line: bytes) -> Iterator[bytes]:
    return (line[start : start + MAX_LINE_BYTES] for start in range(0, len(line), MAX_LINE_BYTES))


def plan_lines(
    uri: str, begin: int = 0, rows: Callable[[Iterator[Line]], Iterator[int]] | None = None
) -> list[tuple[int, int | None, int]]:
    """Cut a text file into pieces of ``ROWS_PER_PART`` rows; one that must be read whole is one piece.

    Args:
        uri: The file.
        begin: Where its first row begins.
        rows: From lines, blank ones too, to the offset behind each row, where a row can span lines; None: a row is a
            line that is not blank.

    Returns:
        First byte, byte behind the last (None: all of the file from its first byte on), and number of the first row,
        for each piece.
    """
    if is_read_whole(uri):
        return [(0, None, 0)]
    pieces: list[tuple[int, int | None, int]] = []
    count = first = 0
    start = behind = begin
    with open_lines(uri, begin, blank=rows is not None) as lines:
        for behind in rows(lines) if rows else (offset for offset, _ in lines):
            count += 1
            if count % ROWS_PER_PART == 0:
                pieces.append((start, behind, first))
                start, first = behind, count
    if count > first:
        pieces.append((start, behind, first))
    return pieces
