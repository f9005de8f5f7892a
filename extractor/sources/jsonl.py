"""JSON Lines: one object per line, with an image path or URI and one or more captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from common.errors import SourceError
from common.storage_errors import without_secrets
from extractor.config import IngestConfig
from extractor.sources.addresses import Pictures, base_name
from extractor.sources.columns import choose_columns, record_of
from extractor.sources.lines import open_lines, plan_lines
from extractor.sources.record import Part, Record

SAMPLE_ROWS = 100
"""Rows looked at to learn the columns; a column that first appears later is not seen."""


def parts(uri: str, config: IngestConfig) -> list[Part]:
    """Plan one part per ``ROWS_PER_PART`` lines.

    Raises:
        SourceError: None of the first lines is a JSON object, or a column is missing.
    """
    present: dict[str, None] = {}
    looked_at = 0
    with open_lines(uri) as lines:
        for _, (_, line) in zip(range(SAMPLE_ROWS), lines, strict=False):
            looked_at += 1
            row, _ = _parse(line)
            present.update(dict.fromkeys(row))
    if not present:
        raise SourceError(
            f"{without_secrets(uri)} does not hold JSON Lines: none of its first {looked_at} lines is a JSON object. "
            'Expected lines such as {"image": "images/1.jpg", "caption": "..."}; name another --format if it is none.'
        )
    columns = choose_columns(present, config, uri)
    return [Part("jsonl", uri, base_name(uri), begin, end, first, columns) for begin, end, first in plan_lines(uri)]


def read(part: Part, config: IngestConfig) -> Iterator[Record]:
    """Each line of a part as a record; a malformed line is a record with a reason."""
    pictures = Pictures(config)
    with open_lines(part.uri, part.begin, part.end) as lines:
        for number, (_, line) in enumerate(lines, part.first_row):
            row, fault = _parse(line)
            if fault:
                yield Record(f"{part.name}/#{number}", reason="malformed line", detail=f"row {number + 1}: {fault}")
            else:
                yield record_of(row, part, number, config, pictures)


def _parse(line: bytes) -> tuple[dict[str, Any], str]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error})"
    return (row, "") if isinstance(row, dict) else ({}, f"a JSON {type(row).__name__}, not an object")
