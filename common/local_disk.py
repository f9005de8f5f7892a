"""Writes on a local disk that appear whole or not at all, and two that ask first: create, and replace a version.

A file under way has a name of its own (``.tmp-...``) in one file system with its target, so that the last step is a
rename or a link. :data:`LOCK` is the one file that stays: :func:`replace` holds it while it compares.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"
LOCK = f"{TEMPORARY}lock"
# What file systems without hard links (FAT, some network and FUSE mounts) answer to a link.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


def write(target: str, data: bytes | memoryview, root: str | None = None) -> None:
    """Write a file, replacing one of the same name.

    Args:
        target: Its path.
        data: Its content.
        root: A folder above it in which the file under way may lie: some readers (polars) open no folder in which
            there is anything but tables.
    """
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    if root is not None and os.path.isdir(root) and os.access(root, os.W_OK | os.X_OK):
        with _temporary(root) as temporary:
            _fill(temporary, data)
            try:
                os.replace(temporary, target)
            except OSError as error:
                if error.errno != errno.EXDEV:  # the target's folder is a disk of its own
                    raise
            else:
                return
    with _temporary(folder) as temporary:
        _fill(temporary, data)
        os.replace(temporary, target)


def copy(source: Path, target: str) -> None:
    """Copy a file of any size, replacing one of the same name."""
    with _beside(target) as temporary:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)


def create(target: str, data: bytes) -> bool:
    """Write a file unless there is one of that name; of several callers exactly one succeeds.

    Returns:
        Whether this call wrote it.
    """
    with _beside(target) as temporary:
        _fill(temporary, data)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with _locked(target):
                if os.path.exists(target):
                    return False
                os.replace(temporary, target)
    return True


def replace(target: str, data: bytes, version: str) -> bool:
    """Write a file if its content is still ``version``; of several callers with one version exactly one succeeds.

    Only calls of this function wait for each other: one that writes without asking may come in between.

    Returns:
        Whether this call wrote it.
    """
    with _beside(target) as temporary:
        _fill(temporary, data)
        with _locked(target):
            try:
                present = content_version(Path(target).read_bytes())
            except FileNotFoundError:
                return False
            if present != version:
                return False
            os.replace(temporary, target)
    return True


def content_version(data: bytes) -> str:
    """A name for exactly this content."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _beside(target: str) -> Iterator[str]:
    """A temporary name in the target's folder, which is made; what is left under it afterwards is removed."""
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    with _temporary(folder) as temporary:
        yield temporary


@contextmanager
def _temporary(folder: str) -> Iterator[str]:
    temporary = f"{folder}/{TEMPORARY}{uuid.uuid4().hex}"
    try:
        yield temporary
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def _locked(target: str) -> Iterator[None]:
    """Hold the folder's lock; the kernel lets go of it when the process dies, whatever the cause."""
    import fcntl  # not on every system, and needed by this alone

    # Opened for writing: network file systems lock nothing that is open for reading. Never removed: whoever waits for
    # a lock on a removed file would share it with nobody.
    with open(f"{os.path.dirname(target)}/{LOCK}", "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _fill(path: str, data: bytes | memoryview) -> None:
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
