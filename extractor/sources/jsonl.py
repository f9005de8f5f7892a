"""JSON Lines: one object per line, with an image path or URI and one or more captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from common.errors import SourceError
from common.storage_errors import without_secrets
from extractor.config import IngestConfig
from extractor.sources.addresses import Pictures, SourceFile
from extractor.sources.columns import choose_columns, has_columns, kept_kinds, record_of
from extractor.sources.lines import open_lines, plan_lines
from extractor.sources.record import Part, Record, Row, RowFaultError, decode_utf8

SAMPLE_ROWS = 100
"""Rows looked at to learn which of the usual names this table prefers; each row's own keys are read all the same."""


def parts(file: SourceFile, config: IngestConfig) -> list[Part]:
    """Plan one part per ``ROWS_PER_PART`` lines.

    Raises:
        SourceError: None of the lines is a JSON object, or no row has a column that is needed or asked for.
    """
    uri = file.uri
    present: dict[str, None] = {}
    looked_at = 0
    with open_lines(uri) as lines:
        for looked_at, (_, line) in enumerate(lines, 1):
            present.update(dict.fromkeys(_parse(line)[0]))
            # Rows may leave out what they lack: only the whole table shows that no row has a column.
            if looked_at >= SAMPLE_ROWS and has_columns(present, config, file.folders):
                break
    if not present:
        raise SourceError(
            f"{without_secrets(uri)} does not hold JSON Lines: none of its {looked_at} lines is a JSON object. "
            'Expected lines such as {"image": "images/1.jpg", "caption": "..."}; name another --format if it is none.'
        )
    columns = choose_columns(present, config, uri, file.folders)
    kept, keys = kept_kinds(config), tuple(present)
    return [
        Part("jsonl", uri, file.name, begin, end, first, columns, kept, file.folders, keys)
        for begin, end, first in plan_lines(uri)
    ]


def read(part: Part, config: IngestConfig) -> Iterator[Row]:
    """Each line of a part as a record; a malformed line is a record with a reason."""
    pictures = Pictures(config)
    with open_lines(part.uri, part.begin, part.end) as lines:
        for number, (_, line) in enumerate(lines, part.first_row):
            if not part.wants(number + 1):
                continue
            row, fault = _parse(line)
            if fault:
                detail = f"row {number + 1}: {fault.detail}"
                yield Record(f"{part.name}/#{number}", row=number + 1, reason=fault.reason, detail=detail)
            else:
                yield record_of(row, part, number, config, pictures)


def _parse(line: bytes) -> tuple[dict[str, Any], RowFaultError | None]:
    """A line as an object, empty if it is none, and what is wrong with it."""
    try:
        row = json.loads(decode_utf8(line))
    except RowFaultError as fault:
        return {}, fault
    except (ValueError, RecursionError) as error:
        return {}, RowFaultError("malformed line", f"not JSON ({error})")
    if not isinstance(row, dict):
        return {}, RowFaultError("malformed line", f"a JSON {type(row).__name__}, not an object")
    return row, None
