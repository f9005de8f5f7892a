"""From what the user typed to files: braces, globs and folders; and from an image cell to bytes."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import posixpath
import re
import threading
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from common.errors import SourceError, StorageError
from common.logs import logger
from common.storage import Storage, absolute_address
from common.storage_errors import explained, unsigned, without_secrets
from extractor.config import IngestConfig
from extractor.sources.record import RowFaultError

if TYPE_CHECKING:
    from extractor.sources.remote import WebPictures

EXTENSIONS = {  # kind -> how its file names end
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "parquet": (".parquet", ".pq"),
    # Comes after jsonl: found by its name only when the kind is asked for, for other tables are called so, too.
    "mmkd-features": ("meta.jsonl",),
}
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"^(\d+)\.\.(\d+)$")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_WEB = re.compile(r"https?://", re.IGNORECASE)
# What is wrong with this one path; anything else (a lost connection, a full disk) stops the run instead.
_PATH_FAULTS = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, ImportError)
_PATH_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
HASHED_BYTES = 16 << 20
"""Local files up to this size are known by their content. Reading more would make it slow to find nothing to do."""
# S3 answers with these to whoever asks wrongly, for whatever object.
_CREDENTIAL_FAULTS = {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed"}
_CREDENTIAL_FAULTS |= {"SignatureDoesNotMatch", "TokenRefreshRequired"}


class SourceFile(NamedTuple):
    """A file that a source stands for."""

    uri: str
    name: str
    """Where it lies below the folder that the user named, or its base name."""

    @property
    def folders(self) -> dict[str, str]:
        """Keys and values of the folders between (``split=test/``), as Hive writes them.

        Raises:
            SourceError: One key has two values.
        """
        found: dict[str, str] = {}
        for key, mark, value in (part.partition("=") for part in self.name.split("/")[:-1]):
            if key and mark and value != _HIVE_NULL and found.setdefault(key, unquote(value)) != unquote(value):
                raise SourceError(f"The folders of {without_secrets(self.uri)} give {key} two values. Rename one.")
        return found


def base_name(uri: str) -> str:
    """The last component of an address, without a query that signs."""
    return unsigned(uri).rstrip("/").rsplit("/", 1)[-1]


def short_name(uri: str) -> str:
    """The last two components of an address: enough to recognise a source, the same on another machine."""
    uri = unsigned(uri)
    path = uri.split("://", 1)[-1] if "://" in uri else os.path.abspath(uri)
    return "/".join(path.rstrip("/").split("/")[-2:])


def expand_braces(pattern: str) -> list[str]:
    """``a-{000..002}.tar`` or ``a-{x,y}.tar`` as the names it stands for, in order; others as they are.

    Raises:
        SourceError: A brace holds neither a range nor a list.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = _NUMBERS.match(match.group(1))
    if numbers:
        low, high = numbers.groups()
        choices = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    else:
        choices = match.group(1).split(",")
    if not choices or (numbers is None and len(choices) < 2):
        raise SourceError(
            f"The pattern {pattern!r} cannot be read: {match.group(0)!r} is neither a rising range such as "
            "{000..012} nor a list such as {a,b}."
        )
    names = (pattern[: match.start()] + choice + pattern[match.end() :] for choice in choices)
    return list(itertools.chain.from_iterable(map(expand_braces, names)))


def find_files(source: str, kind: str) -> list[SourceFile]:
    """The files a source stands for, in order.

    Args:
        source: A file, a folder, or a pattern with braces or wildcards.
        kind: A key of ``EXTENSIONS`` or "auto": which files of a folder count.

    Raises:
        SourceError: There is no such thing, or a folder holds nothing usable or files of several kinds.
    """
    whole = Storage(source)
    if whole.exists():
        if whole.fs.isdir(whole.path()):
            return _files_below(source, kind)
        address = absolute_address(source)
        return [SourceFile(address, _below(_root_of(unsigned(address).rpartition("/")[0]), unsigned(address)))]
    found: list[SourceFile] = []
    for name in expand_braces(source):
        # The question mark of a URL begins its query.
        if any(mark in (name.partition("?")[0] if _WEB.match(name) else name) for mark in "*?["):
            storage = Storage(name)
            matches = sorted(storage.fs.glob(storage.path()))
            if not matches:
                raise SourceError(
                    f"No file matches {without_secrets(name)}. Check the pattern, and quote it so the shell leaves it."
                )
            root = _root_of(re.split(r"[*?\[]", storage.path())[0].rpartition("/")[0])
            for path in matches:
                if storage.fs.isdir(path):
                    found += _files_below(_address(storage, path), kind)
                else:
                    found.append(SourceFile(_address(storage, path), _below(root, path)))
        elif not Storage(name).exists():
            raise SourceError(
                f"There is nothing at {without_secrets(name)}"
                + (f" (one of the names {without_secrets(source)!r} stands for)" if name != source else "")
                + ". Expected a tar, JSONL, CSV or Parquet file, a folder of them, or a pattern. Check the address; "
                "on a cluster, a local path must be visible to every machine."
            )
        else:
            root = _root_of(absolute_address(source.partition("{")[0].rpartition("/")[0] or "."))
            address = absolute_address(name)
            found.append(SourceFile(address, _below(root, unsigned(address))))
    return found


def _root_of(folder: str) -> str:
    """A folder without the ``key=value`` at its end, which say something of the files in it."""
    while "=" in folder.rpartition("/")[2]:
        folder = folder.rpartition("/")[0]
    return folder


def _below(root: str, path: str) -> str:
    """A path without the folder it lies in; its base name if it lies elsewhere."""
    root = f"{root.rstrip('/')}/"
    return path[len(root) :] if path.startswith(root) else base_name(path)


def kind_of(uri: str) -> str | None:
    """The kind of a file by its extension, or None."""
    name = base_name(uri).lower()
    return next((kind for kind, endings in EXTENSIONS.items() if name.endswith(endings)), None)


def _files_below(folder: str, kind: str) -> list[SourceFile]:
    storage = Storage(folder)
    storage.fs.invalidate_cache()
    everything = sorted(storage.fs.find(storage.path()))
    if kind == "auto":
        kinds = {path: kind_of(path) for path in everything}
        files = [path for path, found in kinds.items() if found is not None]
        wanted = {kinds[path] for path in files}
        if len(wanted) > 1:
            raise SourceError(
                f"The folder {without_secrets(folder)} holds files of several kinds "
                f"({', '.join(sorted(map(str, wanted)))}). Say which with --format, or name the file."
            )
    else:
        files = [path for path in everything if base_name(path).lower().endswith(EXTENSIONS[kind])]
    chosen = set(files)
    others = Counter(os.path.splitext(path)[1] or "no extension" for path in everything if path not in chosen)
    if not files:
        expected = ".tar, .jsonl, .csv, .tsv or .parquet" if kind == "auto" else " or ".join(EXTENSIONS[kind])
        raise SourceError(
            f"The folder {without_secrets(folder)} holds no {'usable' if kind == 'auto' else kind} source: "
            f"{len(everything)} files with extensions {', '.join(sorted(others)[:8]) or '(no files)'}. "
            f"Expected {expected}."
        )
    if others:
        logger.info(
            "ingest: %s: %d files are read; %d others are no tables or tars, and read only where one names them: %s",
            *(without_secrets(folder), len(files), others.total()),
            ", ".join(f"{ending} {count}" for ending, count in others.most_common(8)),
        )
    return [SourceFile(_address(storage, path), _below(_root_of(storage.path()), path)) for path in files]


def _address(storage: Storage, path: str) -> str:
    return path if storage.is_local else str(storage.fs.unstrip_protocol(path))


def identity_of(uri: str) -> list[object]:
    """What tells one version of a file from another: base name, size, and content, or time or tag of the last change.

    A copy of a small local file is the same source, whatever time a copying program gave it.
    """
    storage = Storage(uri)
    if storage.is_local:
        path = storage.path()
        status = os.stat(path)
        if status.st_size > HASHED_BYTES:
            return [base_name(uri), status.st_size, status.st_mtime_ns]
        with explained(f"read {path}"), open(path, "rb") as stream:
            return [base_name(uri), status.st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
    info = storage.fs.info(storage.path())
    # Of a web server that gives no tag, fsspec makes one of the address.
    mark = info.get("ETag") or info.get("etag") or storage.fs.ukey(unsigned(storage.path()))
    return [base_name(uri), info.get("size"), str(mark)]


def image_address(manifest: str, cell: str) -> str:
    """Where an image cell points: itself if absolute or a URI, else relative to the manifest's folder.

    A ``file://`` address is the path it stands for: what is written with a percent sign there has another name on disk.
    """
    if cell.lower().startswith("file://"):
        return unquote(urlsplit(cell).path)
    if "://" in cell or cell.startswith("/"):
        return cell
    if _WEB.match(manifest):
        manifest = manifest.partition("?")[0]
    scheme, mark, path = manifest.rpartition("://")
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(path), cell)) if mark else None
    return f"{scheme}://{joined}" if joined else os.path.join(os.path.dirname(manifest), cell)


def is_far(address: str) -> bool:
    """Whether reading a file is mostly waiting: it is on the web or in an object store."""
    return "://" in address


class Pictures:
    """Reads the pictures that the rows of one part name, wherever they are; several threads may ask at once."""

    def __init__(self, config: IngestConfig) -> None:
        self._config = config
        self._max_bytes = config.limits.max_file_mib << 20
        self._web: WebPictures | None = None
        self._lock = threading.Lock()

    def read(self, address: str, max_bytes: int | None = None) -> bytes:
        """The bytes of an image file; of one larger than ``max_bytes`` no more than that is ever in memory.

        Raises:
            RowFaultError: There is no such file, something is wrong with this one path, or a URL gives no picture.
            StorageError: The storage cannot be reached; other rows would fare no better.
        """
        max_bytes = self._max_bytes if max_bytes is None else max_bytes
        if not _WEB.match(address):
            return read_image(address, max_bytes)
        with self._lock:
            if self._web is None:
                from extractor.sources.remote import WebPictures  # slow to import, and most tables name files

                self._web = WebPictures(self._config.fetch)
        return self._web.read(address, max_bytes)


def read_image(address: str, max_bytes: int) -> bytes:
    """The bytes of an image file on a disk or in an object store.

    Raises:
        RowFaultError: There is no such file, or something is wrong with this one path.
        StorageError: The storage cannot be reached; other rows would fare no better.
    """
    folder, _, name = address.rpartition("/")
    shown = without_secrets(address)
    if "\0" in address or not name:
        raise RowFaultError("bad image path", repr(shown))
    try:
        storage = _folder(folder or ("/" if address.startswith("/") else "."))
        return storage.read_bytes(name, max_bytes)
    except FileNotFoundError as error:
        raise RowFaultError("image not found", f"no file at {shown}") from error
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.EFBIG:
            raise RowFaultError("file too large", f"{shown}: {cause.strerror}") from error
        is_of_this_path = isinstance(cause, _PATH_FAULTS) or (
            isinstance(cause, OSError) and cause.errno in _PATH_ERRNOS
        )
        if is_of_this_path and not (address.startswith(("s3://", "s3a://")) and _is_of_credentials(cause)):
            raise RowFaultError("image not readable", f"{shown}: {type(cause).__name__}") from error
        raise


def _is_of_credentials(error: BaseException | None) -> bool:
    from common.retries import error_code  # imports botocore

    return error_code(error) in _CREDENTIAL_FAULTS


@lru_cache(maxsize=64)
def _folder(uri: str) -> Storage:
    return Storage(uri)
