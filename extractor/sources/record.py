"""What every source turns into: parts (units of work, planned by the driver) and records (read by workers)."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Any

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
    caption: str
    modality: str | None = None
    label: str | None = None
    license: str | None = None
    split: str | None = None

    def names(self) -> list[str]:
        """The columns that exist."""
        found = (self.image, self.caption, self.modality, self.label, self.license, self.split)
        return [name for name in found if name is not None]


@dataclass(frozen=True)
class Part:
    """A piece of a source that one task reads: a tar, some rows of a text table, some row groups of Parquet.

    Attributes:
        kind: Key of ``extractor.sources.SOURCES``.
        uri: The file.
        name: The file's base name, which begins every source key: the same on any machine.
        begin: First byte (text tables; 0 is the whole table, its header too) or row group (Parquet).
        end: One past the last; None reads to the end.
        first_row: Number of the first row within the file, from 0.
        columns: For tables, what is where.
        header: For delimited text, the names of all columns in order.
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
    header: tuple[str, ...] = ()
    delimiter: str = ","
    quotes: bool = True

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Part:
        """The inverse of ``asdict``, also after a journey through JSON."""
        columns = value["columns"] and Columns(**value["columns"])
        return cls(**{**value, "columns": columns, "header": tuple(value["header"])})


@dataclass(frozen=True)
class Record:
    """One input row: usable (``image`` and ``captions`` set), filtered out, or with a ``reason`` why it is neither.

    ``captions`` has the main caption first.
    """

    source_key: str
    image: bytes = b""
    captions: tuple[str, ...] = ()
    modality: str | None = None
    label: str | None = None
    license: str | None = None
    split: str | None = None
    filtered: bool = False
    reason: str | None = None
    detail: str = ""


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


def clean_text(value: Any) -> str | None:
    """A cell as text that any Arrow reader accepts, without surrounding space; None for nothing.

    Lone surrogates and NUL characters, which come from damaged JSON and file names, become ``?``.

    Raises:
        RowFaultError: It is bytes, as a Parquet file may hold, and they are no text.
    """
    if isinstance(value, bytes):
        value = decode_text(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if value != value:  # NaN is how pandas writes an empty cell
        return None
    text = str(value).encode("utf-8", "replace").decode("utf-8").replace("\0", "?").strip()
    return text or None


def clean_captions(value: Any) -> tuple[str, ...]:
    """A caption cell (text or a list of texts) as distinct non-empty captions in order.

    Raises:
        RowFaultError: There is none, or one is longer than ``MAX_CAPTION_CHARS``.
    """
    cells = value if isinstance(value, list | tuple) else [value]
    captions = tuple(dict.fromkeys(text for text in map(clean_text, cells) if text))
    if not captions:
        raise RowFaultError("no caption", "the caption is missing or empty")
    longest = max(map(len, captions))
    if longest > MAX_CAPTION_CHARS:
        raise RowFaultError("caption too long", f"{longest} characters; the limit is {MAX_CAPTION_CHARS}")
    return captions


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
