"""transformers' CLIP models as PLIP and PubMedCLIP publish them, against the processor's and model's own numbers."""

import json

import numpy as np
import pytest
import torch
import upstream_others as upstream

from common.errors import ModelError
from common.models.embed import embed_images, embed_texts
from common.models.load import load_model

PICTURES = upstream.pictures(upstream.HF_SIZE)
CAPTIONS = ["a lung", "an opacity in the left lung", "no finding " * 60]


@pytest.fixture
def plip(tmp_path):
    return upstream.write_plip(tmp_path / "plip")


@pytest.mark.parametrize("write", [upstream.write_plip, upstream.write_pubmedclip])
def test_the_published_recipes_vectors(write, tmp_path):
    written = write(tmp_path / "up")
    model = load_model(upstream.find(written, tmp_path))
    upstream.assert_close(embed_images(model, PICTURES), written.image(PICTURES))
    upstream.assert_close(embed_texts(model, CAPTIONS), written.text(CAPTIONS))
    upstream.assert_neighbours_do_not_matter(model, PICTURES, CAPTIONS)


def test_the_crop_is_rounded_as_transformers_does(plip, tmp_path):
    """A margin of 3 puts torchvision's crop one pixel further."""
    geometry = {"size": upstream.HF_SIZE, "crop_rounding": "round"}
    rounded = load_model(upstream.find(plip, tmp_path, recipes={"round": {"geometry": geometry}}, recipe="round"))
    floored = load_model(upstream.find(plip, tmp_path))
    upstream.assert_far(embed_images(rounded, PICTURES), embed_images(floored, PICTURES), least=1e-3)


def test_another_activation_is_refused(plip, tmp_path):
    file = plip.place / "config.json"
    config = json.loads(file.read_text())
    for tower in ("vision_config", "text_config"):
        config[tower]["hidden_act"] = "gelu"
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="activation is gelu, expected quickgelu"):
        load_model(upstream.find(plip, tmp_path))
    wrong = upstream.hf_clip_image(plip.place, PICTURES, activation="gelu")
    upstream.assert_far(wrong, upstream.hf_clip_image(plip.place, PICTURES, activation="quick_gelu"), least=1e-3)


def test_another_head_count_is_refused(plip, tmp_path):
    file = plip.place / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["num_attention_heads"] *= 2
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="image_heads is"):
        load_model(upstream.find(plip, tmp_path))


def test_a_long_caption_keeps_its_end_token(plip, tmp_path):
    model = load_model(upstream.find(plip, tmp_path))
    wrong = upstream.hf_clip_text(plip.place, CAPTIONS, keep_end=False)
    upstream.assert_far(embed_texts(model, CAPTIONS)[2:], wrong[2:], least=1e-3)


def test_stray_and_missing_tensors_are_refused(plip, tmp_path):
    weights = plip.place / "pytorch_model.bin"
    tensors = torch.load(weights, weights_only=True)
    torch.save({**tensors, "adapter.weight": torch.zeros(2)}, weights)
    with pytest.raises(ModelError, match=r"unexpected: \['adapter\.weight'\]"):
        load_model(upstream.find(plip, tmp_path))
    torch.save({name: value for name, value in tensors.items() if name != "visual_projection.weight"}, weights)
    with pytest.raises(ModelError, match=r"Missing: \['visual_projection\.weight'\]"):
        load_model(upstream.find(plip, tmp_path))


def test_a_single_file_says_too_little(plip, tmp_path):
    with pytest.raises(ModelError, match="is a single file, and a transformers model needs its folder"):
        load_model(upstream.find(plip, tmp_path, place=plip.place / "pytorch_model.bin"))


def test_imagenet_constants_are_a_rival_recipe(tmp_path):
    written = upstream.write_pubmedclip(tmp_path / "up")
    rival = load_model(upstream.find(written, tmp_path, recipe="imagenet-constants"))
    assert rival.description.name == "pubmedclip.imagenet-constants"
    np.testing.assert_allclose(rival.description.mean, (0.485, 0.456, 0.406))
    upstream.assert_far(embed_images(rival, PICTURES), written.image(PICTURES), least=1e-3)
