"""CSV and TSV with a header line (open_clip's tab-separated ``filepath,title`` too), image paths and captions."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from common.errors import SourceError
from common.storage_errors import without_secrets
from extractor.config import IngestConfig
from extractor.sources.addresses import Pictures, base_name
from extractor.sources.columns import choose_columns, record_of
from extractor.sources.lines import Line, open_lines, plan_lines
from extractor.sources.record import Part, Record

DELIMITERS = ("\t", ",", ";")


def parts(uri: str, config: IngestConfig) -> list[Part]:
    """Plan one part per ``ROWS_PER_PART`` rows; the delimiter is the one the header line has most of.

    Raises:
        SourceError: The file is empty or not text, or a column is missing.
    """
    with open_lines(uri) as lines:
        behind, line = next(lines, (0, b""))
    try:
        text = line.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"The first line of {without_secrets(uri)} is not UTF-8 text ({error}). Expected a header such as "
            "filepath,title; save the table as UTF-8."
        ) from error
    delimiter = max(DELIMITERS, key=text.count)
    header = tuple(name.strip() for name in next(csv.reader([text], delimiter=delimiter), []))
    columns = choose_columns(header, config, uri)

    def rows(lines: Iterator[Line]) -> Iterator[int]:
        return (offset for offset, _, _ in _rows(lines, delimiter))

    return [
        Part("csv", uri, base_name(uri), begin, end, first, columns, header, delimiter)
        for begin, end, first in plan_lines(uri, behind, rows)
    ]


def read(part: Part, config: IngestConfig) -> Iterator[Record]:
    """Each row of a part as a record; a row with another number of cells is a record with a reason."""
    pictures = Pictures(config)
    with open_lines(part.uri, part.begin, part.end) as lines:
        for number, (_, cells, fault) in enumerate(_rows(lines, part.delimiter), part.first_row):
            if not fault and len(cells) != len(part.header):
                fault = f"{len(cells)} cells, the header has {len(part.header)}"
            if fault:
                yield Record(f"{part.name}/#{number}", reason="malformed row", detail=f"row {number + 1}: {fault}")
            else:
                yield record_of(dict(zip(part.header, cells, strict=True)), part, number, config, pictures)


def _rows(lines: Iterator[Line], delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Offset behind each row, its cells, and what is wrong with it."""
    behind = 0

    def texts() -> Iterator[str]:
        nonlocal behind
        for offset, line in lines:
            behind = offset
            yield line.decode("utf-8", "surrogateescape")

    reader = csv.reader(texts(), delimiter=delimiter)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield behind, [], str(error)
            continue
        is_text = all(cell.isascii() or _is_utf8(cell) for cell in cells)
        yield behind, cells, "" if is_text else "not UTF-8 text"


def _is_utf8(cell: str) -> bool:
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
