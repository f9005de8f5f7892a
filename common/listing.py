"""What one listing of a folder tells: the names that are there, and a mark by which equal content is known again."""

from __future__ import annotations

from typing import NamedTuple

from common.storage import Storage

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
    return {
        name: FileMark(int(entry["size"]), next((str(entry[key]) for key in _VERSIONS if entry.get(key)), ""))
        for name, entry in storage.entries(folder)
        if entry["type"] == "file"
    }
