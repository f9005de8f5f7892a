"""One seam for bytes on a local disk or on object storage (fsspec): whole-or-nothing writes, listing, reading.

Credentials and endpoints come from where the storage libraries look for them (``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``, profiles, instance roles, fsspec's own configuration files);
this project never reads, keeps, logs or forwards them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from common import local_disk
from common.errors import StorageError
from common.parquet_reading import read_columns, table_of
from common.storage_errors import explained, without_secrets

__all__ = [
    "ROW_GROUP_ROWS",
    "Storage",
    "Upload",
    "absolute_address",
    "address_from",
    "address_within",
    "without_secrets",
]

SAMPLED_PICTURES = 16
"""So many tell whether a file's pictures are worth compressing."""
WORTHWHILE = 0.95
"""They are if no more than this share is left of them."""
ROW_GROUP_ROWS = 20_000


def absolute_address(uri: str) -> str:
    """An address that means the same in another working directory: a local path in full, others as they are."""
    return uri if "://" in uri or "::" in uri else os.path.abspath(uri)


def address_within(address: str, home: str) -> str:
    """An address as it is written down inside ``home``, which may be moved: relative to it if it lies inside.

    Others stay as they are. :func:`address_from` is the inverse.
    """
    full, root = absolute_address(address), absolute_address(home).rstrip("/")
    return full.removeprefix(f"{root}/") if full.startswith(f"{root}/") else address


def address_from(written: str, home: str) -> str:
    """The address behind what :func:`address_within` made of an absolute one, with ``home`` where it lies now."""
    if "://" in written or "::" in written or os.path.isabs(written):
        return written
    return absolute_address(f"{home.rstrip('/')}/{written}")


class Upload(NamedTuple):
    """An upload in parts that has not ended: its writer is at it, or was killed."""

    path: str
    """Of the file it was to become, relative to the storage."""
    upload_id: str
    begun: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Storage:
    """A folder at a URI; all paths given to its methods are relative to it.

    A frozen value with no open connection, so it travels to workers by pickling.
    """

    uri: str

    @cached_property
    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        if self._is_s3:
            from common.s3 import open_s3  # slow to import, and of no use to a lake on a disk

            fs, root = open_s3(self.uri)
            return fs, root.rstrip("/")
        try:
            fs, root = fsspec.core.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"The address {without_secrets(self.uri)!r} cannot be opened: {without_secrets(str(error))}. "
                "Give a local folder, s3://bucket/path, or another address fsspec knows."
            ) from error
        return fs, root.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}  # a live filesystem does not survive a fork or a network hop

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The fsspec filesystem behind the URI."""
        return self._opened[0]

    @property
    def is_local(self) -> bool:
        """Whether the URI is a folder on this machine's disks."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def _is_s3(self) -> bool:
        return self.uri.startswith(("s3://", "s3a://")) and "::" not in self.uri

    def path(self, relative: str = "") -> str:
        """The filesystem's own path (no scheme) of a relative path."""
        return f"{self._opened[1]}/{relative}".rstrip("/") if relative else self._opened[1]

    def child(self, relative: str) -> Storage:
        """The storage rooted at a folder below this one."""
        return Storage(f"{self.uri.rstrip('/')}/{relative}")

    def write_bytes(self, relative: str, data: bytes | memoryview) -> None:
        """Write a file that appears whole or not at all, replacing one of the same name.

        Locally: a temporary name in this storage's own folder, then rename. Elsewhere: one upload, which object
        stores make visible only when it is complete.
        """
        target = self.path(relative)
        with explained(f"write {target}"):
            if self.is_local:
                local_disk.write(target, data, self.path())
            else:
                self.fs.pipe_file(target, bytes(data))

    def create(self, relative: str, data: bytes) -> bool:
        """Write a file, whole or not at all, unless there is one of that name: of several callers one succeeds.

        On S3 an answer may be lost and the write be made again, which then finds the file there: if its content is
        exactly ``data``, it is taken for this call's own. So put something unique into it where it matters whose it is.
        On file systems that offer no such write (neither a local disk nor S3), this looks first and then writes.

        Returns:
            Whether this call wrote it.
        """
        target = self.path(relative)
        with explained(f"write {target}"):
            if self.is_local:
                return local_disk.create(target, data)
            if self._is_s3:
                return bool(self.fs.put_if(target, data, IfNoneMatch="*"))
            self.fs.invalidate_cache(target)
            if self.fs.exists(target):
                return False
            self.fs.pipe_file(target, data)
        return True

    def read_versioned(self, relative: str) -> tuple[bytes, str]:
        """A small file's content, and the version of it that :meth:`replace` takes.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: It cannot be read.
        """
        with explained(f"read {self.path(relative)}"):
            if self._is_s3:
                return cast(tuple[bytes, str], self.fs.read_versioned(self.path(relative)))
            data = cast(bytes, self.fs.cat_file(self.path(relative)))
        return data, local_disk.content_version(data)

    def replace(self, relative: str, data: bytes, version: str) -> bool:
        """Write a file, whole or not at all, if its content is still ``version``: of several callers one succeeds.

        What :meth:`create` says of lost answers and of other file systems holds here too. Locally, only calls of this
        method wait for each other; :meth:`write_bytes` does not ask.

        Returns:
            Whether this call wrote it; not if the file is gone.
        """
        target = self.path(relative)
        with explained(f"write {target}"):
            if self.is_local:
                return local_disk.replace(target, data, version)
            if self._is_s3:
                return bool(self.fs.put_if(target, data, IfMatch=version))
            try:
                present = local_disk.content_version(self.fs.cat_file(target))
            except FileNotFoundError:
                return False
            if present != version:
                return False
            self.fs.pipe_file(target, data)
        return True

    def read_bytes(self, relative: str, max_bytes: int | None = None) -> bytes:
        """Read a whole file; of one larger than ``max_bytes`` no more than that is ever in memory.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: It cannot be read, or is larger: then the cause is an OSError with ``errno.EFBIG``.
        """
        path = self.path(relative)
        with explained(f"read {path}"):
            if max_bytes is None:
                return cast(bytes, self.fs.cat_file(path))
            if self._is_s3:
                return cast(bytes, self.fs.cat_file(path, max_bytes=max_bytes))
            size = self.fs.info(path).get("size")
            # Where the storage does not say how much there is, one byte too many tells as well.
            data = b"" if size else cast(bytes, self.fs.cat_file(path, start=0, end=max_bytes + 1))
            size = size or len(data)
            if size > max_bytes:
                raise OSError(errno.EFBIG, f"it has {size} bytes or more where {max_bytes} are allowed")
            return data or cast(bytes, self.fs.cat_file(path))

    def download(self, relative: str, target: Path) -> None:
        """Copy a file to this machine, whatever its size; the target appears whole or not at all."""
        with explained(f"read {self.path(relative)}"):
            temporary = target.with_name(f"{local_disk.TEMPORARY}{uuid.uuid4().hex}")
            self.fs.get_file(self.path(relative), str(temporary))
            os.replace(temporary, target)

    def upload(self, source: Path, relative: str) -> None:
        """Copy a file of this machine here, whatever its size; it appears whole or not at all."""
        target = self.path(relative)
        with explained(f"write {target}"):
            if self.is_local:
                local_disk.copy(source, target)
            else:
                self.fs.put_file(str(source), target)

    def exists(self, relative: str = "") -> bool:
        """Whether a file or folder is there."""
        with explained(f"look at {self.path(relative)}"):
            return bool(self.fs.exists(self.path(relative)))

    def is_file(self, relative: str = "") -> bool:
        """Whether a file (not a folder) is there."""
        with explained(f"look at {self.path(relative)}"):
            return bool(self.fs.isfile(self.path(relative)))

    def size(self, relative: str = "") -> int | None:
        """Bytes of a file; None where the server does not say."""
        with explained(f"look at {self.path(relative)}"):
            found = self.fs.info(self.path(relative)).get("size")
        return None if found is None else int(found)

    def version(self, relative: str = "") -> str:
        """What the storage says of a file's present content (ETag, time of change); empty where it says nothing."""
        with explained(f"look at {self.path(relative)}"):
            facts = self.fs.info(self.path(relative))
        marks = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "Content-MD5", "Digest")
        return str([facts.get(name) for name in marks])

    def pieces(self, relative: str, start: int, size: int | None, chunk: int) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on, in pieces; in one piece where the server does not say its size."""
        with explained(f"read {self.path(relative)}"):
            if size is None:
                yield cast(bytes, self.fs.cat_file(self.path(relative)))
                return
            while start < size:
                piece = cast(bytes, self.fs.cat_file(self.path(relative), start=start, end=min(start + chunk, size)))
                if not piece:
                    return
                start += len(piece)
                yield piece

    def list_files(self, relative: str = "", suffix: str = "") -> list[str]:
        """Names (not paths) of the files directly in a folder, sorted; a missing folder is empty.

        Temporary files of writes in progress are not listed.
        """
        return [name for name, entry in self.entries(relative) if entry["type"] == "file" and name.endswith(suffix)]

    def list_folders(self, relative: str = "") -> list[str]:
        """Names of the folders directly in a folder, sorted; a missing folder is empty."""
        return [name for name, entry in self.entries(relative) if entry["type"] == "directory"]

    def entries(self, relative: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name of each file and folder directly in a folder, sorted, with what the file system's ``ls`` says of it.

        A missing folder is empty; temporary files of writes in progress are left out.
        """
        path = self.path(relative)
        with explained(f"list {path}"):
            try:
                # Other processes write here: a cached listing would hide their work.
                self.fs.invalidate_cache(path)
                found = self.fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                found = []
        for entry in sorted(found, key=lambda entry: str(entry["name"])):
            whole = str(entry["name"]).rstrip("/")
            name = whole.rsplit("/", 1)[-1]
            # Some object stores list the folder itself as an empty entry.
            if not name.startswith(local_disk.TEMPORARY) and (self.is_local or whole != path):
                yield name, entry

    def remove(self, relative: str) -> None:
        """Delete a file or a folder with all it holds; nothing happens if it is not there."""
        with explained(f"delete {self.path(relative)}"):
            target = self.path(relative)
            if self._is_s3:
                self.fs.remove_all(self.fs.find(target))
            elif self.fs.exists(target):
                self.fs.rm(target, recursive=True)

    def uploads(self) -> list[Upload]:
        """Uploads in parts that were begun here and not ended; none where the storage knows no such thing.

        Raises:
            StorageError: They cannot be listed.
        """
        if not self._is_s3:
            return []
        root = self.path()
        with explained(f"list the unfinished uploads of {root}"):
            found = self.fs.uploads(root)
        start = len(root.partition("/")[2]) + 1
        return [Upload(one["Key"][start:], one["UploadId"], one["Initiated"].timestamp()) for one in found]

    def abort(self, upload: Upload) -> None:
        """Delete the parts of an upload that was begun; nothing happens if it has ended meanwhile."""
        bucket, _, key = self.path(upload.path).partition("/")
        with explained(f"abort an upload of {upload.path}"), contextlib.suppress(FileNotFoundError):
            self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.upload_id)

    def write_json(self, relative: str, value: Any) -> None:
        """Write a value as readable JSON, whole or not at all."""
        self.write_bytes(relative, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, relative: str) -> Any:
        """Read a JSON file.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: The file is not JSON.
        """
        try:
            return json.loads(self.read_bytes(relative))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StorageError(f"{self.path(relative)} is not valid JSON: {error}") from error

    def write_table(self, relative: str, table: pa.Table, metadata: dict[str, str] | None = None) -> int:
        """Write a Parquet file, whole or not at all: zstd (but see :func:`_compression`), vectors split by byte.

        Args:
            relative: Where.
            table: What; float columns and vectors get ``BYTE_STREAM_SPLIT``.
            metadata: Strings for the file's own key-value metadata.

        Returns:
            The size in bytes.
        """
        if metadata:
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
        leaves = {path: kind for field in table.schema for path, kind in _leaves(field.name, field.type)}
        low_cardinality = {"modality", "dataset", "source", "license", "split", "stage", "reason", "model"}
        stream = pa.BufferOutputStream()
        pq.write_table(
            table,
            stream,
            compression={path: _compression(table, path) for path in leaves},
            use_dictionary=[path for path in leaves if path in low_cardinality or path.startswith("labels.")],
            use_byte_stream_split=[path for path, kind in leaves.items() if pa.types.is_floating(kind)],
            row_group_size=ROW_GROUP_ROWS,
            write_page_index=True,
            store_schema=True,
        )
        written = stream.getvalue()
        self.write_bytes(relative, memoryview(written))
        return written.size

    def read_table(self, relative: str, columns: list[str] | None = None) -> pa.Table:
        """Read a Parquet file into memory.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: It is torn or not Parquet.
        """
        with explained(f"read {self.path(relative)}"):
            size = self.size(relative)
            return table_of(self.read_bytes(relative)) if size is None else read_columns(self, relative, size, columns)

    def read_metadata(self, relative: str) -> tuple[int, dict[str, str]]:
        """Number of rows and key-value metadata of a Parquet file, without reading its columns."""
        with explained(f"read {self.path(relative)}"), self.fs.open(self.path(relative), "rb") as stream:
            footer = pq.read_metadata(stream)
        pairs = footer.metadata or {}
        return footer.num_rows, {k.decode(): v.decode("utf-8", "replace") for k, v in pairs.items()}


def _leaves(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """Parquet's names of the columns that a field becomes, with what they hold."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{path}.{field.name}", field.type)
    elif pa.types.is_map(kind):
        yield from _leaves(f"{path}.key_value.key", kind.key_type)
        yield from _leaves(f"{path}.key_value.value", kind.item_type)
    else:
        yield path, kind


def _compression(table: pa.Table, path: str) -> str:
    """Zstd, but for pictures of which it makes as much: JPEGs would cost time at each writing and reading."""
    if path != "image":
        return "zstd"
    some = b"".join(value.as_py() or b"" for value in table[path][:SAMPLED_PICTURES])
    return "none" if pa.Codec("zstd").compress(some).size > WORTHWHILE * len(some) else "zstd"
