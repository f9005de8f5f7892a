"""S3 as this project uses it: s3fs with one place that retries, transfers that are checked, and writes that ask first.

The layers below would each retry on their own (botocore, s3fs around it, and s3fs again for reads): up to 125 attempts
without a word. Both are told not to; :meth:`RetryingS3._call_s3`, through which every request of s3fs passes, does it.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Iterable
from typing import Any, cast

from fsspec.asyn import sync_wrapper
from fsspec.config import conf
from s3fs import S3FileSystem

from common.retries import DamagedTransferError, error_code, retried, status_of

CONNECT_SECONDS, READ_SECONDS = 10, 30
"""How long to wait for a connection, and for the next bytes of an answer, before the server counts as hung."""
PART_BYTES = 16 << 20
"""Objects are read and uploaded in pieces of this size."""
PARTS_AT_ONCE = 4
"""Pieces of one object that are under way together: 64 MiB of memory."""
_NOTHING_THERE = {"404", "NoSuchKey", "NoSuchUpload"}


def open_s3(uri: str) -> tuple[RetryingS3, str]:
    """The file system of an ``s3://`` address and the address's path there (``bucket/key``)."""
    own = {"retries": {"total_max_attempts": 1}}
    # What a user wrote into fsspec's configuration files stays in force.
    told = conf.get("s3", {}).get("config_kwargs", {})
    return RetryingS3(config_kwargs={**own, **told}, use_listings_cache=False), RetryingS3._strip_protocol(uri)


class RetryingS3(S3FileSystem):
    """s3fs with retries and checks; construct with :func:`open_s3`."""

    retries = 1  # attempts of s3fs itself
    connect_timeout = CONNECT_SECONDS
    read_timeout = READ_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_concurrency": PARTS_AT_ONCE, "default_block_size": PART_BYTES, **kwargs})

    async def _call_s3(self, method: str, *akwarglist: dict[str, Any], **kwargs: Any) -> Any:
        """One request, made again while its error may pass by itself; its answer is complete and checked.

        Bodies are read here, within the retry, so nobody should ask for a large object in one piece.
        """
        attempts = damaged = 0

        async def attempt() -> Any:
            nonlocal attempts, damaged
            attempts += 1
            answer = await super(RetryingS3, self)._call_s3(method, *akwarglist, **kwargs)
            try:
                return await self._checked(method, kwargs, answer)
            except DamagedTransferError:
                damaged += 1
                # A part cannot be read back; the third time it is not damage but this store's way of naming parts.
                if method == "upload_part" and damaged == 3:
                    return answer
                raise

        key = kwargs.get("Key", kwargs.get("Prefix", ""))
        try:
            return await retried(attempt, f"{method} of {kwargs.get('Bucket', '')}/{key}")
        except FileNotFoundError:
            # A retry finds no upload where the first answer was lost on its way: the object is there, whole.
            if method != "complete_multipart_upload" or attempts == 1:
                raise
            answer = await self._call_s3("head_object", Bucket=kwargs["Bucket"], Key=kwargs["Key"])
            if not _is_upload_of(answer, kwargs["MultipartUpload"]["Parts"]):
                raise
            return answer

    call_s3 = sync_wrapper(_call_s3)

    async def _checked(self, method: str, asked: dict[str, Any], answer: Any) -> Any:
        """The answer, if it is what was asked for.

        What was stored is compared by MD5, which is how nearly all stores name what they store.

        Raises:
            DamagedTransferError: A body is shorter than announced, or what was stored is not what was sent.
            OSError: Objects were not deleted.
        """
        if method == "get_object":
            stream = answer["Body"]
            try:
                data = await stream.read()
            finally:
                stream.close()
            if len(data) != answer.get("ContentLength", len(data)):
                raise DamagedTransferError(f"{len(data)} of {answer['ContentLength']} bytes arrived")
            answer["Body"] = _ReadBody(data)
        elif method in ("put_object", "upload_part"):
            sent = asked.get("Body", b"")
            if _agrees(answer, await asyncio.to_thread(_md5, sent)):
                return answer
            if method == "upload_part":
                raise DamagedTransferError("the part stored is not the one sent")
            back = await self._call_s3("get_object", Bucket=asked["Bucket"], Key=asked["Key"])
            if await back["Body"].read() != sent:
                raise DamagedTransferError("the object stored is not the one sent")
        elif method == "delete_objects" and answer.get("Errors"):
            first = answer["Errors"][0]  # s3fs passes over them
            kind = PermissionError if first.get("Code") == "AccessDenied" else DamagedTransferError
            raise kind(f"{len(answer['Errors'])} objects were not deleted: {first.get('Code')} {first.get('Message')}")
        return answer

    async def _cat_file(
        self,
        path: str,
        version_id: str | None = None,
        start: int | None = None,
        end: int | None = None,
        max_bytes: int | None = None,
        **_: Any,
    ) -> bytes:
        """A whole object, in pieces that are all of one version, or the part of it that is asked for.

        Of one larger than ``max_bytes`` only the first piece is read: it tells the size.
        """
        if start is not None or end is not None:
            return cast(bytes, await super()._cat_file(path, version_id=version_id, start=start, end=end))
        first, total, etag = await self._first_piece(path)
        if max_bytes is not None and total > max_bytes:
            raise OSError(errno.EFBIG, f"it has {total} bytes where {max_bytes} are allowed")
        pieces = [first]
        async for _start, piece in self._further_pieces(path, total, etag):
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Copy an object to a local file, in pieces that are all of one version."""
        first, total, etag = await self._first_piece(rpath)
        with open(lpath, "wb") as stream:
            stream.write(first)
            async for start, piece in self._further_pieces(rpath, total, etag):
                await asyncio.to_thread(os.pwrite, stream.fileno(), piece, start)

    async def _first_piece(self, path: str) -> tuple[bytes, int, str]:
        """The first piece of an object, the object's size, and its ETag: for small objects one request tells all."""
        bucket, key, _ = self.split_path(path)
        try:
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=0-{PART_BYTES - 1}")
        except OSError as error:
            if error_code(error) != "InvalidRange":
                raise
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key)  # an empty object has no range
        data = await answer["Body"].read()
        total = int(answer["ContentRange"].rpartition("/")[2]) if "ContentRange" in answer else len(data)
        return data, total, answer.get("ETag", "")

    async def _further_pieces(self, path: str, total: int, etag: str) -> Any:
        """The pieces after the first as pairs of start and bytes, in order, read a few at a time."""
        bucket, key, _ = self.split_path(path)
        same = {"IfMatch": etag} if etag and not self.local_expiry_check else {}

        async def piece(start: int) -> tuple[int, bytes]:
            span = f"bytes={start}-{min(start + PART_BYTES, total) - 1}"
            try:
                answer = await self._call_s3("get_object", Bucket=bucket, Key=key, Range=span, **same)
            except OSError as error:
                if status_of(error) == 412:
                    raise OSError(errno.ESTALE, "it was replaced while it was being read; read it again") from error
                raise
            return start, await answer["Body"].read()

        starts = list(range(PART_BYTES, total, PART_BYTES))
        for index in range(0, len(starts), PARTS_AT_ONCE):
            for found in await asyncio.gather(*map(piece, starts[index : index + PARTS_AT_ONCE])):
                yield found

    async def _pipe_file(self, path: str, data: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        answer = await super()._pipe_file(path, data, chunksize=PART_BYTES, mode=mode, **kwargs)
        if len(data) >= 2 * PART_BYTES:
            await self._check_size(path, len(data))
        return answer

    async def _put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **kwargs: Any) -> None:
        size = os.path.getsize(lpath)
        # S3 allows 10 000 parts.
        await super()._put_file(lpath, rpath, mode=mode, **{"chunksize": max(PART_BYTES, -(-size // 9_000)), **kwargs})
        await self._check_size(rpath, size)

    async def _check_size(self, path: str, expected: int) -> None:
        found = (await self._info(path))["size"]
        if found != expected:
            raise DamagedTransferError(f"{path} has {found} bytes where {expected} were sent")

    async def _read_versioned(self, path: str) -> tuple[bytes, str]:
        bucket, key, _ = self.split_path(path)
        answer = await self._call_s3("get_object", Bucket=bucket, Key=key)
        return await answer["Body"].read(), answer["ETag"]

    read_versioned = sync_wrapper(_read_versioned)
    """The content of a (small) object and its ETag, of one moment."""

    async def _put_if(self, path: str, data: bytes, **condition: str) -> bool:
        bucket, key, _ = self.split_path(path)
        try:
            await self._call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except FileNotFoundError as error:
            if error_code(error) not in _NOTHING_THERE:
                raise  # there is no such bucket
            return False
        except OSError as error:
            if status_of(error) != 412:
                raise
            # Ours nevertheless, if the answer to an earlier attempt was lost.
            try:
                return (await self._read_versioned(path))[0] == data
            except FileNotFoundError:
                return False
        return True

    put_if = sync_wrapper(_put_if)
    """Store a small object under a condition (``IfMatch``, ``IfNoneMatch``); returns whether it is there now."""

    async def _remove_all(self, paths: Iterable[str]) -> None:
        todo = list(paths)
        for start in range(0, len(todo), 1000):
            await self._bulk_delete(todo[start : start + 1000])

    remove_all = sync_wrapper(_remove_all)
    """Delete objects by their exact names: ``rm`` would take ``?``, ``*`` and ``[`` in them for patterns."""

    async def _uploads(self, path: str) -> list[dict[str, Any]]:
        bucket, key, _ = self.split_path(path)
        found: list[dict[str, Any]] = []
        asked: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{key}/"}
        while True:
            answer = await self._call_s3("list_multipart_uploads", **asked)
            found += answer.get("Uploads", [])
            if not answer.get("IsTruncated"):
                return found
            asked |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    uploads = sync_wrapper(_uploads)
    """Multipart uploads beneath a folder that were begun and neither completed nor aborted, as S3 describes them."""


# One table of instances, so that clearing s3fs's clears this class's too.
RetryingS3._cache = S3FileSystem._cache


class _ReadBody:
    """A body that has been read, for callers that await it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self, amt: int | None = None) -> bytes:
        taken, self.data = (self.data, b"") if amt is None else (self.data[:amt], self.data[amt:])
        return taken

    def close(self) -> None:
        """Nothing is open any more."""


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _agrees(answer: dict[str, Any], md5: str) -> bool:
    """Whether a store's name for what it stored is the MD5 of what was sent, or says nothing about it."""
    etag = str(answer.get("ETag", "")).strip('"')
    return _hides_md5(answer) or len(etag) != 32 or etag == md5


def _is_upload_of(answer: dict[str, Any], parts: list[dict[str, Any]]) -> bool:
    """Whether an object is the upload of these parts, as far as its name tells: S3 makes it of the parts' names."""
    etag, names = str(answer.get("ETag", "")).strip('"'), [str(part["ETag"]).strip('"') for part in parts]
    if _hides_md5(answer) or any(len(name) != 32 for name in names):
        return etag.endswith(f"-{len(parts)}") or len(etag) != 32
    return etag == f"{_md5(b''.join(bytes.fromhex(name) for name in names))}-{len(parts)}"


def _hides_md5(answer: dict[str, Any]) -> bool:
    """Whether an object is encrypted in a way that makes its ETag something else than an MD5."""
    return "SSECustomerAlgorithm" in answer or str(answer.get("ServerSideEncryption", "")).startswith("aws:")
