"""Tables with an image column and a caption column: which column is which, and a row as a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from common.errors import SourceError
from common.storage_errors import unsigned, without_secrets
from extractor.config import IngestConfig
from extractor.sources.addresses import Pictures, base_name, image_address
from extractor.sources.record import (
    Columns,
    Part,
    Record,
    RowFaultError,
    clean_captions,
    clean_split,
    clean_text,
    is_kept,
)

USUAL_NAMES = {  # what -> column names tried in this order when none is configured
    "image": ("image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "img", "img_path")
    + ("image_url", "url", "uri", "jpg", "png"),
    "caption": ("captions", "caption", "title", "text", "txt", "caption_text", "description", "report"),
    "modality": ("modality",),
    "label": ("label",),
    "license": ("license", "licence", "article_license"),
    "split": ("split",),
}
_REQUIRED = ("image", "caption")


def choose_columns(present: Iterable[str], config: IngestConfig, where: str) -> Columns:
    """Decide which column holds what: the configured name, else the first usual name that is there.

    Raises:
        SourceError: A configured column is absent, or there is no image or caption column; lists those present.
    """
    names, where = list(present), without_secrets(where)
    chosen: dict[str, str | None] = {}
    for what, usual in USUAL_NAMES.items():
        asked: str | None = getattr(config.columns, what)
        if asked is not None and asked not in names:
            raise SourceError(
                f"{where} has no column {asked!r}, which columns.{what} asks for. "
                f"Its columns are: {', '.join(names) or 'none'}. Give one of them."
            )
        chosen[what] = asked or next((name for name in usual if name in names), None)
        if chosen[what] is None and what in _REQUIRED:
            raise SourceError(
                f"{where} has no {what} column that this program would recognise (tried: {', '.join(usual)}). "
                f"Its columns are: {', '.join(names) or 'none'}. Name the right one with --{what}-column."
            )
    return Columns(**chosen)  # type: ignore[arg-type]  # the two required ones are strings now


def has_columns(present: Iterable[str], config: IngestConfig) -> bool:
    """Whether :func:`choose_columns` would find all that is needed or asked for."""
    names = set(present)
    for what, usual in USUAL_NAMES.items():
        asked: str | None = getattr(config.columns, what)
        if asked is not None and asked not in names:
            return False
        if asked is None and what in _REQUIRED and names.isdisjoint(usual):
            return False
    return True


def record_of(row: Mapping[str, Any], part: Part, number: int, config: IngestConfig, pictures: Pictures) -> Record:
    """One row of a table as a record; whatever is wrong with it becomes the record's reason.

    Args:
        row: Column -> cell.
        part: Where the row is from.
        number: Of the row within the file, from 0.
        config: Filters.
        pictures: Reads the part's pictures.
    """
    columns = part.columns
    assert columns is not None, "tables are planned with their columns"
    image_cell = _cell(row, "image", columns, config)
    key = f"{part.name}/{_row_name(image_cell, number)}"
    try:
        modality, label, license_name = (
            clean_text(_cell(row, what, columns, config)) for what in ("modality", "label", "license")
        )
        if not is_kept((label,) if label else (), None, license_name, config):
            return Record(key, filtered=True)
        captions = clean_captions(_cell(row, "caption", columns, config))
        split = clean_split(_cell(row, "split", columns, config))
        image = _image_bytes(image_cell, part, config, pictures)
    except RowFaultError as fault:
        return Record(key, reason=fault.reason, detail=f"row {number + 1}: {fault.detail}")
    return Record(key, image, captions, modality, label, license_name, split)


def _cell(row: Mapping[str, Any], what: str, columns: Columns, config: IngestConfig) -> Any:
    """What a row holds in the table's column or, having none such, under the first usual name among its own keys."""
    name: str | None = getattr(columns, what)
    if (name is None or name not in row) and getattr(config.columns, what) is None:
        name = next((usual for usual in USUAL_NAMES[what] if usual in row), None)
    return None if name is None else row.get(name)


def _row_name(cell: Any, number: int) -> str:
    """What names a row in its source key: the image's path if it is relative, else its file name, else the row."""
    if isinstance(cell, dict):
        cell = base_name(cell["path"]) if isinstance(cell.get("path"), str) else None
    path = clean_text(cell) if isinstance(cell, str) else None
    if path is None:
        return f"#{number}"
    return base_name(path) if "://" in path or path.startswith("/") else unsigned(path)


def _image_bytes(cell: Any, part: Part, config: IngestConfig, pictures: Pictures) -> bytes:
    path = None
    limits = config.limits
    if isinstance(cell, dict):
        cell, path = cell.get("bytes"), cell.get("path")
    if isinstance(cell, bytes):
        if len(cell) > limits.max_file_mib << 20:
            raise RowFaultError("file too large", f"{len(cell)} bytes; the limit is {limits.max_file_mib} MiB")
        return cell
    path = clean_text(cell if isinstance(cell, str) else path)
    if path is None:
        raise RowFaultError("no image", "the image cell is empty")
    return pictures.read(image_address(part.uri, path))
