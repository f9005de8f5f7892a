"""Seventy-six broken, hostile and odd files: each a pair whose pixels are right, or a reject with a reason."""

import io
import json
import re
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from common.images import decode_rgb
from common.lake import open_lake
from common.sandbox import SandboxedDecoder
from extractor.config import IngestConfig
from extractor.ingest import ingest

pytestmark = pytest.mark.ray

REASONS = {  # every reason in use, in the words a person reads
    *("empty file", "not an image", "too many pixels", "truncated", "damaged", "non-finite pixels", "blank picture"),
    *("unsupported mode", "unsupported format: FLI"),
}
REJECTED = {
    "zero_byte.jpg": "empty file",
    "header_claims_60000x60000.png": "too many pixels",
    "bmp__b__badwidth.bmp": "too many pixels",
    "float32_nan_hu.tif": "non-finite pixels",
    "micrograph_truncated_last_20_bytes.jpg": "truncated",
    "truncated_jpeg.jpg": "truncated",
    "truncated_image.png": "truncated",
    "png_decompression_dos.png": "blank picture",
    "broken_data_stream.png": "damaged",
    "crash-2020-10-test.tif": "damaged",
    "jpeg_dims_zero.jpg": "damaged",
    "timeout-9139147ce93e20eb14088fe238e541443ffd64b3.fli": "unsupported format: FLI",
    "oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": "damaged",
    "hopper_unknown_pixel_mode.tif": "unsupported mode",
    "not_enough_data.jp2": "truncated",
    "all_black.png": "blank picture",
    "1x1.png": "blank picture",
    "nearblack_mri_0.jpg": "blank picture",
    "nearblack_mri_1.jpg": "blank picture",
}


@pytest.fixture(scope="module")
def files(shared_data):
    found = sorted((shared_data / "nasty" / "files").iterdir())
    assert len(found) == 76
    return found


@pytest.fixture(scope="module")
def ingested(ray_local, files, tmp_path_factory):
    """Report, pairs by file name, rejects by file name. ``min_contrast`` is left as it is by default."""
    folder = tmp_path_factory.mktemp("nasty")
    listing = folder / "nasty.jsonl"
    listing.write_text("".join(json.dumps({"image": str(f), "caption": f"about {f.name}"}) + "\n" for f in files))
    report = ingest(str(listing), str(folder / "lake"), IngestConfig())
    lake = open_lake(str(folder / "lake"))

    def by_file(table):
        return {row["source_key"].rpartition("/")[2]: row for row in table.to_pylist()}

    rejects = [lake.storage.read_table(f"rejects/ingest/{n}") for n in lake.storage.list_files("rejects/ingest")]
    return report, by_file(lake.read_pairs(0)), by_file(rejects[0])


@pytest.fixture(scope="module")
def pixels(ingested):
    """From a file name to the upright RGB pixels of its pair, int [height, width, 3]."""
    return lambda name: np.asarray(decode_rgb(ingested[1][name]["image"])).astype(int)


def test_each_file_is_accounted_for(ingested, files):
    report, pairs, rejects = ingested
    assert report.input == 76 == report.pairs + report.rejects
    assert set(pairs) | set(rejects) == {file.name for file in files}
    assert not set(pairs) & set(rejects)
    assert report.reasons == Counter(row["reason"] for row in rejects.values())
    assert set(report.reasons) <= REASONS
    assert all(row["detail"] for row in rejects.values())


def test_rejects_have_the_reason_a_person_would_give(ingested):
    found = {name: row["reason"] for name, row in ingested[2].items()}
    assert {name: found.get(name) for name in REJECTED} == REJECTED


def test_pairs_keep_the_given_bytes_and_the_upright_size(ingested, files):
    for file in files:
        if file.name in ingested[1]:
            row = ingested[1][file.name]
            assert row["image"] == file.read_bytes()
            assert (row["width"], row["height"]) == decode_rgb(row["image"]).size
    assert (ingested[1]["avif__rot1mir0.avif"]["width"], ingested[1]["avif__rot1mir0.avif"]["height"]) == (640, 427)
    assert ingested[1]["micrograph_jpeg_named.png"]["width"] == 448, "the content counts, not the extension"


def test_turned_pictures_are_upright(pixels):
    upright = pixels("hopper_orientation_2.jpg")
    for number in (3, 5, 6, 8):
        # Each was compressed on its own after turning, so equal only up to JPEG noise.
        assert np.abs(pixels(f"hopper_orientation_{number}.jpg") - upright).mean() < 6, number
    assert np.abs(upright[:, ::-1] - upright).mean() > 30


def test_cmyk_and_lab_have_their_true_colours(pixels):
    red = pixels("tiff_strip_cmyk_jpeg.tif")
    letters = red[..., 0] > 200
    assert 0.02 < letters.mean() < 0.5, "red letters on black; inverted it would be cyan on white"
    assert red[letters][:, 1:].max() < 60
    assert np.median(red) < 30
    for number in (0, 1):
        gray = pixels(f"openstax_cmyk_{number}.jpg")
        assert 40 < gray.mean() < 200
        assert gray.std() > 25
    portrait, lab = pixels("hopper_rle8_row_overflow.bmp"), pixels("hopper.Lab.tif")
    assert np.abs(portrait - lab).mean() < 12


@pytest.mark.parametrize(
    "name",
    [
        *("ct_like_12bit_in_16bit.png", "12bit.cropped.tif", "16bit.cropped.tif", "16bit.MM.cropped.tif"),
        *("16bit.cropped.jp2", "16bit.s.tif", "hopper_16bit.pgm", "9bit.j2k"),
    ],
)
def test_deep_pictures_use_the_whole_range_without_clipping(pixels, name):
    found = pixels(name)
    assert (found.min(), found.max()) == (0, 255)
    assert (found == 255).mean() < 0.3
    if name != "16bit.s.tif":  # a black and white drawing
        assert len(np.unique(found)) > 20


def test_byte_order_and_container_do_not_change_the_picture(pixels):
    little = pixels("16bit.cropped.tif")
    assert np.array_equal(little, pixels("16bit.MM.cropped.tif"))
    assert np.abs(little - pixels("16bit.cropped.jp2")).mean() < 3
    ramp = pixels("ct_like_12bit_in_16bit.png")[:, 0, 0]
    assert (np.diff(ramp) >= 0).all()
    assert np.abs(pixels("hopper_16bit.pgm")[..., 0] - pixels("hopper_rle8_row_overflow.bmp").mean(-1)).mean() < 25


def test_the_first_frame_is_taken(pixels, files):
    frames = {file.name: file for file in files}
    for name in ("frozenpond.mpo", "missing_background.gif"):
        with Image.open(frames[name]) as image:
            image.seek(0)
            first = image.convert("RGBA")
        opaque = np.asarray(first)[..., 3] == 255
        assert np.array_equal(pixels(name)[opaque], np.asarray(first)[..., :3][opaque].astype(int))


def test_constant_first_frames_are_green_and_rejected_as_blank_only_by_choice(ingested, files):
    with SandboxedDecoder() as decoder:
        for file in files:
            if file.name.startswith("multipage"):
                assert np.asarray(decode_rgb(file.read_bytes())).tolist() == [[[0, 128, 0]] * 10] * 10
                assert ingested[2][file.name]["reason"] == "blank picture"
                assert decoder.check(file.read_bytes()).ok


def test_transparent_parts_are_white(pixels, files):
    frames = {file.name: file for file in files}
    for name in ("pil123rgba.png", "la.tga", "rgb_trns_ycbc.jp2", "missing_background.gif"):
        with Image.open(frames[name]) as image:
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
        assert (alpha == 0).any(), name
        assert (pixels(name)[alpha == 0] == 255).all(), name


def test_no_file_takes_more_than_its_share_of_time_or_memory(files):
    limit_mib, deadline = 1024, 10.0
    with SandboxedDecoder(max_seconds=deadline, max_memory_mib=limit_mib) as decoder:
        decoder.check(b"")
        child = decoder.pid
        with open(f"/proc/{child}/limits") as limits:
            held = re.search(r"Max address space\s+(\d+)\s+(\d+)", limits.read()).groups()
        assert held == (str(limit_mib << 20),) * 2
        for file in files:
            began = time.monotonic()
            verdict = decoder.check(file.read_bytes())
            assert time.monotonic() - began < deadline + 5
            assert verdict.ok or verdict.reason in REASONS, f"{file.name}: {verdict}"
        assert decoder.pid == child, "not one of them killed the child"
        with open(f"/proc/{child}/status") as status:
            peak_kib = int(re.search(r"VmPeak:\s+(\d+) kB", status.read()).group(1))
        assert peak_kib <= limit_mib << 10


def test_names_of_all_kinds_and_a_smaller_side(ray_local, files, tmp_path):
    odd = ["naïve – figure 1.jpg", "-begins.jpg", "n" * 200 + ".jpg", "x[1]{2}.jpg", "#7?.jpg"]
    good = next(file for file in files if file.name == "junk_jpeg_header.jpg").read_bytes()
    for number, name in enumerate(odd):
        (tmp_path / name).write_bytes(good + b"\0" * number)  # trailing bytes make each file another one
    listing = tmp_path / "odd.jsonl"
    listing.write_text("".join(json.dumps({"image": name, "caption": "c"}) + "\n" for name in odd))
    report = ingest(str(listing), str(tmp_path / "lake"), IngestConfig(max_side=100))
    assert report.pairs == 5
    for row in open_lake(str(tmp_path / "lake")).read_pairs(0).to_pylist():
        assert Image.open(io.BytesIO(row["image"])).size == (row["width"], row["height"]) == (100, 75)
