import numpy as np
from PIL import Image

from common.views import cut_view, view_boxes


def test_boxes_depend_on_sample_and_seed_only_and_lie_inside():
    boxes = view_boxes("sample", 50, 0.3, 1)
    assert (boxes == view_boxes("sample", 50, 0.3, 1)).all()
    assert (boxes != view_boxes("sample", 50, 0.3, 2)).any()
    assert (boxes != view_boxes("other", 50, 0.3, 1)).any()
    assert boxes.dtype == np.float32
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= 1 + 1e-6).all()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert area.min() >= 0.3 - 1e-5
    assert area.min() < 0.4
    assert area.max() > 0.9


def test_a_box_keeps_the_pictures_own_shape():
    boxes = view_boxes("sample", 8, 0.2, 0)
    np.testing.assert_allclose(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1], atol=1e-6)


def test_the_part_that_is_cut_is_the_one_named():
    pixels = np.arange(100 * 200, dtype=np.uint32).astype(np.uint8).reshape(100, 200)
    part = cut_view(Image.fromarray(pixels), np.array([0.25, 0.5, 0.75, 1.0], np.float32))
    assert (np.asarray(part) == pixels[50:100, 50:150]).all()
    whole = cut_view(Image.fromarray(pixels), np.array([0, 0, 1, 1], np.float32))
    assert (np.asarray(whole) == pixels).all()


def test_the_smallest_pictures_still_give_a_pixel():
    one = Image.new("RGB", (1, 1), "red")
    for box in view_boxes("tiny", 20, 0.05, 0):
        assert cut_view(one, box).size == (1, 1)
    strip = Image.new("RGB", (1, 3000))
    assert all(min(cut_view(strip, box).size) >= 1 for box in view_boxes("strip", 20, 0.05, 0))
