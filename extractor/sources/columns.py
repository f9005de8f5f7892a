"""Tables with an image column and a caption column: which column is which, and a row as a record."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from common.errors import SourceError
from common.kept_columns import kept_value, parse_kept
from common.logs import logger
from common.storage_errors import unsigned, without_secrets
from extractor.config import IngestConfig
from extractor.sources.addresses import Pictures, image_address, is_far
from extractor.sources.record import (
    Columns,
    Part,
    Record,
    Row,
    RowFaultError,
    clean_captions,
    clean_labels,
    clean_name,
    clean_split,
    clean_text,
    is_empty,
    is_kept,
)

USUAL_NAMES: dict[str, tuple[str, ...]] = {  # what -> column names tried in this order when none is configured
    "image": ("image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "img", "img_path")
    + ("image_url", "url", "uri", "jpg", "png"),
    "caption": ("captions", "caption", "title", "text", "txt", "caption_text", "description", "report"),
    "modality": ("modality",),
    "label": ("labels", "label"),
    "license": ("license", "licence", "article_license"),
    "split": ("split",),
    "dataset": ("dataset",),
    # Nobody else's word for these can be trusted: a wrong guess would refuse a table, or tear groups apart.
    "id": (),
    "group": (),
}
SAID_COLUMNS = 20
"""So many of the columns that are not read are named in the log."""


def choose_columns(
    present: Iterable[str], config: IngestConfig, where: str, folders: Mapping[str, str] | None = None
) -> Columns:
    """Decide which column holds what: the configured name, else the first usual name that is there.

    Args:
        present: Names of the table's columns.
        config: What is asked for.
        where: The table's address.
        folders: What its folders' names say, which is as good as a column.

    Raises:
        SourceError: A configured column is absent, there is no image column, or neither captions nor labels though
            nobody said that there are none; lists those present.
    """
    names = list(dict.fromkeys([*present, *(folders or {})]))
    where = without_secrets(where)
    listing = f"Its columns are: {', '.join(names) or 'none'}."
    chosen: dict[str, Any] = {}
    for what, usual in USUAL_NAMES.items():
        asked: str | None = getattr(config.columns, what)
        if asked is not None and asked not in names:
            raise SourceError(
                f"{where} has no column {asked!r}, which columns.{what} asks for. {listing} Give one of them."
            )
        chosen[what] = asked or next((name for name in usual if name in names), None)
    absent = [name for name in parse_kept(config.keep_columns) if name not in names]
    if absent:
        raise SourceError(f"{where} has no column {absent[0]!r}, which keep_columns asks for. {listing}")
    if chosen["image"] is None:
        raise SourceError(
            f"{where} has no image column that this program would recognise (tried: "
            f"{', '.join(USUAL_NAMES['image'])}). {listing} Name the right one with --image-column."
        )
    if chosen["caption"] is None and chosen["label"] is None and not config.no_captions:
        raise SourceError(
            f"{where} has no caption column that this program would recognise (tried: "
            f"{', '.join(USUAL_NAMES['caption'])}), and no labels either. {listing} Name the right one with "
            "--caption-column or --label-column; --no-captions takes pictures without any text."
        )
    return Columns(**chosen, kept=tuple(parse_kept(config.keep_columns)))


def has_columns(present: Iterable[str], config: IngestConfig, folders: Mapping[str, str]) -> bool:
    """Whether :func:`choose_columns` would find all that is needed or asked for."""
    try:
        choose_columns(present, config, "", folders)
    except SourceError:
        return False
    return True


def kept_kinds(config: IngestConfig) -> dict[str, str]:
    """Name -> type of the columns that a table of text keeps."""
    return {name: kind or "string" for name, kind in parse_kept(config.keep_columns).items()}


def say_columns(planned: list[Part]) -> None:
    """Log which column of the tables holds what, and which are not read."""
    tables = {part.uri: part for part in planned if part.columns is not None}
    for said, count in Counter(_use_of(part) for part in tables.values()).items():
        first = next(part.name for part in tables.values() if _use_of(part) == said)
        logger.info("ingest: %s%s: %s", first, f" and {count - 1} more" if count > 1 else "", said)


def _use_of(part: Part) -> str:
    columns = part.columns
    assert columns is not None, "the caller looked"
    used = ", ".join(what if what == name else f"{what} from {name}" for what, name in columns.used().items())
    kept = f"; kept: {', '.join(columns.kept)}" if columns.kept else ""
    unread = [name for name in [*part.header, *part.folders] if name not in columns.names()]
    more = f" and {len(unread) - SAID_COLUMNS} more" if len(unread) > SAID_COLUMNS else ""
    rest = f"; not read: {', '.join(unread[:SAID_COLUMNS])}{more} (--keep-columns keeps them)" if unread else ""
    none = "" if columns.caption else "; there is no caption column, so these are pictures without captions"
    return f"{used}{kept}{rest}{none}"


def record_of(row: Mapping[str, Any], part: Part, number: int, config: IngestConfig, pictures: Pictures) -> Row:
    """One row of a table as a record; whatever is wrong with it becomes the record's reason.

    A row whose picture is far away comes as a call that fetches it, so that several can be under way.

    Args:
        row: Column -> cell.
        part: Where the row is from.
        number: Of the row within the file, from 0.
        config: Filters.
        pictures: Reads the part's pictures.
    """
    columns = part.columns
    assert columns is not None, "tables are planned with their columns"
    for name, value in part.folders.items():
        if is_empty(row.get(name)):
            row = {**row, name: value}
    image_cell = _cell(row, "image", columns, config)
    key = f"{part.name}/{_row_name(image_cell, part.uri, number)}"
    source_id = None
    try:
        source_id = clean_name(_cell(row, "id", columns, config), "the id")
        if source_id is None and columns.id is not None:
            raise RowFaultError("no id", f"column {columns.id!r} is empty")
        group_id = clean_name(_cell(row, "group", columns, config), "the group")
        dataset, modality, license_name = (
            clean_text(_cell(row, what, columns, config), f"the {what}") for what in ("dataset", "modality", "license")
        )
        if group_id is None and columns.group is not None:
            raise RowFaultError(
                "no group", f"column {columns.group!r} is empty, so that its split may be that of others"
            )
        labels = clean_labels(_cell(row, "label", columns, config), config.label_separator)
        if not is_kept(labels, None, license_name, config):
            return Record(key, filtered=True)
        captions = clean_captions(_cell(row, "caption", columns, config))
        split = clean_split(_cell(row, "split", columns, config))
        kept = kept_cells(row, part.kept)
        found = Record(
            key,
            b"",
            captions,
            modality,
            labels,
            dataset or config.dataset,
            group_id,
            source_id,
            license_name,
            split,
            number + 1,
            kept,
        )
        image = _image_in(image_cell, part, config)
    except RowFaultError as fault:
        return _rejected(Record(key, source_id=source_id, row=number + 1), fault)
    if isinstance(image, bytes):
        return replace(found, image=image)
    fetch = partial(_with_image, found, image, pictures)
    return fetch if is_far(image) else fetch()


def _with_image(record: Record, address: str, pictures: Pictures) -> Record:
    try:
        return replace(record, image=pictures.read(address))
    except RowFaultError as fault:
        return _rejected(Record(record.source_key, source_id=record.source_id, row=record.row), fault)


def _rejected(record: Record, fault: RowFaultError) -> Record:
    return replace(record, reason=fault.reason, detail=f"row {record.row}: {fault.detail}")


def kept_cells(row: Mapping[str, Any], kept: Mapping[str, str]) -> dict[str, Any]:
    """The cells of the columns to keep, as values of their types.

    Raises:
        RowFaultError: One is no such value.
    """
    found = {}
    for name, kind in kept.items():
        try:
            found[name] = kept_value(row.get(name), kind)
        except (ValueError, TypeError, ArithmeticError) as error:
            shown = repr(row.get(name))[:80]
            raise RowFaultError(
                "unfitting cell", f"column {name!r} holds {shown}, which is no {kind} ({error})"
            ) from error
    return found


def _cell(row: Mapping[str, Any], what: str, columns: Columns, config: IngestConfig) -> Any:
    """What a row holds in the table's column or, having none such, under the first usual name among its own keys."""
    name: str | None = getattr(columns, what)
    if (name is None or name not in row) and getattr(config.columns, what) is None:
        name = next((usual for usual in USUAL_NAMES[what] if usual in row), None)
    return None if name is None else row.get(name)


def _row_name(cell: Any, table: str, number: int) -> str:
    """What names a row in its source key: where its image lies below the table, else its whole path, else the row.

    A table that is copied with its images so has the same keys elsewhere, also where its paths are absolute.
    """
    if isinstance(cell, dict):
        cell = cell.get("path")
    path = clean_text(cell) if isinstance(cell, str) else None
    if path is None:
        return f"#{number}"
    path, folder = unsigned(path), f"{unsigned(table).rpartition('/')[0]}/"
    path = path.removeprefix(folder)
    if "://" in path:
        place, mark, query = path.partition("#")[0].partition("?")
        # What the query says nobody here can know: it tells pictures apart, and may let its bearer in.
        path = place + (f"?{hashlib.sha256(query.encode()).hexdigest()[:12]}" if mark else "")
    return path.rpartition("://")[2].lstrip("/") or f"#{number}"


def _image_in(cell: Any, part: Part, config: IngestConfig) -> bytes | str:
    """The bytes in an image cell, or the address that it gives."""
    path = None
    limits = config.limits
    if isinstance(cell, dict):
        cell, path = cell.get("bytes"), cell.get("path")
    if isinstance(cell, bytes):
        if len(cell) > limits.max_file_mib << 20:
            raise RowFaultError("file too large", f"{len(cell)} bytes; the limit is {limits.max_file_mib} MiB")
        return cell
    if not isinstance(cell, str) and not isinstance(path, str) and cell is not None and cell == cell:  # not NaN
        kind = type(cell).__name__
        raise RowFaultError("no image", f"the image cell holds a {kind}, where a path, bytes or both were expected")
    path = clean_text(cell if isinstance(cell, str) else path)
    if path is None:
        raise RowFaultError("no image", "the image cell is empty")
    return image_address(part.uri, path)
