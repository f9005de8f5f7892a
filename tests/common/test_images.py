"""Decoding to upright RGB, and fitting exactly as the libraries the teachers were trained with."""

import io
import threading
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from common.images import UndecodableImageError, decode_rgb, fit
from common.models.spec import Geometry

SIZES = [(640, 480), (333, 517), (224, 224), (225, 224), (223, 401), (50, 31), (1001, 77), (7, 5)]


def picture(width, height, seed=0):
    """Smooth colours with noise: rounding differences show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 7 + seed) * 60, np.cos(y / 5) * 60, np.sin((x + y) / 11) * 60]
    noise = rng.integers(0, 60, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, -1) + 100 + noise, 0, 255).astype(np.uint8))


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def reason_of(data, **limits):
    with pytest.raises(UndecodableImageError) as caught:
        decode_rgb(data, **limits)
    assert caught.value.detail
    return caught.value.reason


@pytest.fixture(scope="module")
def real_pictures(shared_data):
    files = sorted((shared_data / "cap-openstax" / "images").iterdir())[::60]
    assert len(files) >= 9
    return [decode_rgb(file.read_bytes()) for file in files]


@pytest.mark.parametrize("size", [224, 336, 97])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_fit_gives_the_pixels_of_open_clip(real_pictures, resize, interpolation, size):
    from open_clip.transform import image_transform

    steps = image_transform(size, is_train=False, resize_mode=resize, interpolation=interpolation).transforms[:-2]
    geometry = Geometry(size=size, resize=resize, interpolation=interpolation)
    for image in [*real_pictures, *(picture(*shape) for shape in SIZES)]:
        expected = image
        for step in steps:
            expected = step(expected)
        assert np.array_equal(fit(image, geometry), np.asarray(expected)), image.size


@pytest.mark.parametrize("size", [224, 97])
def test_fit_with_floor_gives_the_pixels_of_transformers(real_pictures, size):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    geometry = Geometry(size=size, crop_rounding="floor")
    for image in [*real_pictures, *(picture(*shape) for shape in SIZES)]:
        pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(fit(image, geometry), pixels.transpose(1, 2, 0).astype(np.uint8)), image.size


def test_round_and_floor_crop_differently_where_the_margin_is_odd():
    image = picture(227, 224)
    assert not np.array_equal(fit(image, Geometry()), fit(image, Geometry(crop_rounding="floor")))


def test_a_long_strip_is_fitted_in_little_memory_and_to_nearly_the_same_pixels():
    from common import images

    image = picture(9, 9 * (images.LONGEST_STRIP + 3))
    width, height = images._shortest(image.size, 64)
    top = round((height - 64) / 2.0)
    whole = image.resize((width, height), Image.Resampling.BICUBIC).crop((0, top, 64, top + 64))
    difference = np.abs(fit(image, Geometry(size=64)).astype(int) - np.asarray(whole).astype(int))
    assert difference.max() <= 1
    assert fit(Image.new("RGB", (1, 30_000), "red"), Geometry()).tolist() == [[[255, 0, 0]] * 224] * 224


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_ends_upright(orientation):
    upright = picture(40, 24)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a camera's tag undoes
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode_rgb(encoded(stored, "PNG", exif=exif))), np.asarray(upright))


def test_transparency_is_laid_over_white():
    rgba = Image.new("RGBA", (4, 1))
    rgba.putdata([(200, 10, 10, 255), (200, 10, 10, 0), (0, 0, 0, 128), (0, 0, 0, 0)])
    expected = [[200, 10, 10], [255, 255, 255], [127, 127, 127], [255, 255, 255]]
    assert np.asarray(decode_rgb(encoded(rgba, "PNG")))[0].tolist() == expected
    gray = Image.new("LA", (2, 1))
    gray.putdata([(30, 255), (30, 0)])
    assert np.asarray(decode_rgb(encoded(gray, "PNG")))[0].tolist() == [[30] * 3, [255] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 128, 0, 9, 9, 9])
    palette.putdata([0, 1])
    assert np.asarray(decode_rgb(encoded(palette, "PNG", transparency=1)))[0].tolist() == [[0, 128, 0], [255] * 3]


def test_cmyk_is_neither_inverted_nor_black():
    cmyk = Image.new("CMYK", (32, 8), (0, 0, 0, 0))
    cmyk.paste((0, 0, 0, 255), (16, 0, 32, 8))
    for kind, options in (("JPEG", {"quality": 95}), ("TIFF", {})):
        pixels = np.asarray(decode_rgb(encoded(cmyk, kind, **options)))
        assert pixels[4, 4].min() > 250, kind
        assert pixels[4, 28].max() < 5, kind


def test_an_embedded_profile_that_does_not_fit_is_passed_over():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile"):
        red, green, blue = np.asarray(decode_rgb(encoded(cmyk, "TIFF", icc_profile=profile)))[0, 0].tolist()
        assert red > 200
        assert max(green, blue) < 60


def test_lab_returns_the_colours_it_was_made_from():
    rgb = Image.new("RGB", (8, 8), (200, 40, 60))
    srgb, lab_profile = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(rgb, srgb, lab_profile, outputMode="LAB")
    assert np.abs(np.asarray(decode_rgb(encoded(lab, "TIFF"))).astype(int) - [200, 40, 60]).max() <= 4


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16), "PNG"),
        (np.arange(-1000, 3096, 16, dtype=np.int32).reshape(16, 16), "TIFF"),
        (np.linspace(-1000, 3000, 256, dtype=np.float32).reshape(16, 16), "TIFF"),
    ],
)
def test_deep_pixels_are_stretched_over_the_whole_range(array, kind):
    pixels = np.asarray(decode_rgb(encoded(Image.fromarray(array), kind)))
    assert pixels[0, 0].tolist() == [0] * 3
    assert pixels[-1, -1].tolist() == [255] * 3
    assert np.array_equal(pixels[..., 0].ravel(), np.arange(256))


def test_what_is_no_whole_picture_has_a_reason():
    whole = encoded(picture(64, 64), "JPEG")
    assert reason_of(b"") == "empty file"
    assert reason_of(b"<html>no such figure</html>") == "not an image"
    assert reason_of(whole[: len(whole) // 2]) == "truncated"
    assert reason_of(encoded(picture(64, 64), "PNG"), max_pixels=64 * 64 - 1) == "too many pixels"
    nan = np.full((4, 4), 1.5, np.float32)
    nan[1, 2] = np.nan
    assert reason_of(encoded(Image.fromarray(nan), "TIFF")) == "non-finite pixels"
    assert decode_rgb(encoded(picture(64, 64), "PNG"), max_pixels=64 * 64).size == (64, 64)


def test_postscript_is_never_run():
    assert reason_of(encoded(picture(8, 8), "EPS")) == "unsupported format: EPS"


def test_first_frame_one_bit_and_gray():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_rgb(animated))[0, 0].tolist() == [255, 0, 0]
    assert np.asarray(decode_rgb(encoded(Image.new("1", (3, 3), 1), "PNG"))).tolist() == [[[255] * 3] * 3] * 3
    assert np.asarray(decode_rgb(encoded(Image.new("L", (3, 3), 77), "PNG"))).tolist() == [[[77] * 3] * 3] * 3


def test_nothing_global_is_changed_even_by_threads():
    data = encoded(picture(300, 300), "JPEG")
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    threads = [threading.Thread(target=lambda: [decode_rgb(data) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before
    assert before[2] is False
