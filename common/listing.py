"""What one listing of a folder tells: the names that are there, and a mark by which equal content is known again."""

from __future__ import annotations

from typing import NamedTuple

from common.local_disk import TEMPORARY
from common.storage import Storage
from common.storage_errors import explained

# In the order of preference; a store states one of them.
_VERSIONS = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated")


class FileMark(NamedTuple):
    """A file's content as a listing knows it: while the mark stays, the bytes have."""

    size: int
    """Bytes."""
    version: str
    """ETag, or the time of the last change; empty where the store states neither, and then nothing can be trusted."""


class Place(NamedTuple):
    """The file that holds a shard."""

    name: str
    mark: FileMark


def list_marks(storage: Storage, folder: str) -> dict[str, FileMark]:
    """Name -> mark of the files directly in a folder, from one listing; a missing folder is empty.

    Raises:
        StorageError: The storage does not answer, or denies the listing.
    """
    path = storage.path(folder)
    with explained(f"list {path}"):
        try:
            # Other processes write here: a cached listing would hide their work.
            storage.fs.invalidate_cache(path)
            entries = storage.fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    names = ((entry["name"].rsplit("/", 1)[-1], entry) for entry in entries if entry["type"] == "file")
    return {
        name: FileMark(int(entry["size"]), next((str(entry[key]) for key in _VERSIONS if entry.get(key)), ""))
        for name, entry in sorted(names, key=lambda pair: pair[0])
        if not name.startswith(TEMPORARY)
    }
