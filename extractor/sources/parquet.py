"""Parquet with image bytes, ``{bytes, path}`` structs (the layout of hub data sets) or image paths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import SourceError
from common.kept_columns import kind_of_arrow, parse_kept
from common.storage import Storage
from common.storage_errors import explained, without_secrets
from extractor.config import IngestConfig
from extractor.sources.addresses import Pictures, SourceFile
from extractor.sources.columns import choose_columns, record_of
from extractor.sources.lines import ROWS_PER_PART
from extractor.sources.record import Part, Record, Row

BATCH_ROWS = 32
"""Rows in memory at once, beside what the Parquet reader buffers."""


def parts(file: SourceFile, config: IngestConfig) -> list[Part]:
    """Plan one part per row group, or per several small ones; reads only the footer.

    Raises:
        SourceError: The file is not Parquet, or a column is missing.
    """
    uri = file.uri
    storage = Storage(uri)
    storage.exists()  # says in plain words what is wrong with the storage, if anything
    try:
        with storage.fs.open(storage.path(), "rb") as stream:
            footer = pq.read_metadata(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(
            without_secrets(f"{uri} cannot be read as Parquet: {error}. Check that it was copied whole.")
        ) from error
    schema = footer.schema.to_arrow_schema()
    _refuse_twins(schema, uri)
    columns = choose_columns(schema.names, config, uri, file.folders)
    kept = _kept_kinds(schema, config, uri)
    whole = Part("parquet", uri, file.name, 0, 0, 0, columns, kept, file.folders, tuple(schema.names))
    found: list[Part] = []
    begin = first = rows = 0
    for group in range(footer.num_row_groups):
        rows += footer.row_group(group).num_rows
        if rows >= ROWS_PER_PART or group == footer.num_row_groups - 1:
            found.append(replace(whole, begin=begin, end=group + 1, first_row=first))
            begin, first, rows = group + 1, first + rows, 0
    return found


def read(part: Part, config: IngestConfig) -> Iterator[Row]:
    """Each row of a part as a record; a damaged page ends the part with one record that says so."""
    assert part.columns is not None, "tables are planned with their columns"
    assert part.end is not None, "Parquet is planned by row groups"
    storage = Storage(part.uri)
    number = part.first_row
    pictures = Pictures(config)
    with explained(f"read {part.uri}"), storage.fs.open(storage.path(), "rb") as stream:
        # No pre-buffering: it would hold a whole row group of pictures in memory.
        file = pq.ParquetFile(stream, pre_buffer=False)
        groups = range(part.begin, part.end)
        here = set(file.schema_arrow.names)
        names = [name for name in part.columns.names() if name in here]
        batches = file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowInvalid, OSError) as error:
                detail = f"from row {number + 1} on: {error}"
                yield Record(f"{part.name}/#{number}", row=number + 1, reason="damaged parquet", detail=detail)
                return
            if batch is None:
                return
            for row in _rows(batch):
                if not part.wants(number + 1):
                    pass
                elif isinstance(row, str):
                    detail = f"row {number + 1}: {row}"
                    yield Record(f"{part.name}/#{number}", row=number + 1, reason="malformed row", detail=detail)
                else:
                    yield record_of(row, part, number, config, pictures)
                number += 1


def _refuse_twins(schema: pa.Schema, uri: str) -> None:
    twins = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twins:
        raise SourceError(
            f"{without_secrets(uri)} has several columns called {', '.join(map(repr, twins))}, and nothing says which "
            "is meant. Give each column a name of its own."
        )


def _kept_kinds(schema: pa.Schema, config: IngestConfig, uri: str) -> dict[str, str]:
    """Name -> type of the columns to keep: the file's own where none is said."""
    kept = {}
    for name, kind in parse_kept(config.keep_columns).items():
        own = kind_of_arrow(schema.field(name).type) if name in schema.names else "string"
        if kind is None and own is None:
            raise SourceError(
                f"{without_secrets(uri)}: column {name!r} holds {schema.field(name).type}, which is kept only as text. "
                f"Say so with {name}:string, or leave it out of --keep-columns."
            )
        kept[name] = kind or str(own)
    return kept


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """The rows of a batch; what is wrong in place of one that holds a text that is not UTF-8, or a year past 9999."""
    try:
        return list(batch.to_pylist())
    except (UnicodeDecodeError, OverflowError, ValueError) as error:
        if batch.num_rows == 1:
            return ["not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"a cell cannot be read ({error})"]
    return [row for index in range(batch.num_rows) for row in _rows(batch.slice(index, 1))]
