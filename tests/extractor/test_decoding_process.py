"""What a decoding process must survive without blaming a picture, or mixing two requests up."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from common.images import decode_rgb, fit
from common.models.spec import Geometry
from extractor.config import DecodeLimits
from extractor.decoding import PictureDecoder

SMALL = Geometry(size=16)


def picture(seed: int, side: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def decoder():
    decoder = PictureDecoder(DecodeLimits(max_seconds=60))
    yield decoder
    decoder.close()


def test_answers_to_an_interrupted_request_are_not_taken_for_the_next_one(decoder):
    """As when Ray cancels a task: its process lives on, and so does the decoder in it."""
    decoder.decode(pa.array([picture(0)]), [SMALL])
    large = pa.array([picture(0, 1000)] * 100)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            decoder.decode(large, [SMALL])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    files = [picture(seed, 500) for seed in range(1, 20)]
    decoded = decoder.decode(pa.array(files), [SMALL])
    assert not decoded.errors
    for row, data in enumerate(files):
        assert (decoded.pixels[SMALL.key][row] == fit(decode_rgb(data), SMALL)).all()


def kill_at_start(decoder, times: int) -> threading.Thread:
    """Kill so many children of a decoder as soon as they are there, long before they are ready."""

    def watch():
        killed: set[int] = set()
        while len(killed) < times:
            pid = decoder.pid
            if pid is not None and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_child_that_is_killed_before_it_is_ready_is_replaced(decoder):
    killer = kill_at_start(decoder, 2)
    decoded = decoder.decode(pa.array([picture(1)]), [SMALL])
    killer.join(20)
    assert not decoded.errors
    assert decoded.kills == decoder.kills == 2
    assert (decoded.pixels[SMALL.key][0] == fit(decode_rgb(picture(1)), SMALL)).all()


def test_when_no_child_gets_ready_that_is_said(decoder):
    kill_at_start(decoder, 3)
    with pytest.raises(OSError, match=r"did not start, 3 times in a row \(the process ended with signal 9\)"):
        decoder.decode(pa.array([picture(1)]), [SMALL])


def test_a_request_of_any_length_arrives_whole(decoder):
    geometries = [Geometry(size=size, colour=colour) for size in range(1, 301) for colour in ("rgb", "gray")]
    decoded = decoder.decode(pa.array([picture(1)]), geometries)
    assert not decoded.errors
    image = decode_rgb(picture(1))
    for geometry in (geometries[0], geometries[-1]):
        assert (decoded.pixels[geometry.key][0] == fit(image, geometry)).all()


def test_a_child_that_cannot_read_a_shard_is_an_error_and_no_pictures_fault(decoder):
    no_corners = np.zeros((1, 2, 0), np.float32)
    with pytest.raises(OSError, match="cannot read a shard: decoder crashed"):
        decoder.decode(pa.array([b""]), [SMALL], no_corners)
    assert not decoder.decode(pa.array([picture(1)]), [SMALL]).errors


def test_a_row_without_a_file_is_an_empty_file(decoder):
    decoded = decoder.decode(pa.chunked_array([pa.array([picture(1), None], pa.binary())]), [SMALL])
    assert {row: reason for row, (reason, _) in decoded.errors.items()} == {1: "empty file"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other kernels do not bound the address space")
def test_a_bound_on_the_address_space_that_is_there_already_is_kept():
    """As under `ulimit -v`: nobody may raise it."""
    program = (
        "import resource, sys, pyarrow as pa\n"
        "resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))\n"
        "from common.models.spec import Geometry\n"
        "from extractor.config import DecodeLimits\n"
        "from extractor.decoding import PictureDecoder\n"
        "decoder = PictureDecoder(DecodeLimits())\n"
        "decoded = decoder.decode(pa.array([sys.stdin.buffer.read()]), [Geometry(size=16)])\n"
        "decoder.close()\n"
        "sys.exit(str(decoded.errors) if decoded.errors else 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], input=picture(1), capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
