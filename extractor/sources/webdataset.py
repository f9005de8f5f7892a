"""WebDataset tars: files that share a name up to its last dot are one sample. BIOMEDICA's tars are such.

Names may have more dots: ``1.2.840.jpg`` and ``1.2.840.txt`` are the sample ``1.2.840``. WebDataset itself cuts at the
first dot, so that ``g.seg.png`` is another picture of sample ``g``: one that is no sample by itself and lies beside
``g`` is passed over.

A tar is read as a stream and nothing is written to disk, so a member's name is only a key, whatever it says. Members
of other kinds (``.pickle``, ``.pyd``, devices) are passed over unread, and counted in the log. Links are rejects: what
they point to may lie behind, and a stream goes forward only. Several tars in one file, as ``cat`` leaves them, are read
to the last.

BIOMEDICA's ``.json`` gives the modality, the labels to filter by, the panel type and the licence. Its primary labels
"Clinical Imaging" and "Microscopy" are umbrellas (CT and endoscopy are both the former), so the modality is the first
secondary label there and the primary label elsewhere, in lower case, with the names the other sources use for some.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from common.logs import logger
from common.storage import Storage
from common.storage_errors import explained
from extractor.config import IngestConfig
from extractor.sources.addresses import SourceFile
from extractor.sources.columns import USUAL_NAMES, kept_cells, kept_kinds
from extractor.sources.record import (
    MAX_CAPTION_CHARS,
    Part,
    Record,
    RowFaultError,
    clean_captions,
    clean_labels,
    clean_name,
    clean_split,
    clean_text,
    clean_texts,
    decode_text,
    is_empty,
    is_kept,
)

IMAGES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "jp2", "avif")
KNOWN = (*IMAGES, "txt", "json")
MAX_UNDECIDED = 4
"""Samples in memory of which it is not known yet whether they are another's further files."""
MAX_RULES = 64
"""Kinds of members passed over that are told apart: a tar may hold a million extensions."""
MAX_JSON_BYTES = 64 << 20  # BIOMEDICA's hold whole articles
READ_BYTES = 1 << 16
"""At once, of what is packed or passed over."""
_UMBRELLAS = ("clinical imaging", "microscopy")
_MODALITIES = {
    "computerized tomography": "CT",
    "magnetic resonance": "MRI",
    "magnetic resonance imaging": "MRI",
    "x-ray radiography": "X-ray",
}
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def parts(file: SourceFile, config: IngestConfig) -> list[Part]:
    """One part per tar; nothing is opened."""
    return [Part("webdataset", file.uri, file.name, kept=kept_kinds(config), folders=file.folders)]


def read(part: Part, config: IngestConfig) -> Iterator[Record]:
    """Each sample of a tar as a record; a tar that breaks off ends with one record that says so."""
    storage = Storage(part.uri)
    passed: Counter[str] = Counter()
    with explained(f"read {part.uri}"), storage.fs.open(storage.path(), "rb") as stream:
        for row, (key, members) in enumerate(_samples(stream, config.limits.max_file_mib << 20, passed), 1):
            if not part.wants(row):
                continue
            source_key = f"{part.name}/{clean_text(key) or '?'}"
            try:
                yield _record(source_key, row, members, part, config)
            except RowFaultError as fault:
                yield Record(source_key, row=row, reason=fault.reason, detail=fault.detail)
    if passed:
        # A warning, because workers of a cluster say nothing less.
        logger.warning(
            "ingest: %s: passed over %d members that are no part of a sample: %s. A sample is the files whose names "
            "are the same up to the last dot, with one of these behind it: %s.",
            *(part.name, passed.total(), ", ".join(f"{rule} {count}" for rule, count in passed.most_common(8))),
            ", ".join(KNOWN),
        )


Members = dict[str, "bytes | RowFaultError"]
"""Extension -> content of a sample's file, or what is wrong with it."""


def _samples(stream: Any, max_bytes: int, passed: Counter[str]) -> Iterator[tuple[str, Members]]:
    """Key and members of each sample, in order; ``passed`` counts by rule what is in none."""
    window = _Window(passed)
    name = ""
    try:
        for tar, member in _members(_unpacked(stream)):
            name = member.name
            rule = _unusable(member)
            if rule is not None:
                if not member.isdir():
                    passed[rule if rule in passed or len(passed) < MAX_RULES else "others"] += 1
                continue
            key, extension = _split_name(name)
            yield from window.make_room(key, extension)
            members = window.open[key]
            members[extension] = RowFaultError("truncated tar", f"the tar ends within {name}")
            members[extension] = _content(tar, member, extension, max_bytes)
    except _TAR_ERRORS as error:
        said = any(
            isinstance(content, RowFaultError) and content.reason == "truncated tar"
            for members in window.open.values()
            for content in members.values()
        )
        yield from window.close()
        if not said:
            fault = RowFaultError("truncated tar", f"{type(error).__name__} behind member {name!r}: {error}")
            yield "(rest of the tar)", {"jpg": fault}
    yield from window.close()


def _unpacked(stream: Any) -> Any:
    """The file's bytes, unpacked if they are packed; also where several packed files were put one behind the other."""
    head = _read_fully(stream, 6)
    whole = _Joined(head, stream)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=io.BufferedReader(whole, READ_BYTES))
    if head.startswith(b"BZh"):
        return bz2.BZ2File(io.BufferedReader(whole, READ_BYTES))
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(io.BufferedReader(whole, READ_BYTES))
    return whole


def _members(stream: Any) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of all tars that were put one behind the other.

    Raises:
        tarfile.ReadError: A header is damaged, or the file breaks off.
    """
    first = _read_block(stream)
    while first:
        forward: Any = _Forward(first, stream)  # it has what tarfile calls, not all that a file has
        with tarfile.open(fileobj=forward, mode="r:") as tar:
            for member in tar:
                # Streaming keeps every header it has seen; a tar of a million members would fill the memory.
                tar.members = []  # type: ignore[attr-defined]  # there since ever, missing in the stubs
                yield tar, member
        # tarfile takes any header that it cannot read for the end.
        if forward.last.strip(b"\0"):
            raise tarfile.ReadError("a damaged header")
        first = _read_block(stream)
        while first and not first.strip(b"\0"):
            first = _read_block(stream)


def _read_block(stream: Any) -> bytes:
    return _read_fully(stream, tarfile.BLOCKSIZE)


def _read_fully(stream: Any, size: int) -> bytes:
    pieces = []
    while size and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class _Joined(io.RawIOBase):
    """Some bytes, and the stream they were taken from."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._head:
            piece, self._head = self._head[:size], self._head[size:]
            return piece
        return bytes(self._stream.read(size))

    def readinto(self, buffer: Any) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


class _Forward:
    """A stream as tarfile reads a file: it only ever goes forward, and nothing is read ahead.

    Attributes:
        last: What was read last.
    """

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = head, stream
        self._place = 0
        self.last = b""

    def tell(self) -> int:
        return self._place

    def seek(self, place: int) -> int:
        while self._place < place and self.read(min(place - self._place, READ_BYTES)):
            pass
        return self._place

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        self.last = head + _read_fully(self._stream, size - len(head)) if len(head) < size else head
        self._place += len(self.last)
        return self.last


class _Window:
    """The samples of a stream that are not complete, or may be part of another: names that begin alike, with dots.

    Args:
        passed: Where files are counted that are another sample's.
    """

    def __init__(self, passed: Counter[str]) -> None:
        self.open: dict[str, Members] = {}
        self._passed = passed

    def make_room(self, key: str, extension: str) -> Iterator[tuple[str, Members]]:
        """Open the sample of a member; gives the samples to which nothing can come any more."""
        if extension in self.open.get(key, {}) or not any(_root(key) == _root(other) for other in self.open):
            yield from self.close()
        if key not in self.open:
            for other in list(self.open):
                if _is_whole(self.open[other]) and not key.startswith(f"{other}."):
                    yield from self._take(other)
            while len(self.open) > MAX_UNDECIDED:
                # Not the first, which may be the sample that all others belong to.
                yield from self._take(list(self.open)[1])
            self.open[key] = {}

    def close(self) -> Iterator[tuple[str, Members]]:
        """Give all samples."""
        found = [sample for key in list(self.open) for sample in self._take(key, keep=True)]
        self.open.clear()
        yield from found

    def _take(self, key: str, keep: bool = False) -> Iterator[tuple[str, Members]]:
        members = self.open[key] if keep else self.open.pop(key)
        if not _is_whole(members) and any(key.startswith(f"{other}.") for other in self.open):
            self._passed["further files of a sample"] += len(members)
        else:
            yield key, members


def _is_whole(members: Members) -> bool:
    """Whether a sample has a picture and something about it; one with a damaged file is told of as it is."""
    if any(isinstance(content, RowFaultError) for content in members.values()):
        return True
    return not members.keys().isdisjoint(IMAGES) and not members.keys().isdisjoint(("txt", "json"))


def _unusable(member: tarfile.TarInfo) -> str | None:
    """By what rule a member is passed over; None if it belongs to a sample."""
    is_link = member.issym() or member.islnk()
    if not member.isreg() and not is_link:
        return "devices and the like"
    file = member.name.rpartition("/")[2]
    if file.startswith("."):
        return "hidden files"
    extension = _split_name(file)[1]
    if extension in KNOWN and "." in file:
        return None
    # Names are hostile until shown otherwise, and this one goes to a terminal.
    return f".{extension}" if extension.isalnum() and len(extension) <= 16 and "." in file else "other names"


def _split_name(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.rpartition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _root(key: str) -> str:
    """What names that may belong together have in common: all up to the first dot."""
    folder, slash, file = key.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, max_bytes: int) -> bytes | RowFaultError:
    if not member.isreg():  # the file may be anywhere, or in no tar at all
        said = f"{member.name} is a link to {member.linkname!r}; store the file itself (tar --hard-dereference -h)"
        return RowFaultError("link in the tar", said)
    limit = {"txt": 8 * MAX_CAPTION_CHARS, "json": MAX_JSON_BYTES}.get(extension, max_bytes)
    if member.size > limit:
        reason = "caption too long" if extension == "txt" else "file too large"
        return RowFaultError(reason, f"{member.name} has {member.size} bytes; the limit is {limit}")
    file = tar.extractfile(member)
    assert file is not None, "a regular member has content"
    return file.read()


def _record(source_key: str, row: int, members: Members, part: Part, config: IngestConfig) -> Record:
    for content in members.values():
        if isinstance(content, RowFaultError):
            raise content
    metadata = _metadata(members.get("json"))
    metadata |= {name: value for name, value in part.folders.items() if is_empty(metadata.get(name))}
    primary, secondary = (texts(metadata.get(f"image_{which}_label")) for which in ("primary", "secondary"))
    panel = clean_text(metadata.get("image_panel_type"), "image_panel_type")
    license_name, dataset = (
        clean_text(_lookup(metadata, what, config), f"the {what}") for what in ("license", "dataset")
    )
    group_id, source_id = (clean_name(_lookup(metadata, what, config), f"the {what}") for what in ("group", "id"))
    for what, found in (("group", group_id), ("id", source_id)):
        if found is None and getattr(config.columns, what) is not None:
            raise RowFaultError(f"no {what}", f"the .json has no {getattr(config.columns, what)!r}")
    labels = clean_labels(_lookup(metadata, "label", config), config.label_separator)
    if not is_kept((*primary, *secondary, *labels), panel, license_name, config):
        return Record(source_key, filtered=True)
    image = next((members[kind] for kind in IMAGES if kind in members), None)
    if not isinstance(image, bytes):
        raise RowFaultError("no image", f"the sample has only {', '.join(sorted(members))}")
    text = members.get("txt")
    caption = decode_text(text) if isinstance(text, bytes) else _lookup(metadata, "caption", config)
    return Record(
        source_key,
        image,
        clean_captions(caption),
        modality=modality_of(primary, secondary) or clean_text(_lookup(metadata, "modality", config), "the modality"),
        labels=labels,
        dataset=dataset or config.dataset,
        group_id=group_id,
        source_id=source_id,
        license=license_name,
        split=clean_split(_lookup(metadata, "split", config)),
        row=row,
        kept=kept_cells(metadata, part.kept),
    )


def _metadata(content: bytes | RowFaultError | None) -> dict[str, Any]:
    if not isinstance(content, bytes):
        return {}
    try:
        found = json.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        raise RowFaultError("malformed metadata", f"the .json is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise RowFaultError("malformed metadata", f"the .json holds a {type(found).__name__}, not an object")
    return found


def _lookup(metadata: dict[str, Any], what: str, config: IngestConfig) -> Any:
    asked: str | None = getattr(config.columns, what)
    return next((metadata[name] for name in ((asked,) if asked else USUAL_NAMES[what]) if name in metadata), None)


def texts(value: Any) -> tuple[str, ...]:
    """A cell of BIOMEDICA's metadata, a text or a list of texts, as the texts that say something."""
    return clean_texts(value, "BIOMEDICA's label")


def modality_of(primary: tuple[str, ...], secondary: tuple[str, ...]) -> str | None:
    """The modality by BIOMEDICA's primary and secondary labels; None without any."""
    labels = secondary if primary and primary[0].lower() in _UMBRELLAS and secondary else primary
    return _MODALITIES.get(labels[0].lower(), labels[0].lower()) if labels else None
