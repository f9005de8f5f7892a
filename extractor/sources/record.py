"""What every source turns into: parts (units of work, planned by the driver) and records (read by workers)."""

from __future__ import annotations

import codecs
import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

from common.storage_errors import unsigned
from extractor.config import IngestConfig

MAX_CAPTION_CHARS = 100_000
"""Longer captions are rejected: whole articles pasted into a caption column, which no tokenizer reads anyway."""
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

NOT_REACHABLE = "not reachable"
"""How the reason begins where a URL gives no picture; what the server or the network said comes behind."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what; None where the table has no such column."""

    image: str
    caption: str | None = None
    modality: str | None = None
    label: str | None = None
    license: str | None = None
    split: str | None = None
    dataset: str | None = None
    id: str | None = None
    group: str | None = None
    kept: tuple[str, ...] = ()
    """Those that are kept as they are."""

    def used(self) -> dict[str, str]:
        """What -> its column, for those that exist."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "kept"}
        return {what: name for what, name in named.items() if name is not None}

    def names(self) -> list[str]:
        """The columns that are read, each once."""
        return list(dict.fromkeys([*self.used().values(), *self.kept]))


@dataclass(frozen=True)
class Part:
    """A piece of a source that one task reads: a tar, some rows of a text table, some row groups of Parquet.

    Attributes:
        kind: Key of ``extractor.sources.SOURCES``.
        uri: The file.
        name: Where the file lies below what the user named, or its base name: begins every source key, and is the same
            on any machine.
        begin: First byte (text tables; 0 is the whole table, its header too) or row group (Parquet).
        end: One past the last; None reads to the end.
        first_row: Number of the first row within the file, from 0.
        columns: For tables, what is where.
        kept: Name -> type of the columns to keep, as :mod:`common.kept_columns` has them.
        folders: Key -> value of the folders' names (``split=test/``) between what the user named and the file: as good
            as columns.
        rows: The only rows to read, by their places from 1, where not all are wanted.
        header: The names of all columns in order; for JSON Lines, those that were seen in planning.
        delimiter: For delimited text, what stands between cells.
        quotes: For delimited text, whether cells may be quoted; otherwise quotes are characters like any other.
    """

    kind: str
    uri: str
    name: str
    begin: int = 0
    end: int | None = None
    first_row: int = 0
    columns: Columns | None = None
    kept: dict[str, str] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    delimiter: str = ","
    quotes: bool = True
    rows: tuple[int, ...] | None = None

    def wants(self, row: int) -> bool:
        """Whether a row, by its place from 1, is to be read."""
        return self.rows is None or row in self._wanted

    @cached_property
    def _wanted(self) -> frozenset[int]:
        return frozenset(self.rows or ())

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Part:
        """The inverse of ``asdict``, also after a journey through JSON."""
        columns = value["columns"]
        columns = columns and Columns(**{**columns, "kept": tuple(columns["kept"])})
        rows = None if value["rows"] is None else tuple(value["rows"])
        return cls(**{**value, "columns": columns, "header": tuple(value["header"]), "rows": rows})


@dataclass(frozen=True)
class Record:
    """One input row: usable (``image`` set), filtered out, or with a ``reason`` why it is neither.

    Attributes:
        source_key: Names the row, the same on any machine.
        captions: The main one first; a picture need not have any.
        labels: Its classes.
        group_id: What must not straddle splits.
        source_id: The user's own name for it.
        row: Its place in the file, from 1.
        kept: Further columns, values of their types.
    """

    source_key: str
    image: bytes = b""
    captions: tuple[str, ...] = ()
    modality: str | None = None
    labels: tuple[str, ...] = ()
    dataset: str | None = None
    group_id: str | None = None
    source_id: str | None = None
    license: str | None = None
    split: str | None = None
    row: int | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    filtered: bool = False
    reason: str | None = None
    detail: str = ""


Row = Record | Callable[[], Record]
"""What a source reads: a record, or a call that fetches its picture from far away and may be under way with others."""


class RowFaultError(Exception):
    """One row cannot be used; ``reason`` is a short countable category, ``detail`` is about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def decode_text(data: bytes) -> str:
    """The text that a file holds: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        RowFaultError: It is neither. No other encoding is guessed at: a wrong guess would store other words.
    """
    if not data.startswith(UTF16_MARKS):
        return decode_utf8(data)
    try:
        return decode_utf8(data.decode("utf-16").encode())
    except UnicodeError as error:
        raise RowFaultError("malformed row", f"not UTF-16 text, as its first two bytes say ({error})") from error


def decode_utf8(data: bytes) -> str:
    """A line or a cell as text; a byte order mark is taken off.

    Raises:
        RowFaultError: It is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowFaultError("malformed row", f"not UTF-8 text ({error})") from error
    if "\0" in text:
        raise RowFaultError("malformed row", "not UTF-8 text (it holds zero bytes, as UTF-16 and UTF-32 do)")
    return text


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing; NaN is how pandas writes that."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def clean_name(value: Any, what: str) -> str | None:
    """A cell that names a row or a group, as text: the same whatever type its column has, and without what signs.

    pandas makes 7.0 of the 7 in a column that lacks a value.

    Raises:
        RowFaultError: See :func:`clean_text`.
    """
    if isinstance(value, float | Decimal) and value == value and value == int(value):
        value = int(value)
    text = clean_text(value, what)
    return unsigned(text) if text and "://" in text else text


def clean_text(value: Any, what: str = "the cell") -> str | None:
    """A cell as text that any Arrow reader accepts, without surrounding space; None for nothing.

    Lone surrogates and NUL characters, which come from damaged JSON and file names, become ``?``.

    Raises:
        RowFaultError: It is bytes that are no text, or of a type that is no text, number, truth, date or time.
    """
    if isinstance(value, bytes):
        value = decode_text(value)
    if is_empty(value):
        return None
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, datetime.date | datetime.time):
        value = value.isoformat()
    elif not isinstance(value, str | int | float | Decimal):
        raise RowFaultError("unreadable cell", f"{what} holds a {type(value).__name__}, where a text was expected")
    text = str(value).encode("utf-8", "replace").decode("utf-8").replace("\0", "?").strip()
    return text or None


def clean_texts(value: Any, what: str = "the cell") -> tuple[str, ...]:
    """A cell that holds a text or a list of texts, as the distinct ones that say something, in order.

    Raises:
        RowFaultError: See :func:`clean_text`.
    """
    cells = value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(text for text in (clean_text(cell, what) for cell in cells) if text))


def clean_captions(value: Any) -> tuple[str, ...]:
    """A caption cell (text or a list of texts) as distinct captions in order; none where it is empty.

    Raises:
        RowFaultError: One is longer than ``MAX_CAPTION_CHARS``, or of a type that is no text.
    """
    captions = clean_texts(value, "the caption")
    longest = max(map(len, captions), default=0)
    if longest > MAX_CAPTION_CHARS:
        raise RowFaultError("caption too long", f"{longest} characters; the limit is {MAX_CAPTION_CHARS}")
    return captions


def clean_labels(value: Any, separator: str | None = None) -> tuple[str, ...]:
    """A label cell (text or a list of texts) as distinct labels in order; a separator divides each text.

    Raises:
        RowFaultError: One is of a type that is no text.
    """
    labels = clean_texts(value, "the label")
    if separator is None:
        return labels
    return clean_texts([part for label in labels for part in label.split(separator)])


def clean_split(value: Any) -> str | None:
    """A split cell as train, val or test; None leaves the choice to the hash.

    Raises:
        RowFaultError: It names none of them.
    """
    text = clean_text(value)
    if text is None:
        return None
    found = _SPLITS.get(text.lower())
    if found is None:
        raise RowFaultError("unknown split", f"{text!r} is none of {', '.join(_SPLITS)}")
    return found


_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def is_kept(labels: tuple[str, ...], panel: str | None, license_name: str | None, config: IngestConfig) -> bool:
    """Whether a row passes the filters; a row that does not say what is asked for does not pass.

    A licence matches ``keep_licenses`` entry "CC BY" if it is "CC BY" or "CC BY 4.0", but not "CC BY-NC".
    """
    if config.keep_labels and not {x.lower() for x in labels} & {x.lower() for x in config.keep_labels}:
        return False
    if config.keep_panels and (panel or "").lower() not in {x.lower() for x in config.keep_panels}:
        return False
    return not config.keep_licenses or any(_same_license(license_name or "", kept) for kept in config.keep_licenses)


def _same_license(found: str, kept: str) -> bool:
    found, kept = found.lower(), kept.lower()
    rest = found[len(kept) :]
    return found.startswith(kept) and not (rest[:1].isalnum() or rest.startswith("-"))
