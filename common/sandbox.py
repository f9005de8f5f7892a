"""Decoding in a child process that may hang, crash or run out of memory without harm to anyone else.

The parent writes one request at a time to the child's standard input and reads one reply from its standard output;
both are a fixed header and raw bytes, never a pickle. The child holds no credentials (its environment is bare), writes
no files, and ends by itself when the parent is gone: at the end of its input, or by an alarm if it hangs in a decoder.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from PIL import Image

from common.images import MAX_PIXELS, UndecodableImageError, decode_rgb

REQUEST = struct.Struct("<Q")  # length of the image that follows
REPLY = struct.Struct("<BHIIQ")  # kind, contrast, width, height, length of what follows
READY, DONE, REJECTED, NO_MEMORY = range(4)
MAX_STARTS = 3
"""So many children may end before they are ready; more is not chance."""
START_SECONDS = 120.0  # a loaded machine imports slowly; this is not the picture's fault
ALARM_GRACE_SECONDS = 5.0
JPEG_QUALITY = 95
_JPEG = b"\xff\xd8\xff"
# Hostile files are decoded there: no credentials; one thread, since thread pools reserve address space.
BARE_ENVIRONMENT = {
    **{name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ},
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "LC_ALL": "C.UTF-8",
}


@dataclass(frozen=True)
class Verdict:
    """What became of one picture: either its size or a reason.

    Attributes:
        width: Of the upright picture as it is kept, in pixels.
        height: Likewise.
        contrast: Greatest minus least 8-bit value of the channel where that differs most; 0 is a blank picture. Where
            it is enough, it may be less than that.
        reencoded: The smaller file to keep instead of the given bytes; None: keep those.
        reason: None for a good picture, else a short category: those of ``UndecodableImageError``, or
            "decoder timed out", "decoder crashed", "decoder out of memory".
        detail: What happened to this one file.
    """

    width: int = 0
    height: int = 0
    contrast: int = 0
    reencoded: bytes | None = None
    reason: str | None = None
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the bytes are a picture."""
        return self.reason is None


class _LostChildError(Exception):
    """The child did not answer; args are reason and detail."""


class SandboxedDecoder:
    """Checks pictures one at a time in a child process, which is replaced when it fails. Not for several threads.

    Args:
        max_pixels: Larger pictures are rejected by their header.
        max_seconds: Wall clock for one picture.
        max_memory_mib: Address space of the child, in MiB, of which Python and its libraries take about 200.
        max_side: Pictures with a longer side are made smaller and encoded anew; None keeps all as they are.
        enough_contrast: No more need be known of a picture's contrast than that it is this great.
    """

    def __init__(
        self,
        max_pixels: int = MAX_PIXELS,
        max_seconds: float = 20.0,
        max_memory_mib: int = 3072,
        max_side: int | None = None,
        enough_contrast: int = 256,
    ) -> None:
        self.max_pixels, self.max_seconds = max_pixels, max_seconds
        self.max_memory_mib, self.max_side, self.enough_contrast = max_memory_mib, max_side, enough_contrast
        self._child: subprocess.Popen[bytes] | None = None
        self._checked = 0

    @property
    def pid(self) -> int | None:
        """Process id of the present child, if there is one."""
        return self._child.pid if self._child else None

    def check(self, data: bytes) -> Verdict:
        """Decode one picture in the child.

        A crash or lack of memory in a child that has seen other pictures before is tried again in a fresh one, so
        that a verdict never depends on a picture's neighbours.

        Raises:
            OSError: No child process can be started.
        """
        used_before = self._child is not None and self._checked > 0
        verdict = self._check_once(data)
        if used_before and verdict.reason in ("decoder crashed", "decoder out of memory"):
            self.close()
            verdict = self._check_once(data)
        return verdict

    def close(self) -> None:
        """Kill the child; the next check starts another."""
        child, self._child, self._checked = self._child, None, 0
        if child is not None:
            child.kill()
            for stream in (child.stdin, child.stdout):
                with contextlib.suppress(BrokenPipeError):  # unsent bytes of a request nobody will read
                    stream.close()  # type: ignore[union-attr]  # both are pipes, see _start
            child.wait()

    def __enter__(self) -> SandboxedDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _check_once(self, data: bytes) -> Verdict:
        if self._child is None:
            self._start()
        self._checked += 1
        try:
            deadline = time.monotonic() + self.max_seconds
            self._send(REQUEST.pack(len(data)) + data, deadline)
            kind, contrast, width, height, body = self._receive(deadline)
        except _LostChildError as lost:
            self.close()
            return Verdict(reason=lost.args[0], detail=lost.args[1])
        if kind == DONE:
            return Verdict(width, height, contrast, body or None)
        if kind == NO_MEMORY:
            return Verdict(reason="decoder out of memory", detail=f"needs more than {self.max_memory_mib} MiB")
        reason, _, detail = body.decode("utf-8", "replace").partition("\0")
        return Verdict(reason=reason, detail=detail)

    def _start(self) -> None:
        for _ in range(MAX_STARTS):
            try:
                self._start_once()
            except _LostChildError as error:  # such as one that the kernel ended when memory was short
                self.close()
                lost = error
            else:
                return
        raise OSError(
            f"The decoding process did not start, {MAX_STARTS} times in a row ({lost.args[1]}); its output is above."
        ) from lost

    def _start_once(self) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        settings = (self.max_pixels, self.max_seconds, self.max_memory_mib, self.max_side or 0, self.enough_contrast)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "common.sandbox", *map(str, settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=root,
            env={"PYTHONPATH": root, **BARE_ENVIRONMENT},
        )
        self._checked = 0
        for pipe in (self._child.stdin, self._child.stdout):
            os.set_blocking(pipe.fileno(), False)  # type: ignore[union-attr]  # both are pipes
        self._receive(time.monotonic() + START_SECONDS)

    def _send(self, request: bytes, deadline: float) -> None:
        fd = self._child.stdin.fileno()  # type: ignore[union-attr]  # started by the caller
        view = memoryview(request)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                self._wait(fd, select.POLLOUT, deadline)
            except BrokenPipeError as error:
                raise _LostChildError("decoder crashed", self._epitaph()) from error

    def _receive(self, deadline: float) -> tuple[int, int, int, int, bytes]:
        kind, contrast, width, height, length = REPLY.unpack(self._read(REPLY.size, deadline))
        return kind, contrast, width, height, self._read(length, deadline)

    def _read(self, length: int, deadline: float) -> bytes:
        fd = self._child.stdout.fileno()  # type: ignore[union-attr]  # started by the caller
        parts = bytearray()
        while len(parts) < length:
            self._wait(fd, select.POLLIN, deadline)
            part = os.read(fd, min(length - len(parts), 1 << 20))
            if not part:
                raise _LostChildError("decoder crashed", self._epitaph())
            parts += part
        return bytes(parts)

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(fd, event)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _LostChildError("decoder timed out", f"no answer within {self.max_seconds:g} s")

    def _epitaph(self) -> str:
        code = self._child.wait()  # type: ignore[union-attr]  # its pipe is closed, so it has ended
        return f"the process ended with signal {-code}" if code < 0 else f"the process ended with status {code}"


def _serve(max_pixels: int, max_seconds: float, max_memory_mib: int, max_side: int, enough_contrast: int) -> None:
    """The child's life: answer requests until the input ends."""
    requests, replies = _private_pipes()
    limit_process(max_memory_mib)
    # Every picture is measured against max_pixels; Pillow's own limit must not be the smaller one.
    Image.MAX_IMAGE_PIXELS = max_pixels
    replies.write(REPLY.pack(READY, 0, 0, 0, 0))
    while len(header := requests.read(REQUEST.size)) == REQUEST.size:
        reserve = bytearray(1 << 20)  # freed to have room for the answer when memory runs out
        try:
            data = requests.read(REQUEST.unpack(header)[0])
            # Default action: the kernel ends the process even when it hangs in C code and its parent is gone.
            signal.setitimer(signal.ITIMER_REAL, max_seconds + ALARM_GRACE_SECONDS)
            reply = _answer(data, max_pixels, max_side, enough_contrast)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except MemoryError:
            del reserve
            replies.write(REPLY.pack(NO_MEMORY, 0, 0, 0, 0))
            return
        replies.write(reply)


def _answer(data: bytes, max_pixels: int, max_side: int, enough_contrast: int) -> bytes:
    try:
        image = decode_rgb(data, max_pixels)
    except UndecodableImageError as error:
        body = f"{error.reason}\0{error.detail}".encode("utf-8", "replace")
        return REPLY.pack(REJECTED, 0, 0, 0, len(body)) + body
    contrast = _contrast(image, enough_contrast)
    body = b""
    if max_side and max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        body = _encode(image, lossy=data.startswith(_JPEG))
    return REPLY.pack(DONE, contrast, image.width, image.height, len(body)) + body


def _contrast(image: Image.Image, enough: int) -> int:
    """Of the row in the middle, if that is enough: it nearly always is, and the whole takes a fifth of the decoding."""
    middle = image.crop((0, image.height // 2, image.width, image.height // 2 + 1))
    for part in (middle, image):
        contrast = max(high - low for low, high in part.getextrema())  # type: ignore[misc]  # RGB: a pair per channel
        if contrast >= enough:
            break
    return int(contrast)


def _encode(image: Image.Image, lossy: bool) -> bytes:
    stream = io.BytesIO()
    if lossy:
        image.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()


def _private_pipes() -> tuple[io.BufferedReader, io.FileIO]:
    """The pipes to the parent, out of reach of C libraries that print to file descriptors 1 and 2."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    return requests, replies


def limit_process(max_memory_mib: int | None) -> None:
    """No core dumps, no files, and (where a number is given) a bounded address space for the rest of this process."""
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)]
    # Other kernels do not enforce a bounded address space, and macOS refuses it.
    if max_memory_mib is not None and sys.platform.startswith("linux"):
        limits.append((resource.RLIMIT_AS, max_memory_mib << 20))
    for kind, value in limits:
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:]))
