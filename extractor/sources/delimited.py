"""CSV and TSV with a header line (open_clip's tab-separated ``filepath,title`` too), image paths and captions.

What stands between cells is found in the header line. Where cells are quoted, a quote that is never closed would make
one caption of all rows behind it; so quotes must match as the rules of CSV have it, and where they do not, the line
is one malformed row and reading goes on with the next line.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from common.errors import SourceError
from common.logs import logger
from common.storage_errors import without_secrets
from extractor.config import IngestConfig
from extractor.sources.addresses import Pictures, SourceFile
from extractor.sources.columns import choose_columns, kept_kinds, record_of
from extractor.sources.lines import Line, open_lines, plan_lines
from extractor.sources.record import Part, Record, Row, RowFaultError, decode_utf8

DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
_QUOTED_CELL = re.compile(rb'"[^"]*(?:""[^"]*)*"')


def parts(file: SourceFile, config: IngestConfig) -> list[Part]:
    """Plan one part per ``ROWS_PER_PART`` rows; the delimiter is the one the header line has most of.

    Raises:
        SourceError: The file is empty or not text, its header cannot be read, or a column is missing.
    """
    uri = file.uri
    with open_lines(uri) as lines:
        behind, line = next(lines, (0, b""))
    try:
        text = decode_utf8(line).strip("\r\n")
    except RowFaultError as fault:
        raise SourceError(
            f"The first line of {without_secrets(uri)} is {fault.detail}. Expected a header such as filepath,title; "
            "save the table as UTF-8."
        ) from fault
    delimiter = max(DELIMITERS, key=text.count)
    quotes = _has_quotes(uri, text, delimiter) if config.quotes is None else config.quotes
    try:
        header = tuple(name.strip() for name in next(_reader([text], delimiter, quotes), []))
    except csv.Error as error:
        raise SourceError(
            f"The header of {without_secrets(uri)} cannot be read: its quotes do not match ({error}). Expected a "
            "header on one line, such as filepath,title. If quotes are ordinary characters in this table, say "
            "--no-quotes."
        ) from error
    twins = sorted({name for name in header if header.count(name) > 1})
    if twins:
        raise SourceError(
            f"The header of {without_secrets(uri)} has several columns called {', '.join(map(repr, twins))}, and "
            "nothing says which is meant. Give each column a name of its own."
        )
    columns = choose_columns(header, config, uri, file.folders)

    def rows(lines: Iterator[Line]) -> Iterator[int]:
        return (offset for offset, _, _ in _rows(lines, delimiter, quotes))

    return [
        Part(
            "csv",
            uri,
            file.name,
            begin,
            end,
            first,
            columns,
            kept_kinds(config),
            file.folders,
            header,
            delimiter,
            quotes,
        )
        for begin, end, first in plan_lines(uri, behind, rows)
    ]


def read(part: Part, config: IngestConfig) -> Iterator[Row]:
    """Each row of a part as a record; a row with another number of cells is a record with a reason."""
    pictures = Pictures(config)
    with open_lines(part.uri, part.begin, part.end, blank=True) as lines:
        if part.begin == 0:  # the whole table
            next((line for _, line in lines if line.strip()), None)
        for number, (_, cells, fault) in enumerate(_rows(lines, part.delimiter, part.quotes), part.first_row):
            if not part.wants(number + 1):
                continue
            if not fault and len(cells) != len(part.header):
                fault = f"{len(cells)} cells, the header has {len(part.header)}"
            if fault:
                detail = f"row {number + 1}: {fault}"
                yield Record(f"{part.name}/#{number}", row=number + 1, reason="malformed row", detail=detail)
            else:
                yield record_of(dict(zip(part.header, cells, strict=True)), part, number, config, pictures)


def say_dialects(planned: list[Part]) -> None:
    """Log how tables are read: what was found to stand between cells, and whether they may be quoted."""
    tables = {part.uri: part for part in planned if part.kind == "csv"}
    for (delimiter, quotes), count in Counter((part.delimiter, part.quotes) for part in tables.values()).items():
        first = next(part.name for part in tables.values() if (part.delimiter, part.quotes) == (delimiter, quotes))
        logger.info(
            "ingest: %s%s: %s between cells, %s",
            first,
            f" and {count - 1} more" if count > 1 else "",
            DELIMITERS[delimiter],
            "which may be quoted (if quotes are ordinary characters here, say --no-quotes)"
            if quotes
            else "quotes are ordinary characters (if cells are quoted here, say --set quotes=true)",
        )


def _has_quotes(uri: str, header: str, delimiter: str) -> bool:
    """Whether cells may be quoted, where nobody says so.

    Tables with tabs are often written without (open_clip's are). A writer that quotes would have quoted each cell with
    a quote in it, and doubled that quote: the table is quoted if there is such a cell, and none that speaks against it.
    """
    if delimiter != "\t" or header.startswith('"'):
        return True
    is_proved = False
    with open_lines(uri) as lines:
        for _, line in lines:
            if b'"' not in line:
                continue
            for cell in line.rstrip(b"\r\n").split(b"\t"):
                if b'"' in cell and not _QUOTED_CELL.fullmatch(cell):
                    return False
                is_proved = is_proved or b'""' in cell[1:-1]
    return is_proved


def _reader(texts: Iterable[str], delimiter: str, quotes: bool) -> Iterator[list[str]]:
    if quotes:
        return csv.reader(texts, delimiter=delimiter, strict=True)
    return csv.reader(texts, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)


def _rows(lines: Iterator[Line], delimiter: str, quotes: bool) -> Iterator[tuple[int, list[str], str]]:
    """Offset behind each row, its cells, and what is wrong with it."""
    waiting: deque[Line] = deque()
    taken: list[Line] = []
    fault = ""

    def texts() -> Iterator[str]:
        nonlocal fault
        while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
            taken.append(line)
            try:
                text = decode_utf8(line[1])
            except RowFaultError as error:
                fault, text = error.detail, line[1].decode("latin-1")  # any text, to find where the row ends
            yield text

    reader = _reader(texts(), delimiter, quotes)
    while True:
        fault = ""
        taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Only its first line is given up. How far the reader had to look is bounded by its limit for a cell.
            (behind, line), *others = taken
            waiting.extendleft(reversed(others))
            reader = _reader(texts(), delimiter, quotes)
            hint = "; if quotes are ordinary characters in this table, say --no-quotes" if b'"' in line else ""
            where = f", where {len(others)} more lines were read in search of its end" if others else ""
            yield behind, [], f"{'its quotes do not match: ' if hint else ''}{error}{where}{hint}"
            continue
        if len(taken) > 1 or taken[0][1].strip():
            yield taken[-1][0], cells, fault
