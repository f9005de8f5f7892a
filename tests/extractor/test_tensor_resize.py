import numpy as np
import pytest
from PIL import Image

from common.images import pillow_resize
from extractor.tensor_resize import TensorResize


def photograph(width: int, height: int) -> Image.Image:
    """Smooth shapes and a hard edge, a little noise on top."""
    y, x = np.mgrid[:height, :width]
    waves = (
        120 + 60 * np.sin(x / 17)[..., None] * np.cos(y[..., None] / np.array([11, 23, 31])) + 40 * (x > y)[..., None]
    )
    noise = np.random.default_rng(width).normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((448, 448), (224, 224)),
        ((448, 312), (321, 224)),
        ((700, 90), (248, 32)),
        ((50, 40), (280, 224)),
        ((1, 900), (1, 9)),
    ],
    ids=str,
)
def test_pixels_are_pillows_but_for_rounding(shape, size, resample):
    image = photograph(*shape)
    expected, found = pillow_resize(image, size, resample), TensorResize()(image, size, resample)
    assert found.size == size
    apart = np.abs(np.asarray(expected).astype(int) - np.asarray(found))
    assert apart.max() <= 2
    assert (apart > 0).mean() < 0.01


def test_of_tall_strips_more_values_differ_but_by_one():
    image, size = photograph(90, 700), (32, 248)
    expected = np.asarray(pillow_resize(image, size, Image.Resampling.BICUBIC)).astype(int)
    apart = np.abs(expected - np.asarray(TensorResize()(image, size, Image.Resampling.BICUBIC)))
    assert apart.max() == 1
    assert 0.01 < (apart > 0).mean() < 0.25


def test_what_torch_does_not_know_is_left_to_pillow():
    image = photograph(60, 40)
    resize = TensorResize()
    for picture, resample in ((image, Image.Resampling.LANCZOS), (image.convert("L"), Image.Resampling.BICUBIC)):
        assert resize(picture, (20, 20), resample) == pillow_resize(picture, (20, 20), resample)


def test_one_picture_after_another_gets_its_own_pixels():
    resize = TensorResize()
    first, second = photograph(60, 40), photograph(61, 41)
    alone = [TensorResize()(image, (20, 20), Image.Resampling.BICUBIC) for image in (first, second)]
    assert [resize(image, (20, 20), Image.Resampling.BICUBIC) for image in (first, second)] == alone
