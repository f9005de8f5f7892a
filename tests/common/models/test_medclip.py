"""MedCLIP from its published layout, against the recipe written out by transformers 4's names."""

import io

import pytest
import torch
import upstream_others as upstream
from PIL import Image

from common.errors import ModelError
from common.models.architectures import read_architecture
from common.models.embed import embed_images, embed_texts
from common.models.load import load_model, read_catalog
from common.models.medclip import MedClip
from common.models.tensors import load_strictly

PICTURES = upstream.pictures(upstream.MEDCLIP_SIZE)
CAPTIONS = ["a lung", "Chest CT showing an opacity in the left Lung, view 3.", "no finding " * 60]


@pytest.fixture
def written(tmp_path):
    return upstream.write_medclip(tmp_path / "medclip")


@pytest.fixture
def model(written, tmp_path):
    return load_model(upstream.find(written, tmp_path))


def test_the_published_recipes_vectors(model, written):
    upstream.assert_close(embed_images(model, PICTURES), written.image(PICTURES))
    upstream.assert_close(embed_texts(model, CAPTIONS), written.text(CAPTIONS))
    upstream.assert_neighbours_do_not_matter(model, PICTURES, CAPTIONS)


def test_what_a_wrong_recipe_would_give_is_far_off(model, written):
    text, place = embed_texts(model, CAPTIONS), written.place
    upstream.assert_far(text, upstream.medclip_text(place, CAPTIONS, layers=(-1,)))
    upstream.assert_far(text, upstream.medclip_text(place, CAPTIONS, layers=(0, 1, -1)))
    upstream.assert_far(text, upstream.medclip_text(place, CAPTIONS, lower=False))
    upstream.assert_far(text, upstream.medclip_text(place, CAPTIONS, pad_to=77))


def test_averaging_over_pads_is_a_rival_recipe(written, tmp_path):
    spec = upstream.find(written, tmp_path, recipe="padded-77")
    assert spec.name == "medclip.padded-77"
    expected = upstream.medclip_text(written.place, CAPTIONS, pad_to=77)
    upstream.assert_close(embed_texts(load_model(spec), CAPTIONS), expected)


def test_colour_is_discarded_and_the_aspect_is_kept(model):
    colour = upstream.opened(PICTURES[0])
    gray = upstream.encoded(colour.convert("L").convert("RGB"))
    squashed = upstream.encoded(colour.resize((upstream.MEDCLIP_SIZE,) * 2))
    image = embed_images(model, [PICTURES[0]])
    upstream.assert_close(embed_images(model, [gray]), image)
    upstream.assert_far(embed_images(model, [squashed]), image, least=1e-3)
    assert model.description.geometry.channels == 1


def test_the_published_names_do_not_load_unrenamed(written):
    import json

    file = written.place.parent / f"{written.place.name}-architecture.json"
    tensors = upstream.read(written.place / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"Missing: .*attention\.k_proj"):
        load_strictly(MedClip(json.loads(file.read_text())), tensors, "x")


@pytest.mark.parametrize(("stored", "used"), [(9.0, 4.6052), (-3.0, 0.0)])
def test_the_scale_is_clamped_as_in_use(tmp_path, stored, used):
    written = upstream.write_medclip(tmp_path / "medclip", logit_scale=stored)
    scale = load_model(upstream.find(written, tmp_path)).logit_scale
    assert scale == pytest.approx(float(torch.tensor(used).exp()), rel=1e-4)


def test_a_small_picture_is_not_enlarged(model):
    """It lies in the middle of the black square, as upstream pads it."""
    small = Image.new("RGB", (6, 4), (255, 255, 255))
    on_black = Image.new("RGB", (upstream.MEDCLIP_SIZE,) * 2)
    on_black.paste(small, ((upstream.MEDCLIP_SIZE - 6) // 2, (upstream.MEDCLIP_SIZE - 4) // 2))
    buffers = []
    for image in (small, on_black):
        buffers.append(io.BytesIO())
        image.save(buffers[-1], "PNG")
    first, second = (embed_images(model, [buffer.getvalue()]) for buffer in buffers)
    upstream.assert_close(first, second)


def test_full_size():
    with torch.device("meta"):
        model = MedClip(read_architecture("medclip-vit", "x"))
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes["vision_model.projection_head.weight"] == [512, 768]
    assert shapes["text_model.projection_head.weight"] == [512, 768]
    assert shapes["text_model.model.embeddings.word_embeddings.weight"] == [28996, 768]
    assert read_catalog()["medclip"].expect.dim == 512
