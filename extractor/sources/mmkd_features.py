"""Pairs as MMKD-CLIP's authors distribute them with their teachers' features: ``meta.jsonl``, and a folder for each.

A line of ``meta.jsonl`` names a picture (``imgpath``, relative to the table's folder), its caption (``txt``) and the
article's metadata (``metapath``, as in BIOMEDICA's tars). The features beside the picture are for
:mod:`extractor.importing`; a row's source key, ``FILE/FOLDERID/ID``, says where they lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from common.errors import SourceError
from common.storage_errors import without_secrets
from extractor.config import IngestConfig
from extractor.sources.addresses import Pictures, SourceFile, image_address, is_far
from extractor.sources.columns import kept_cells, kept_kinds
from extractor.sources.lines import open_lines, plan_lines
from extractor.sources.record import (
    Part,
    Record,
    Row,
    RowFaultError,
    clean_captions,
    clean_name,
    clean_text,
    decode_text,
    decode_utf8,
    is_kept,
)
from extractor.sources.webdataset import MAX_JSON_BYTES, modality_of, texts

KIND = "mmkd-features"
KEYS = ("id", "folderid", "imgpath", "txt")
"""Without these a line cannot be read."""


def parts(file: SourceFile, config: IngestConfig) -> list[Part]:
    """Plan one part per few hundred lines.

    Raises:
        SourceError: The first line is not one of this layout.
    """
    uri = file.uri
    with open_lines(uri) as lines:
        first = next((line for _, line in lines), b"")
    missing = [key for key in KEYS if key not in parse_line(first)]
    if missing:
        raise SourceError(
            f"{without_secrets(uri)} is not a table of MMKD-CLIP's features: its first line lacks "
            f"{', '.join(missing)}. Expected lines such as "
            '{"id": "0bcd...", "folderid": "data_1", "imgpath": "features/...jpg", "txt": "..."}.'
        )
    kept = kept_kinds(config)
    return [Part(KIND, uri, file.name, begin, end, first_row, kept=kept) for begin, end, first_row in plan_lines(uri)]


def read(part: Part, config: IngestConfig) -> Iterator[Row]:
    """Each line of a part as a record."""
    pictures = Pictures(config)
    with open_lines(part.uri, part.begin, part.end) as lines:
        for number, (_, line) in enumerate(lines, part.first_row):
            if not part.wants(number + 1):
                continue
            row = parse_line(line)
            key = f"{part.name}/{row_key(row) or f'#{number}'}"
            fetch = partial(_record_or_reason, row, key, number + 1, part, config, pictures)
            yield fetch if is_far(part.uri) else fetch()


def _record_or_reason(
    row: dict[str, Any], key: str, number: int, part: Part, config: IngestConfig, pictures: Pictures
) -> Record:
    try:
        return _record(row, key, number, part, config, pictures)
    except RowFaultError as fault:
        return Record(key, row=number, reason=fault.reason, detail=f"row {number}: {fault.detail}")


def parse_line(line: bytes) -> dict[str, Any]:
    """A line as a mapping; empty where it is none."""
    try:
        row = json.loads(decode_utf8(line))
    except (ValueError, RecursionError, RowFaultError):
        return {}
    return row if isinstance(row, dict) else {}


def row_key(row: dict[str, Any]) -> str | None:
    """``FOLDERID/ID``, under which a row's features lie; None where one is missing or leads out of the folder."""
    names = [clean_text(row.get(name)) for name in ("folderid", "id")]
    if any(name is None or "/" in name or name in (".", "..") for name in names):
        return None
    return "/".join(str(name) for name in names)


def _record(row: dict[str, Any], key: str, number: int, part: Part, config: IngestConfig, pictures: Pictures) -> Record:
    if row_key(row) is None:
        raise RowFaultError("malformed line", "no JSON object with plain names for id and folderid")
    metadata = {**_metadata(row, part, pictures), **row}
    primary, secondary = (texts(metadata.get(f"image_{which}_label")) for which in ("primary", "secondary"))
    license_name = clean_text(metadata.get("article_license"))
    if not is_kept((*primary, *secondary), clean_text(metadata.get("image_panel_type")), license_name, config):
        return Record(key, filtered=True)
    named = {}
    for what in ("id", "group"):
        column: str | None = getattr(config.columns, what)
        named[what] = None if column is None else clean_name(metadata.get(column), f"the {what}")
        if column is not None and named[what] is None:
            raise RowFaultError(f"no {what}", f"neither the row nor its article has {column!r}")
    captions = clean_captions(row.get("txt"))
    path = clean_text(row.get("imgpath"))
    if path is None:
        raise RowFaultError("no image", "imgpath is empty")
    image = pictures.read(image_address(part.uri, path))
    return Record(
        key,
        image,
        captions,
        modality=modality_of(primary, secondary),
        dataset=config.dataset,
        group_id=named["group"],
        source_id=named["id"],
        license=license_name,
        row=number,
        kept=kept_cells(metadata, part.kept),
    )


def _metadata(row: dict[str, Any], part: Part, pictures: Pictures) -> dict[str, Any]:
    """The article's; a row that names none has none."""
    path = clean_text(row.get("metapath"))
    if path is None:
        return {}
    try:
        content = pictures.read(image_address(part.uri, path), MAX_JSON_BYTES)
    except RowFaultError as fault:
        raise RowFaultError(fault.reason.replace("image", "metadata"), fault.detail) from fault
    try:
        found = json.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        raise RowFaultError("malformed metadata", f"{path} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise RowFaultError("malformed metadata", f"{path} holds a {type(found).__name__}, not an object")
    return found
