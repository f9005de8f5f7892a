"""A shard's pictures decoded in a child process: what hangs or exhausts a decoder is killed with it and recorded."""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.models.spec import Geometry
from common.sandbox import BARE_ENVIRONMENT, START_SECONDS
from extractor.config import DecodeLimits
from extractor.decode_child import HEADER, NO_MEMORY, NOT_BEGUN

MAX_FRUITLESS = 3
"""So many children may end before they come to a picture; more is not chance, and no picture's fault."""
_ALIGNMENT = 64
_PATIENCE_STEP = 0.5
"""Seconds between looks at the row at work while the child is silent."""


@dataclass
class DecodedPictures:
    """A shard's pixels.

    Attributes:
        pixels: Geometry key -> uint8 [N, size, size, channels]; a failed row is black.
        view_pixels: Geometry key -> uint8 [N, views, size, size, channels].
        errors: Row -> (reason, detail); reasons are those of ``UndecodableImageError``, or "decoder timed out",
            "decoder crashed", "decoder out of memory".
        kills: Child processes that were lost.
    """

    pixels: dict[str, np.ndarray]
    view_pixels: dict[str, np.ndarray]
    errors: dict[int, tuple[str, str]] = field(default_factory=dict)
    kills: int = 0


class _LostChildError(Exception):
    """The child ended or went silent; args are reason and detail."""


class PictureDecoder:
    """Decodes whole shards in one child process, which is replaced when it fails. Not for several threads.

    The encoded pictures and the pixels lie in shared memory, so that no pixel is copied between the processes.

    Args:
        limits: What one picture may cost.
    """

    def __init__(self, limits: DecodeLimits) -> None:
        self.limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._unread = b""
        self.kills = 0
        """Child processes that were lost so far."""

    @property
    def pid(self) -> int | None:
        """Process id of the present child, if there is one."""
        return self._child.pid if self._child else None

    def decode(
        self,
        encoded: pa.ChunkedArray | pa.Array,
        geometries: Sequence[Geometry],
        boxes: np.ndarray | None = None,
        least_side: int | None = None,
        fast_resize: bool = False,
    ) -> DecodedPictures:
        """Decode every picture once and fit it to every geometry.

        A crash or lack of memory in a child that has seen other pictures before is tried again in a fresh one, so
        that a verdict never depends on a picture's neighbours.

        Args:
            encoded: Binary column of N encoded files.
            geometries: Distinct ones.
            boxes: float32 [N, views, 4] of :func:`common.views.view_boxes`; None: no views.
            least_side: See :func:`common.images.decode_rgb`.
            fast_resize: By :class:`extractor.tensor_resize.TensorResize`.

        Raises:
            OSError: No child process can be started, or it cannot even read what is asked of it.
        """
        rows, views = len(encoded), 0 if boxes is None else boxes.shape[1]
        request, size = _lay_out(rows, views, geometries)
        request |= {"least_side": least_side, "fast_resize": fast_resize}
        target_file = _shared_file(size)
        target = mmap.mmap(target_file.fileno(), size)
        done = DecodedPictures(*_arrays(target, request, geometries))
        source_file = _shared_source(encoded, boxes)
        kills = self.kills
        with target_file, source_file:
            try:
                self._decode_from_each_start(request, source_file, target_file, target, done)
            except BaseException:
                # Also when a task is cancelled: the child would go on, and its answers be taken for the next request's.
                self.close()
                raise
        done.kills = self.kills - kills
        for row in done.errors:  # a row that died half-way has pixels in some geometries
            for arrays in (done.pixels, done.view_pixels):
                for array in arrays.values():
                    array[row] = 0
        return done

    def _decode_from_each_start(
        self, request: dict[str, Any], source: Any, target: Any, target_map: mmap.mmap, done: DecodedPictures
    ) -> None:
        """Ask for all rows, and again for those after the one at which a child was lost."""
        start = fruitless = 0
        while start < request["rows"]:
            is_fresh = self._start_if_needed()
            try:
                for message in self._ask({**request, "start": start}, source, target, target_map):
                    done.errors[message["row"]] = (message["reason"], message["detail"])
            except _LostChildError as lost:
                died_at = int(np.frombuffer(target_map, np.int64, 1)[0])
                self.kills += 1
                self.close()
                if died_at == NOT_BEGUN:
                    fruitless += 1
                    if fruitless == MAX_FRUITLESS:
                        raise OSError(f"The decoding process cannot read a shard: {': '.join(lost.args)}.") from lost
                    continue
                if lost.args[0] == "decoder timed out" or (is_fresh and died_at == start):
                    done.errors[died_at] = (lost.args[0], lost.args[1])
                    died_at += 1
                start = died_at
            else:
                return

    def close(self) -> None:
        """Kill the child; the next shard starts another."""
        child, self._child, self._unread = self._child, None, b""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if child is not None:
            child.kill()
            child.wait()

    def __del__(self) -> None:
        self.close()

    def _start_if_needed(self) -> bool:
        """Whether a new child was started.

        Raises:
            OSError: Several ended before they were ready: something keeps any from starting.
        """
        if self._child is not None:
            return False
        for _ in range(MAX_FRUITLESS):
            try:
                self._start()
            except _LostChildError as error:  # such as one that the kernel ended when memory was short
                self.close()
                self.kills += 1
                lost = error
            else:
                return True
        raise OSError(
            f"The decoding process did not start, {MAX_FRUITLESS} times in a row ({lost.args[1]}); its output is above."
        ) from lost

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parent.parent)
        limits = (self.limits.max_pixels, self.limits.max_seconds, self.limits.max_memory_mib)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "extractor.decode_child", str(theirs.fileno()), *map(str, limits)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd=root,
                env={"PYTHONPATH": root, **BARE_ENVIRONMENT},
            )
        self._connection = ours
        next(self._messages(time.monotonic() + START_SECONDS, None))

    def _ask(
        self, request: dict[str, Any], source: Any, target: Any, target_map: mmap.mmap
    ) -> Iterator[dict[str, Any]]:
        """Send a request; yield what the child says of failed rows until it is done."""
        assert self._connection is not None, "started by the caller"
        np.frombuffer(target_map, np.int64, 1)[0] = NOT_BEGUN
        asked = json.dumps(request).encode() + b"\n"
        try:
            sent = socket.send_fds(self._connection, [asked], [source.fileno(), target.fileno()])
            self._connection.sendall(asked[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _LostChildError("decoder crashed", self._epitaph()) from error
        for message in self._messages(None, target_map):
            if "done" in message:
                return
            yield message

    def _messages(self, deadline: float | None, target: mmap.mmap | None) -> Iterator[dict[str, Any]]:
        """What the child says; without a deadline it may take ``max_seconds`` for each picture."""
        row, since = NOT_BEGUN, time.monotonic()
        while True:
            line, mark, rest = self._unread.partition(b"\n")
            if mark:
                self._unread = rest
                yield json.loads(line)
                continue
            if self._receive():
                continue
            now = time.monotonic()
            if target is not None and (at_work := int(np.frombuffer(target, np.int64, 1)[0])) != row:
                row, since = at_work, now
            patience = START_SECONDS if row == NOT_BEGUN else self.limits.max_seconds
            if now > (deadline or since + patience):
                raise _LostChildError("decoder timed out", f"no picture within {patience:g} s")

    def _receive(self) -> bool:
        """Read what is there; false after a while of silence."""
        assert self._connection is not None, "started by the caller"
        poller = select.poll()
        poller.register(self._connection, select.POLLIN)
        if not poller.poll(_PATIENCE_STEP * 1000):
            return False
        try:
            piece = self._connection.recv(1 << 16)
        except ConnectionResetError:
            piece = b""
        if not piece:
            reason, detail = "decoder crashed", self._epitaph()
            if self._child is not None and self._child.returncode == NO_MEMORY:
                reason, detail = "decoder out of memory", f"needs more than {self.limits.max_memory_mib} MiB"
            raise _LostChildError(reason, detail)
        self._unread += piece
        return True

    def _epitaph(self) -> str:
        assert self._child is not None, "started by the caller"
        code = self._child.wait()  # its end of the socket is closed, so it has ended
        return f"the process ended with signal {-code}" if code < 0 else f"the process ended with status {code}"


def _lay_out(rows: int, views: int, geometries: Sequence[Geometry]) -> tuple[dict[str, Any], int]:
    """The request, and the bytes its pixels take: a header, then for each geometry all pictures and all views."""
    offset, squares = HEADER, []
    for geometry in geometries:
        shape = (geometry.size, geometry.size, geometry.channels)
        squares.append({"geometry": geometry.model_dump(), "shape": shape, "offset": offset})
        offset += rows * (1 + views) * int(np.prod(shape))
        offset += -offset % _ALIGNMENT
    return {"rows": rows, "views": views, "squares": squares}, offset


def _arrays(
    target: mmap.mmap, request: dict[str, Any], geometries: Sequence[Geometry]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rows, views = request["rows"], request["views"]
    pixels, view_pixels = {}, {}
    for geometry, item in zip(geometries, request["squares"], strict=True):
        shape = item["shape"]
        count = rows * int(np.prod(shape))
        whole = np.frombuffer(target, np.uint8, count * (1 + views), item["offset"])
        pixels[geometry.key] = whole[:count].reshape(rows, *shape)
        view_pixels[geometry.key] = whole[count:].reshape(rows, views, *shape)
    return pixels, view_pixels


def _shared_file(size: int) -> Any:
    """An unnamed file in memory (elsewhere than on Linux: a temporary one) of so many zero bytes."""
    in_memory = hasattr(os, "memfd_create")
    file: Any = os.fdopen(os.memfd_create("mmkd"), "r+b") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
    file.truncate(size)
    return file


def _shared_source(encoded: pa.ChunkedArray | pa.Array, boxes: np.ndarray | None) -> Any:
    """Offsets int64 [N + 1], boxes float32, then the files' bytes one after another."""
    # Chunk by chunk: one array of 32-bit offsets ends at 2 GiB. A null is a file without bytes.
    pieces = [value.as_buffer() if value.is_valid else pa.py_buffer(b"") for value in encoded]
    offsets = np.cumsum([0, *(piece.size for piece in pieces)], dtype=np.int64)
    file = _shared_file(0)
    file.write(offsets.tobytes())
    if boxes is not None:
        file.write(np.ascontiguousarray(boxes, np.float32).tobytes())
    for piece in pieces:
        file.write(piece)
    file.flush()
    return file
