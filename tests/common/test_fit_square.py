"""Squares that not every CLIP uses: padded before resizing, gray, and resized beyond the crop."""

import itertools

import numpy as np
import pytest
from PIL import Image
from upstream_others import draw

from common.images import MAX_PIXELS, ExactResize, each_once, fit, only_channel, pillow_resize
from common.models.spec import Geometry

SHAPES = [(33, 20), (20, 33), (64, 64), (65, 64), (64, 67), (131, 40), (7, 5), (1, 9), (201, 150)]
PADDED = Geometry(size=64, resize="pad-square")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def padded_by_hand(pixels, side):
    """On a black canvas, an odd rest to the right and below."""
    height, width = pixels.shape[:2]
    canvas = np.zeros((side, side, *pixels.shape[2:]), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("colour", ["rgb", "gray"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pad_square_is_a_black_canvas_that_is_then_resized(shape, colour, interpolation):
    image = draw(*shape, seed=1)
    geometry = PADDED.model_copy(update={"colour": colour, "interpolation": interpolation})
    pixels = np.asarray(image if colour == "rgb" else image.convert("L"))
    canvas = Image.fromarray(padded_by_hand(pixels, max(64, *shape)))
    expected = np.asarray(canvas.resize((64, 64), FILTERS[interpolation]))
    found = fit(image, geometry)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected.reshape(64, 64, -1))


def test_pad_square_keeps_small_pictures_as_they_are():
    image = draw(33, 20)
    found = fit(image, PADDED)
    assert np.array_equal(found[22:42, 15:48], np.asarray(image))
    assert found.sum() == np.asarray(image).astype(np.uint64).sum()
    # "longest" is another thing: it enlarges.
    assert not np.array_equal(found, fit(image, Geometry(size=64, resize="longest")))


def test_pad_square_pads_before_it_resizes():
    """Resizing first gives other pixels at the edges, and another height where it rounds."""
    image = draw(131, 40)
    longest = fit(image, Geometry(size=64, resize="longest"))
    assert not np.array_equal(fit(image, PADDED), longest)


def test_a_strip_whose_square_would_be_too_large_is_nearly_the_same():
    side = int(MAX_PIXELS**0.5) + 1
    image = draw(125, 1, seed=2).convert("L").resize((side, 1600))  # its rows are equal
    canvas = Image.fromarray(padded_by_hand(np.asarray(image), side))
    whole = np.asarray(canvas.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    found = fit(image.convert("RGB"), PADDED.model_copy(update={"colour": "gray"}))[:, :, 0].astype(int)
    assert found.shape == (64, 64)
    middle = slice(32 - 4, 32 + 4)  # well inside the strip, which is 10 pixels high
    assert np.abs(found[middle] - whole[middle]).max() <= 2
    outside = [*range(32 - 8), *range(32 + 8, 64)]
    assert not found[outside].any()
    assert abs(found.sum() / whole.sum() - 1) < 0.1


def test_gray_weighs_the_colours_as_television_does():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (10, 200, 90), (0, 0, 0)]
    image = Image.new("RGB", (len(colours), 1))
    image.putdata(colours)
    geometry = Geometry(size=64, resize="pad-square", colour="gray")
    found = fit(image, geometry)[31, 29 : 29 + len(colours), 0]
    expected = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in colours]
    assert np.abs(found - np.array(expected)).max() <= 0.51
    assert np.abs(found - np.array([sum(colour) / 3 for colour in colours])).max() > 20  # not their mean


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest", "pad-square"])
def test_gray_has_one_channel_under_every_resizing(resize):
    image = draw(70, 51)
    geometry = Geometry(size=32, resize=resize, colour="gray")
    found = fit(image, geometry)
    assert found.shape == (32, 32, geometry.channels) == (32, 32, 1)
    same = fit(Image.merge("RGB", [image.convert("L")] * 3), geometry.model_copy(update={"colour": "rgb"}))
    assert np.array_equal(np.repeat(found, 3, axis=2), same)
    assert not np.array_equal(same, fit(image, Geometry(size=32, resize=resize)))


@pytest.mark.parametrize("rounding", ["round", "floor"])
@pytest.mark.parametrize("shape", [(333, 257), (257, 333), (256, 256), (90, 80), (35, 32)], ids=str)
def test_resize_to_leaves_a_margin_for_the_crop(shape, rounding):
    image = draw(*shape, seed=3)
    found = fit(image, Geometry(size=64, resize_to=73, crop_rounding=rounding))
    if rounding == "round":
        from torchvision.transforms import CenterCrop, InterpolationMode, Resize

        expected = np.asarray(CenterCrop(64)(Resize(73, InterpolationMode.BICUBIC)(image)))
    else:
        from transformers import CLIPImageProcessorPil

        processor = CLIPImageProcessorPil(size={"shortest_edge": 73}, crop_size=64)
        pixels = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        expected = pixels.transpose(1, 2, 0).astype(np.uint8)
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, fit(image, Geometry(size=64, crop_rounding=rounding)))


def test_resize_to_the_size_itself_changes_nothing():
    image = draw(90, 80)
    assert np.array_equal(fit(image, Geometry(size=64, resize_to=64)), fit(image, Geometry(size=64)))


def test_keys_are_equal_exactly_when_the_geometry_is():
    choices = {
        "size": [32, 64],
        "resize": ["shortest", "squash", "longest", "pad-square"],
        "resize_to": [None, 73],
        "interpolation": ["bicubic", "bilinear"],
        "crop_rounding": ["round", "floor"],
        "colour": ["rgb", "gray"],
    }
    all_of_them = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    assert len({Geometry(**values).key for values in all_of_them}) == len(all_of_them) == 128
    assert Geometry(**all_of_them[5]).key == Geometry(**all_of_them[5]).key


@pytest.mark.parametrize("shape", [(333, 257), (257, 334), (40, 35), (90, 90)], ids=str)
def test_geometries_that_share_a_resize_get_the_same_pixels_as_alone(shape):
    image = draw(*shape)
    geometries = [
        Geometry(size=32, resize=resize, resize_to=to, interpolation=filter, crop_rounding=rounding, colour=colour)
        for resize, to in (("shortest", None), ("shortest", 37), ("longest", None), ("squash", None))
        for filter in FILTERS
        for rounding in ("round", "floor")
        for colour in ("rgb", "gray")
    ]
    made = []

    def counted(*how):
        made.append(how)
        return pillow_resize(*how)

    shared = each_once(counted)
    for geometry in geometries:
        np.testing.assert_array_equal(fit(image, geometry, shared), fit(image, geometry))
    # A square comes to 32 x 32 and to 37 x 37; the others have two sizes more. Two filters.
    assert len(made) == (4 if shape == (90, 90) else 8)


@pytest.mark.parametrize("filter", Image.Resampling)
@pytest.mark.parametrize("is_gray", [True, False])
def test_a_gray_picture_is_resized_by_one_channel_to_the_same_pixels(filter, is_gray):
    image = draw(131, 90, seed=5)
    image = image.convert("L").convert("RGB") if is_gray else image
    resize = ExactResize()
    for size in ((32, 32), (47, 32), (224, 224), (131, 90)):
        found = resize(image, size, filter)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image.resize(size, filter)))
    assert (only_channel(image) is not None) == is_gray


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (40, 35)], ids=str)
def test_one_pixel_with_a_colour_is_enough(shape):
    gray = draw(*shape, seed=6).convert("L")
    image = gray.convert("RGB")
    assert np.array_equal(np.asarray(only_channel(image)), np.asarray(gray))
    place = (shape[0] - 1, 0)
    red, green, blue = image.getpixel(place)
    for other in ((red ^ 1, green, blue), (red, green ^ 1, blue), (red, green, blue ^ 1)):
        image.putpixel(place, other)
        assert only_channel(image) is None
    assert only_channel(gray) is None
