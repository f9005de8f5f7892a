"""WebDataset tars: files that share a name up to its first dot are one sample. BIOMEDICA's tars are such.

A tar is read as a stream and nothing is written to disk, so a member's name is only a key, whatever it says. Members
of other kinds (``.pickle``, ``.pyd``, links, devices) are passed over unread.

BIOMEDICA's ``.json`` gives the modality, the labels to filter by, the panel type and the licence. Its primary labels
"Clinical Imaging" and "Microscopy" are umbrellas (CT and endoscopy are both the former), so the modality is the first
secondary label there and the primary label elsewhere, in lower case, with the names the other sources use for some.
"""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from common.storage import Storage
from common.storage_errors import explained
from extractor.config import IngestConfig
from extractor.sources.addresses import base_name
from extractor.sources.columns import USUAL_NAMES
from extractor.sources.record import (
    MAX_CAPTION_CHARS,
    Part,
    Record,
    RowFaultError,
    clean_captions,
    clean_split,
    clean_text,
    is_kept,
)

IMAGES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "jp2", "avif")
MAX_JSON_BYTES = 64 << 20  # BIOMEDICA's hold whole articles
READ_BYTES = 1 << 16
"""At once, about a picture: of less it is put together from pieces, of more what is left over is copied each time."""
_UMBRELLAS = ("clinical imaging", "microscopy")
_MODALITIES = {
    "computerized tomography": "CT",
    "magnetic resonance": "MRI",
    "magnetic resonance imaging": "MRI",
    "x-ray radiography": "X-ray",
}
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def parts(uri: str, config: IngestConfig) -> list[Part]:
    """One part per tar; nothing is opened."""
    del config
    return [Part("webdataset", uri, base_name(uri))]


def read(part: Part, config: IngestConfig) -> Iterator[Record]:
    """Each sample of a tar as a record; a tar that breaks off ends with one record that says so."""
    storage = Storage(part.uri)
    with explained(f"read {part.uri}"), storage.fs.open(storage.path(), "rb") as stream:
        for key, members in _samples(stream, config.limits.max_file_mib << 20):
            source_key = f"{part.name}/{clean_text(key) or '?'}"
            try:
                yield _record(source_key, members, config)
            except RowFaultError as fault:
                yield Record(source_key, reason=fault.reason, detail=fault.detail)


Members = dict[str, "bytes | RowFaultError"]
"""Extension -> content of a sample's file, or what is wrong with it."""


def _samples(stream: Any, max_bytes: int) -> Iterator[tuple[str, Members]]:
    """Key and members of each sample, in order."""
    key: str | None = None
    members: Members = {}
    name = ""
    try:
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=READ_BYTES) as tar:
            for member in tar:
                # Streaming keeps every header it has seen; a tar of a million members would fill the memory.
                tar.members = []  # type: ignore[attr-defined]  # there since ever, missing in the stubs
                name = member.name
                stem, extension = _split_name(name)
                if not member.isreg() or extension not in (*IMAGES, "txt", "json"):
                    continue
                if key is not None and (stem != key or extension in members):
                    yield key, members
                    members = {}
                key = stem
                members[extension] = RowFaultError("truncated tar", f"the tar ends within {name}")
                members[extension] = _content(tar, member, extension, max_bytes)
    except _TAR_ERRORS as error:
        if not any(
            isinstance(content, RowFaultError) and content.reason == "truncated tar" for content in members.values()
        ):
            if key is not None and members:
                yield key, members
            fault = RowFaultError("truncated tar", f"{type(error).__name__} behind member {name!r}: {error}")
            key, members = "(rest of the tar)", {"jpg": fault}
    if key is not None and members:
        yield key, members


def _split_name(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, max_bytes: int) -> bytes | RowFaultError:
    limit = {"txt": 8 * MAX_CAPTION_CHARS, "json": MAX_JSON_BYTES}.get(extension, max_bytes)
    if member.size > limit:
        reason = "caption too long" if extension == "txt" else "file too large"
        return RowFaultError(reason, f"{member.name} has {member.size} bytes; the limit is {limit}")
    file = tar.extractfile(member)
    assert file is not None, "a regular member has content"
    return file.read()


def _record(source_key: str, members: Members, config: IngestConfig) -> Record:
    for content in members.values():
        if isinstance(content, RowFaultError):
            raise content
    metadata = _metadata(members.get("json"))
    primary, secondary = (texts(metadata.get(f"image_{which}_label")) for which in ("primary", "secondary"))
    panel = clean_text(metadata.get("image_panel_type"))
    license_name = clean_text(_lookup(metadata, "license", config))
    label = clean_text(_lookup(metadata, "label", config))
    labels = (*primary, *secondary, *((label,) if label else ()))
    if not is_kept(labels, panel, license_name, config):
        return Record(source_key, filtered=True)
    image = next((members[kind] for kind in IMAGES if kind in members), None)
    if not isinstance(image, bytes):
        raise RowFaultError("no image", f"the sample has only {', '.join(sorted(members))}")
    text = members.get("txt")
    caption = text.decode("utf-8", "replace") if isinstance(text, bytes) else _lookup(metadata, "caption", config)
    return Record(
        source_key,
        image,
        clean_captions(caption),
        modality=modality_of(primary, secondary) or clean_text(_lookup(metadata, "modality", config)),
        label=label,
        license=license_name,
        split=clean_split(_lookup(metadata, "split", config)),
    )


def _metadata(content: bytes | RowFaultError | None) -> dict[str, Any]:
    if not isinstance(content, bytes):
        return {}
    try:
        found = json.loads(content.decode("utf-8-sig"))
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
    cells = value if isinstance(value, list) else [value]
    return tuple(text for text in map(clean_text, cells) if text)


def modality_of(primary: tuple[str, ...], secondary: tuple[str, ...]) -> str | None:
    """The modality by BIOMEDICA's primary and secondary labels; None without any."""
    labels = secondary if primary and primary[0].lower() in _UMBRELLAS and secondary else primary
    return _MODALITIES.get(labels[0].lower(), labels[0].lower()) if labels else None
