"""The process that decodes a shard's pictures: it may hang, crash or exhaust its memory without harm to its parent.

It reads encoded pictures from shared memory, writes pixels into shared memory, and says over a socket which rows
failed. Like the child of :mod:`common.sandbox` it has a bare environment and a bounded address space.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from common.images import ExactResize, Resize, UndecodableImageError, decode_rgb, each_once, fit
from common.sandbox import ALARM_GRACE_SECONDS, limit_process
from common.views import cut_view

HEADER = 64
"""Bytes before the pixels; the first eight hold the row at work, as int64."""
NOT_BEGUN = -1
"""The row at work while the request is still being read: what goes wrong then is no picture's fault."""
NO_MEMORY = 70
"""Exit status after a picture that needed more memory than this process may have."""
_PIECE_BYTES = 1 << 16


def serve(connection: socket.socket, max_pixels: int, max_seconds: float, max_memory_mib: int) -> None:
    """Answer requests until the parent closes its end."""
    # Every picture is measured against max_pixels; Pillow's own limit must not be the smaller one.
    Image.MAX_IMAGE_PIXELS = max_pixels
    say(connection, {"ready": True})
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _PIECE_BYTES, 2)
        while not message.endswith(b"\n"):  # a long one comes in pieces
            piece = connection.recv(_PIECE_BYTES)
            if not piece:
                return
            message += piece
        with (
            open(descriptors[0], "rb") as encoded,
            open(descriptors[1], "r+b") as pixels,
            mmap.mmap(encoded.fileno(), 0, access=mmap.ACCESS_READ) as source,
            mmap.mmap(pixels.fileno(), 0) as target,
        ):
            request = json.loads(message)
            library_bytes = _load_fast_resize() if request["fast_resize"] else 0
            _limit_beyond(max_memory_mib, len(source) + len(target) + library_bytes)
            decode_rows(connection, request, source, target, max_pixels, max_seconds)
        say(connection, {"done": True})


def say(connection: socket.socket, message: dict[str, Any]) -> None:
    """One line of JSON to the parent."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def decode_rows(
    connection: socket.socket,
    request: dict[str, Any],
    source: mmap.mmap,
    target: mmap.mmap,
    max_pixels: int,
    max_seconds: float,
) -> None:
    """Decode rows ``start`` and after of a request; see :class:`extractor.decoding.PictureDecoder` for its layout."""
    rows, views = request["rows"], request["views"]
    offsets = np.frombuffer(source, np.int64, rows + 1)
    boxes = np.frombuffer(source, np.float32, rows * views * 4, offsets.nbytes).reshape(rows, views, 4)
    body = offsets.nbytes + boxes.nbytes
    at_work = np.frombuffer(target, np.int64, 1)
    squares = [
        (SimpleNamespace(**item["geometry"]), *_places(target, item, rows, views)) for item in request["squares"]
    ]
    for row in range(request["start"], rows):
        at_work[0] = row
        # Default action: the kernel ends the process even when it hangs in C code and its parent is gone.
        signal.setitimer(signal.ITIMER_REAL, max_seconds + ALARM_GRACE_SECONDS)
        try:
            image = decode_rgb(source[body + offsets[row] : body + offsets[row + 1]], max_pixels, request["least_side"])
            resize = _resize_of_one(request["fast_resize"])
            for geometry, pixels, _ in squares:
                pixels[row] = fit(image, geometry, resize)  # type: ignore[arg-type]  # has the attributes that fit reads
            for view in range(views):
                cut, resize = cut_view(image, boxes[row, view]), _resize_of_one(request["fast_resize"])
                for geometry, _, view_pixels in squares:
                    view_pixels[row, view] = fit(cut, geometry, resize)  # type: ignore[arg-type]
        except UndecodableImageError as error:
            say(connection, {"row": row, "reason": error.reason, "detail": error.detail[:500]})
        except MemoryError:
            os._exit(NO_MEMORY)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _places(target: mmap.mmap, item: dict[str, Any], rows: int, views: int) -> tuple[np.ndarray, np.ndarray]:
    shape = tuple(item["shape"])
    count = rows * int(np.prod(shape))
    whole = np.frombuffer(target, np.uint8, count * (1 + views), item["offset"])
    return whole[:count].reshape(rows, *shape), whole[count:].reshape(rows, views, *shape)


def _resize_of_one(fast: bool) -> Resize:
    if not fast:
        return each_once(ExactResize())
    from extractor.tensor_resize import TensorResize

    return each_once(TensorResize())


@functools.cache
def _load_fast_resize() -> int:
    """Import torch, once; the bytes of address space that it takes, most of which are never touched."""
    if not sys.platform.startswith("linux"):
        return 0
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # an earlier request's limit leaves no room
    before = _address_space()
    import extractor.tensor_resize  # noqa: F401

    return _address_space() - before


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def _limit_beyond(max_memory_mib: int, beyond: int) -> None:
    """The bound is for decoding; libraries and the shard's own pictures and pixels, mapped here, come on top."""
    if sys.platform.startswith("linux"):
        import resource

        soft = (max_memory_mib << 20) + beyond
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # of the shell or the container; it cannot be raised
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    """Entry point: descriptor of the socket, then the limits."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    max_pixels, max_seconds, max_memory_mib = int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # C libraries print there
        os.dup2(nowhere, descriptor)
    limit_process(None)
    serve(connection, max_pixels, max_seconds, max_memory_mib)


if __name__ == "__main__":
    main()
