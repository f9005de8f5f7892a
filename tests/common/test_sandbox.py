"""A hang, a crash or a lack of memory in the decoder costs one picture and nothing else."""

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from common.sandbox import SandboxedDecoder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, and only Linux limits address space")


def png(width, height, kind="PNG", **options):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(stream, kind, **options)
    return stream.getvalue()


def flat_png(side):
    """A small file that needs side x side x 4 bytes to decode."""
    stream = io.BytesIO()
    Image.new("L", (side, side), 9).save(stream, "PNG")
    return stream.getvalue()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def decoder():
    with SandboxedDecoder(max_seconds=20) as decoder:
        yield decoder


def test_a_good_picture_is_measured_and_a_bad_one_has_a_reason(decoder):
    verdict = decoder.check(png(30, 20))
    assert (verdict.ok, verdict.width, verdict.height, verdict.reencoded) == (True, 30, 20, None)
    assert verdict.contrast > 200
    assert decoder.check(flat_png(8)).contrast == 0
    bad = decoder.check(b"GIF89a")
    assert (bad.ok, bad.width) == (False, 0)
    assert bad.reason in ("truncated", "damaged")
    assert decoder.check(b"").reason == "empty file"


def test_a_child_that_is_killed_before_it_is_ready_is_replaced(decoder):
    def kill_the_first():
        while (pid := decoder.pid) is None:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first, daemon=True)
    killer.start()
    assert decoder.check(png(30, 20)).ok
    killer.join(20)
    assert not killer.is_alive()


def test_no_more_of_the_contrast_is_measured_than_is_enough():
    striped = Image.new("RGB", (9, 9), (7, 7, 7))
    striped.putpixel((4, 4), (7, 20, 7))  # the row in the middle
    striped.putpixel((0, 0), (7, 7, 250))
    stream = io.BytesIO()
    striped.save(stream, "PNG")
    for enough, contrast in ((13, 13), (14, 243), (256, 243)):
        with SandboxedDecoder(enough_contrast=enough) as decoder:
            assert decoder.check(stream.getvalue()).contrast == contrast


def test_one_child_serves_many_pictures_until_it_is_killed(decoder):
    decoder.check(png(8, 8))
    first = decoder.pid
    assert decoder.check(png(9, 9)).width == 9
    assert decoder.pid == first
    os.kill(first, signal.SIGKILL)
    assert decoder.check(png(10, 10)).width == 10, "the picture that found the child dead is tried again in a new one"
    assert decoder.pid != first


def test_a_picture_that_kills_every_child_is_a_crash(decoder, monkeypatch):
    start = decoder._start

    def start_and_die():
        start()
        os.kill(decoder.pid, signal.SIGSEGV)

    monkeypatch.setattr(decoder, "_start", start_and_die)
    verdict = decoder.check(png(8, 8))
    assert verdict.reason == "decoder crashed"
    assert "signal 11" in verdict.detail
    monkeypatch.undo()
    assert decoder.check(png(8, 8)).ok


def test_a_hang_ends_at_the_deadline_and_the_next_picture_is_fine():
    with SandboxedDecoder(max_seconds=0.5) as decoder:
        decoder.check(png(8, 8))
        stuck = decoder.pid
        os.kill(stuck, signal.SIGSTOP)
        began = time.monotonic()
        verdict = decoder.check(png(8, 8))
        assert verdict.reason == "decoder timed out"
        assert time.monotonic() - began < 5
        assert not is_running(stuck)
        assert decoder.check(png(8, 8)).ok


def test_memory_is_limited_and_a_larger_limit_lets_the_same_picture_pass():
    data = flat_png(9000)  # 81 million pixels: about 320 MB as RGB
    with SandboxedDecoder(max_memory_mib=400) as small:
        small.check(png(8, 8))
        verdict = small.check(data)
        assert verdict.reason == "decoder out of memory"
        assert "400 MiB" in verdict.detail
        assert small.check(png(8, 8)).ok
    with SandboxedDecoder(max_memory_mib=3072) as large:
        assert large.check(data).width == 9000


def test_the_pixel_limit_may_be_above_pillows_own():
    with SandboxedDecoder(max_pixels=1 << 40) as decoder:
        header = flat_png(8)[:16] + (60_000).to_bytes(4, "big") * 2 + flat_png(8)[24:]
        # The checksum is wrong now; what matters is that the size alone does not end it.
        assert decoder.check(header).reason != "too many pixels"
    with SandboxedDecoder(max_pixels=10_000) as decoder:
        assert decoder.check(png(101, 100)).reason == "too many pixels"
        assert decoder.check(png(100, 100)).ok


def test_max_side_makes_large_pictures_smaller_and_leaves_others():
    with SandboxedDecoder(max_side=64) as decoder:
        for kind in ("JPEG", "PNG"):
            verdict = decoder.check(png(200, 100, kind))
            small = Image.open(io.BytesIO(verdict.reencoded))
            assert (small.format, small.size, (verdict.width, verdict.height)) == (kind, (64, 32), (64, 32))
        assert decoder.check(png(64, 10)).reencoded is None
        body = b"Comment\0\0" + zlib.compress(bytes(3 << 20))  # a text for which Pillow does not open the file
        whole = png(200, 100)
        text = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
        verdict = decoder.check(whole[:33] + text + whole[33:])
        assert Image.open(io.BytesIO(verdict.reencoded)).size == (64, 32)


def test_the_child_knows_no_credentials(decoder, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    decoder.close()
    decoder.check(png(8, 8))
    with open(f"/proc/{decoder.pid}/environ", "rb") as environment:
        assert b"canary" not in environment.read()


def test_no_child_survives_a_parent_that_is_killed(tmp_path):
    program = (
        "import os, sys\nfrom common.sandbox import SandboxedDecoder\n"
        "d = SandboxedDecoder(); d.check(b''); print(d.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_child_that_hangs_without_a_parent_is_ended_by_its_alarm():
    from common import sandbox

    # A decoder that never returns, in the child's own loop: only the kernel's alarm can end it.
    program = (
        "import sys, time\nfrom common import sandbox\nsandbox.ALARM_GRACE_SECONDS = 0.2\n"
        "sandbox._answer = lambda *_: time.sleep(600)\nsandbox._serve(100, 0.2, 3072, 0, 256)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(sandbox.REQUEST.pack(1) + b"x")
    child.stdin.flush()
    assert child.wait(timeout=30) == -signal.SIGALRM
    child.stdin.close()
    child.stdout.close()
