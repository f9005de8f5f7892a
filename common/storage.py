"""One seam for bytes on a local disk or on object storage (fsspec): whole-or-nothing writes, listing, reading.

Credentials and endpoints come from where the storage libraries look for them (``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``, profiles, instance roles, fsspec's own configuration files);
this project never reads, keeps, logs or forwards them.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from common.errors import StorageError

ROW_GROUP_ROWS = 20_000


def without_secrets(text: str) -> str:
    """A text in which every address has lost its user, password and query, as it may be shown and written down."""
    text = re.sub(r"(\w://)[^/@\s]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)


def absolute_address(uri: str) -> str:
    """An address that means the same in another working directory: a local path in full, others as they are."""
    return uri if "://" in uri or "::" in uri else os.path.abspath(uri)


@dataclass(frozen=True)
class Storage:
    """A folder at a URI; all paths given to its methods are relative to it.

    A frozen value with no open connection, so it travels to workers by pickling.
    """

    uri: str

    @cached_property
    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            fs, root = fsspec.core.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"The address {self.uri!r} cannot be opened: {error}. "
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

    def path(self, relative: str = "") -> str:
        """The filesystem's own path (no scheme) of a relative path."""
        return f"{self._opened[1]}/{relative}".rstrip("/") if relative else self._opened[1]

    def child(self, relative: str) -> Storage:
        """The storage rooted at a folder below this one."""
        return Storage(f"{self.uri.rstrip('/')}/{relative}")

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write a file that appears whole or not at all, replacing one of the same name.

        Locally: a temporary name in the same folder, then rename. Elsewhere: one upload, which object stores
        make visible only when it is complete.
        """
        target = self.path(relative)
        with _explained(f"write {target}"):
            if not self.is_local:
                self.fs.pipe_file(target, data)
                return
            os.makedirs(os.path.dirname(target), exist_ok=True)
            temporary = f"{os.path.dirname(target)}/.tmp-{uuid.uuid4().hex}"
            try:
                with open(temporary, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, target)
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)

    def read_bytes(self, relative: str) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: It cannot be read.
        """
        with _explained(f"read {self.path(relative)}"):
            return cast(bytes, self.fs.cat_file(self.path(relative)))

    def download(self, relative: str, target: Path) -> None:
        """Copy a file to this machine, whatever its size; the target appears whole or not at all."""
        with _explained(f"read {self.path(relative)}"):
            temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
            self.fs.get_file(self.path(relative), str(temporary))
            os.replace(temporary, target)

    def upload(self, source: Path, relative: str) -> None:
        """Copy a file of this machine here, whatever its size; it appears whole or not at all."""
        target = self.path(relative)
        with _explained(f"write {target}"):
            if not self.is_local:
                self.fs.put_file(str(source), target)
                return
            os.makedirs(os.path.dirname(target), exist_ok=True)
            temporary = f"{os.path.dirname(target)}/.tmp-{uuid.uuid4().hex}"
            try:
                shutil.copyfile(source, temporary)
                os.replace(temporary, target)
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)

    def exists(self, relative: str = "") -> bool:
        """Whether a file or folder is there."""
        with _explained(f"look at {self.path(relative)}"):
            return bool(self.fs.exists(self.path(relative)))

    def is_file(self, relative: str = "") -> bool:
        """Whether a file (not a folder) is there."""
        with _explained(f"look at {self.path(relative)}"):
            return bool(self.fs.isfile(self.path(relative)))

    def size(self, relative: str = "") -> int | None:
        """Bytes of a file; None where the server does not say."""
        with _explained(f"look at {self.path(relative)}"):
            found = self.fs.info(self.path(relative)).get("size")
        return None if found is None else int(found)

    def version(self, relative: str = "") -> str:
        """What the storage says of a file's present content (ETag, time of change); empty where it says nothing."""
        with _explained(f"look at {self.path(relative)}"):
            facts = self.fs.info(self.path(relative))
        marks = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "Content-MD5", "Digest")
        return str([facts.get(name) for name in marks])

    def pieces(self, relative: str, start: int, size: int | None, chunk: int) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on, in pieces; in one piece where the server does not say its size."""
        with _explained(f"read {self.path(relative)}"):
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
        return [name for name, kind in self._entries(relative) if kind == "file" and name.endswith(suffix)]

    def list_folders(self, relative: str = "") -> list[str]:
        """Names of the folders directly in a folder, sorted; a missing folder is empty."""
        return [name for name, kind in self._entries(relative) if kind == "directory"]

    def _entries(self, relative: str) -> Iterator[tuple[str, str]]:
        path = self.path(relative)
        with _explained(f"list {path}"):
            try:
                # Other processes write here: a cached listing would hide their work.
                self.fs.invalidate_cache(path)
                found = self.fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                found = []
        names = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["type"] for entry in found}
        folder = path.rsplit("/", 1)[-1]
        for name in sorted(names):
            # Some object stores list the folder itself as an empty entry.
            if not name.startswith(".tmp-") and not (name == folder and len(found) == 1 and not self.is_local):
                yield name, names[name]

    def remove(self, relative: str) -> None:
        """Delete a file or a folder with all it holds; nothing happens if it is not there."""
        with _explained(f"delete {self.path(relative)}"):
            if self.fs.exists(self.path(relative)):
                self.fs.rm(self.path(relative), recursive=True)

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
        """Write a Parquet file, whole or not at all: zstd, vectors split by byte, no dictionary for them.

        Args:
            relative: Where.
            table: What; float columns and vectors get ``BYTE_STREAM_SPLIT``.
            metadata: Strings for the file's own key-value metadata.

        Returns:
            The size in bytes.
        """
        if metadata:
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
        floats = [path for field in table.schema for path in _float_leaves(field.name, field.type)]
        low_cardinality = {"modality", "label", "source", "license", "split", "stage", "reason", "model"}
        buffer = io.BytesIO()
        pq.write_table(
            table,
            buffer,
            compression="zstd",
            use_dictionary=[name for name in table.column_names if name in low_cardinality],
            use_byte_stream_split=floats,
            row_group_size=ROW_GROUP_ROWS,
            write_page_index=True,
            store_schema=True,
        )
        self.write_bytes(relative, buffer.getvalue())
        return buffer.tell()

    def read_table(self, relative: str, columns: list[str] | None = None) -> pa.Table:
        """Read a Parquet file into memory.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: It is torn or not Parquet.
        """
        with _explained(f"read {self.path(relative)}"), self.fs.open(self.path(relative), "rb") as stream:
            return pq.read_table(stream, columns=columns)

    def read_metadata(self, relative: str) -> tuple[int, dict[str, str]]:
        """Number of rows and key-value metadata of a Parquet file, without reading its columns."""
        with _explained(f"read {self.path(relative)}"), self.fs.open(self.path(relative), "rb") as stream:
            footer = pq.read_metadata(stream)
        pairs = footer.metadata or {}
        return footer.num_rows, {k.decode(): v.decode("utf-8", "replace") for k, v in pairs.items()}


def _float_leaves(path: str, kind: pa.DataType) -> Iterator[str]:
    if pa.types.is_floating(kind):
        yield path
    elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _float_leaves(f"{path}.list.element", kind.value_type)


class _explained:  # noqa: N801 - reads as a phrase at the call: with _explained("write x")
    """Turn the storage libraries' many exceptions into a StorageError that says what was being done."""

    def __init__(self, doing: str) -> None:
        self.doing = without_secrets(doing)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, FileNotFoundError):
            return
        if isinstance(error, PermissionError):
            raise StorageError(
                f"Could not {self.doing}: permission denied. Check the folder's rights, or for object storage the "
                "credentials in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, AWS_ENDPOINT_URL)."
            ) from error
        name = type(error).__name__
        if isinstance(error, OSError | pa.ArrowInvalid) or name in _REMOTE_ERRORS:
            hint = " For S3, check the credentials and AWS_ENDPOINT_URL." if name in _REMOTE_ERRORS else ""
            # The libraries' own messages quote whole addresses.
            raise StorageError(f"Could not {self.doing}: {name}: {without_secrets(str(error))}.{hint}") from error


# Named, not imported: botocore is s3fs's affair and slow to import.
_REMOTE_ERRORS = {
    "ClientResponseError",
    "ClientPayloadError",
    "ClientConnectorError",
    "ClientConnectionError",
    "ServerDisconnectedError",
    "FSTimeoutError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ClientError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ProfileNotFound",
    "ParamValidationError",
    "InvalidRegionError",
}
