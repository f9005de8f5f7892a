import io
import os
import signal
import threading
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image

from common.images import decode_rgb, fit
from common.models.spec import Geometry
from common.views import cut_view, view_boxes
from extractor.config import DecodeLimits
from extractor.decoding import PictureDecoder

SMALL, GRAY = Geometry(size=32), Geometry(size=48, resize="squash", colour="gray")


def picture(seed: int, width: int = 60, height: int = 40, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def slow_picture() -> bytes:
    """Small as a file, seconds of work: a large flat picture."""
    stream = io.BytesIO()
    Image.new("RGB", (9000, 9000), "white").save(stream, "PNG")
    return stream.getvalue()


def column(*files: bytes) -> pa.ChunkedArray:
    half = len(files) // 2
    return pa.chunked_array([pa.array(files[:half], pa.binary()), pa.array(files[half:], pa.binary())])


@pytest.fixture
def decoder():
    decoder = PictureDecoder(DecodeLimits(max_seconds=60))
    yield decoder
    decoder.close()


def test_pixels_are_those_of_decoding_here(decoder):
    files = [picture(seed) for seed in range(7)]
    boxes = np.stack([view_boxes(str(row), 2, 0.4, 0) for row in range(7)])
    decoded = decoder.decode(column(*files), [SMALL, GRAY], boxes)
    assert not decoded.errors
    for row, data in enumerate(files):
        image = decode_rgb(data)
        for geometry in (SMALL, GRAY):
            assert (decoded.pixels[geometry.key][row] == fit(image, geometry)).all()
            for view in range(2):
                expected = fit(cut_view(image, boxes[row, view]), geometry)
                assert (decoded.view_pixels[geometry.key][row, view] == expected).all()


def test_one_child_serves_many_shards_and_their_pixels_stay_apart(decoder):
    first = decoder.decode(column(picture(1)), [SMALL])
    pid = decoder.pid
    kept = first.pixels[SMALL.key].copy()
    second = decoder.decode(column(picture(2), picture(3)), [SMALL])
    assert decoder.pid == pid
    assert (first.pixels[SMALL.key] == kept).all()
    assert (second.pixels[SMALL.key][0] != kept[0]).any()


def test_an_empty_shard_is_an_empty_answer(decoder):
    assert decoder.decode(pa.chunked_array([], pa.binary()), [SMALL]).pixels[SMALL.key].shape == (0, 32, 32, 3)


def test_undecodable_rows_are_named_and_black(decoder):
    decoded = decoder.decode(column(picture(1), b"", b"junk", picture(2)), [SMALL])
    assert {row: reason for row, (reason, _) in decoded.errors.items()} == {1: "empty file", 2: "not an image"}
    assert (decoded.pixels[SMALL.key][1:3] == 0).all()
    assert decoded.pixels[SMALL.key][3].any()
    assert decoded.kills == 0


def test_a_picture_that_takes_too_long_is_killed_and_the_rest_goes_on():
    decoder = PictureDecoder(DecodeLimits(max_seconds=0.05, max_pixels=200_000_000))
    files = [picture(1), slow_picture(), picture(2)]
    decoded = decoder.decode(column(*files), [SMALL])
    assert decoded.errors[1][0] == "decoder timed out"
    assert decoded.kills >= 1
    assert decoded.pixels[SMALL.key][2].any()
    decoder.close()


def test_a_picture_that_needs_too_much_memory_is_recorded():
    decoder = PictureDecoder(DecodeLimits(max_memory_mib=400, max_pixels=200_000_000))
    decoded = decoder.decode(column(picture(1), slow_picture(), picture(2)), [SMALL])
    assert {row: reason for row, (reason, _) in decoded.errors.items()} == {1: "decoder out of memory"}
    assert decoded.pixels[SMALL.key][0].any()
    assert decoded.pixels[SMALL.key][2].any()
    decoder.close()


def test_a_killed_child_is_replaced_and_no_row_is_blamed():
    decoder = PictureDecoder(DecodeLimits())
    decoder.decode(column(picture(0)), [SMALL])
    files = [picture(seed, 1500, 1500) for seed in range(40)]
    killed = []

    def kill() -> None:
        time.sleep(0.4)
        killed.append(decoder.pid)
        os.kill(decoder.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    decoded = decoder.decode(column(*files), [SMALL])
    killer.join()
    assert decoder.pid not in killed
    assert decoded.kills == 1
    assert not decoded.errors
    for row, data in enumerate(files):
        assert (decoded.pixels[SMALL.key][row] == fit(decode_rgb(data), SMALL)).all()
    decoder.close()


def test_the_child_ends_with_its_parent():
    import subprocess
    import sys

    program = (
        "import pyarrow as pa, os, signal\n"
        "from extractor.decoding import PictureDecoder\n"
        "from extractor.config import DecodeLimits\n"
        "decoder = PictureDecoder(DecodeLimits())\n"
        "decoder.decode(pa.array([b'x'], pa.binary()), [])\n"
        "print(decoder.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    pid = int(ended.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid), "the child outlived its parent"


def test_scaled_decoding_of_photographs_differs_by_a_few_grey_levels(shared_data, decoder):
    files = [shared_data / "mmkd-demo" / "imgs" / name for name in ("fundus.jpeg", "endoscopy.jpg")]
    large, geometry = column(*(file.read_bytes() for file in files)), Geometry(size=224)
    exact = decoder.decode(large, [geometry]).pixels[geometry.key].astype(int)
    scaled = decoder.decode(large, [geometry], least_side=2 * 224).pixels[geometry.key]
    apart = np.abs(exact - scaled)
    assert (apart.reshape(2, -1).max(axis=1) > 0).all()  # both were decoded at a fraction
    assert apart.mean() < 0.5
    assert np.percentile(apart, 99.9) <= 3


def test_pictures_that_are_small_already_are_never_scaled(decoder):
    files = column(*(picture(seed, 100, 90, "JPEG") for seed in range(3)))
    exact, scaled = decoder.decode(files, [GRAY]), decoder.decode(files, [GRAY], least_side=2 * 48)
    assert (exact.pixels[GRAY.key] == scaled.pixels[GRAY.key]).all()


def test_fast_decoding_of_photographs_differs_in_the_last_bits(shared_data, decoder):
    files = sorted((shared_data / "mmkd-demo" / "imgs").glob("*.jp*g"))
    geometries = [Geometry(), Geometry(resize="longest"), Geometry(size=336, interpolation="bilinear")]
    encoded = column(*(file.read_bytes() for file in files))
    exact, fast = decoder.decode(encoded, geometries), decoder.decode(encoded, geometries, fast_resize=True)
    assert not fast.errors
    for key, pixels in exact.pixels.items():
        apart = np.abs(pixels.astype(int) - fast.pixels[key])
        assert 0 < (apart > 0).mean() < 0.01
        assert apart.max() <= 2
    again = decoder.decode(encoded, geometries)  # the same child goes on exactly
    assert all((again.pixels[key] == pixels).all() for key, pixels in exact.pixels.items())


def test_fast_views_are_of_the_same_crops(decoder):
    files = [picture(seed) for seed in range(3)]
    boxes = np.stack([view_boxes(str(row), 2, 0.4, 0) for row in range(3)])
    exact = decoder.decode(column(*files), [SMALL, GRAY], boxes).view_pixels
    fast = decoder.decode(column(*files), [SMALL, GRAY], boxes, fast_resize=True).view_pixels
    assert np.abs(exact[SMALL.key].astype(int) - fast[SMALL.key]).max() <= 2
    assert (exact[GRAY.key] == fast[GRAY.key]).all()  # Pillow's


def test_the_memory_limit_holds_for_fast_decoding_though_torch_is_large():
    decoder = PictureDecoder(DecodeLimits(max_memory_mib=400, max_pixels=200_000_000))
    decoded = decoder.decode(column(picture(1), slow_picture(), picture(2)), [SMALL], fast_resize=True)
    assert {row: reason for row, (reason, _) in decoded.errors.items()} == {1: "decoder out of memory"}
    assert decoded.pixels[SMALL.key][[0, 2]].any(axis=(1, 2, 3)).all()
    decoder.close()
