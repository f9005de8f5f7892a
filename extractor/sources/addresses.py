"""From what the user typed to files: braces, globs and folders; and from an image cell to bytes."""

from __future__ import annotations

import errno
import itertools
import os
import posixpath
import re
from functools import lru_cache

from common.errors import SourceError, StorageError
from common.storage import Storage, absolute_address
from extractor.sources.record import RowFaultError

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
_SECRETS = re.compile(r"(?<=://)[^/@]*@|\?.*$")
# What is wrong with this one path; anything else (a lost connection, a full disk) stops the run instead.
_PATH_FAULTS = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, ImportError)
_PATH_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def base_name(uri: str) -> str:
    """The last component of an address."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def short_name(uri: str) -> str:
    """The last two components of an address: enough to recognise a source, the same on another machine."""
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


def shown(uri: str) -> str:
    """An address fit for logs and files: without user name, password and query, where signed links keep secrets."""
    return _SECRETS.sub("", uri) if "://" in uri else uri


def find_files(source: str, kind: str) -> list[str]:
    """Addresses of the files a source stands for, in order.

    Args:
        source: A file, a folder, or a pattern with braces or wildcards.
        kind: A key of ``EXTENSIONS`` or "auto": which files of a folder count.

    Raises:
        SourceError: There is no such thing, or a folder holds nothing usable or files of several kinds.
    """
    whole = Storage(source)
    if whole.exists():
        return _files_below(source, kind) if whole.fs.isdir(whole.path()) else [absolute_address(source)]
    found: list[str] = []
    for name in expand_braces(source):
        if any(mark in name for mark in "*?["):
            storage = Storage(name)
            matches = sorted(storage.fs.glob(storage.path()))
            if not matches:
                raise SourceError(f"No file matches {name}. Check the pattern, and quote it so the shell leaves it.")
            found += [_address(storage, path) for path in matches]
        elif not Storage(name).exists():
            raise SourceError(
                f"There is nothing at {name}"
                + (f" (one of the names {source!r} stands for)" if name != source else "")
                + ". Expected a tar, JSONL, CSV or Parquet file, a folder of them, or a pattern. Check the address; "
                "on a cluster, a local path must be visible to every machine."
            )
        else:
            found.append(absolute_address(name))
    return found


def kind_of(uri: str) -> str | None:
    """The kind of a file by its extension, or None."""
    name = base_name(uri).lower()
    return next((kind for kind, endings in EXTENSIONS.items() if name.endswith(endings)), None)


def _files_below(folder: str, kind: str) -> list[str]:
    storage = Storage(folder)
    storage.fs.invalidate_cache()
    everything = sorted(storage.fs.find(storage.path()))
    if kind == "auto":
        kinds = {path: kind_of(path) for path in everything}
        files = [path for path, found in kinds.items() if found is not None]
        wanted = {kinds[path] for path in files}
        if len(wanted) > 1:
            raise SourceError(
                f"The folder {folder} holds files of several kinds ({', '.join(sorted(map(str, wanted)))}). "
                "Say which with --format, or name the file."
            )
    else:
        files = [path for path in everything if base_name(path).lower().endswith(EXTENSIONS[kind])]
    if not files:
        endings = sorted({os.path.splitext(path)[1] or "none" for path in everything})[:8]
        expected = ".tar, .jsonl, .csv, .tsv or .parquet" if kind == "auto" else " or ".join(EXTENSIONS[kind])
        raise SourceError(
            f"The folder {folder} holds no {'usable' if kind == 'auto' else kind} source: {len(everything)} files with "
            f"extensions {', '.join(endings) or '(no files)'}. Expected {expected}."
        )
    return [_address(storage, path) for path in files]


def _address(storage: Storage, path: str) -> str:
    return path if storage.is_local else str(storage.fs.unstrip_protocol(path))


def identity_of(uri: str) -> list[object]:
    """What tells one version of a file from another: base name, size, and time or tag of the last change."""
    storage = Storage(uri)
    if storage.is_local:
        status = os.stat(storage.path())
        return [base_name(uri), status.st_size, status.st_mtime_ns]
    info = storage.fs.info(storage.path())
    return [
        base_name(uri),
        info.get("size"),
        str(info.get("ETag") or info.get("etag") or storage.fs.ukey(storage.path())),
    ]


def image_address(manifest: str, cell: str) -> str:
    """Where an image cell points: itself if absolute or a URI, else relative to the manifest's folder."""
    if "://" in cell or cell.startswith("/"):
        return cell
    scheme, mark, path = manifest.rpartition("://")
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(path), cell)) if mark else None
    return f"{scheme}://{joined}" if joined else os.path.join(os.path.dirname(manifest), cell)


def read_image(address: str, max_bytes: int) -> bytes:
    """The bytes of an image file.

    Raises:
        RowFaultError: There is no such file, or something is wrong with this one path.
        StorageError: The storage cannot be reached; other rows would fare no better.
    """
    folder, _, name = address.rpartition("/")
    if "\0" in address or not name:
        raise RowFaultError("bad image path", repr(address))
    try:
        storage = _folder(folder or ("/" if address.startswith("/") else "."))
        if storage.is_local and os.path.exists(storage.path(name)) and os.path.getsize(storage.path(name)) > max_bytes:
            raise RowFaultError("file too large", f"{shown(address)} is larger than the limit of {max_bytes} bytes")
        data = storage.read_bytes(name)
    except FileNotFoundError as error:
        raise RowFaultError("image not found", f"no file at {shown(address)}") from error
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, _PATH_FAULTS) or (isinstance(cause, OSError) and cause.errno in _PATH_ERRNOS):
            raise RowFaultError("image not readable", f"{shown(address)}: {type(cause).__name__}") from error
        raise
    if len(data) > max_bytes:
        raise RowFaultError("file too large", f"{shown(address)}: {len(data)} bytes; the limit is {max_bytes}")
    return data


@lru_cache(maxsize=64)
def _folder(uri: str) -> Storage:
    return Storage(uri)
