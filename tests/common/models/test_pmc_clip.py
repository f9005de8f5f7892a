"""PMC-CLIP in both distributions and under both recipes, against the recipe written out."""

import numpy as np
import pytest
import torch
import upstream_others as upstream

from common.errors import ModelError
from common.models.architectures import read_architecture
from common.models.embed import embed_images, embed_texts
from common.models.load import load_model, read_catalog
from common.models.pmc_clip import PmcClip

PICTURES = upstream.pictures(upstream.PMC_SIZE)
CAPTIONS = ["a lung", "Chest x ray showing an opacity in the left lung, view 3.", "no finding " * 60]


@pytest.fixture
def split(tmp_path):
    return upstream.write_pmc_clip_split(tmp_path / "split")


@pytest.mark.parametrize("write", [upstream.write_pmc_clip_split, upstream.write_pmc_clip_full])
def test_both_distributions_give_the_training_codes_vectors(write, tmp_path):
    written = write(tmp_path / "up")
    model = load_model(upstream.find(written, tmp_path))
    upstream.assert_close(embed_images(model, PICTURES), written.image(PICTURES))
    upstream.assert_close(embed_texts(model, CAPTIONS), written.text(CAPTIONS))


def test_neighbours_do_not_matter(split, tmp_path):
    upstream.assert_neighbours_do_not_matter(load_model(upstream.find(split, tmp_path)), PICTURES, CAPTIONS)


def test_what_a_wrong_recipe_would_give_is_far_off(split, tmp_path):
    model = load_model(upstream.find(split, tmp_path))
    image, text, place = embed_images(model, PICTURES), embed_texts(model, CAPTIONS), split.place
    upstream.assert_far(text, upstream.pmc_clip_text(place, CAPTIONS, transposed=True))
    upstream.assert_far(text, upstream.pmc_clip_text(place, CAPTIONS, attend_pads=False))
    upstream.assert_far(text, upstream.pmc_clip_text(place, CAPTIONS, pooling="pooler"))
    # Eight heads against thirty-two change no shape and little of the vector: the reason golden features decide.
    upstream.assert_far(image, upstream.pmc_clip_image(place, PICTURES, heads=8), least=1e-3)
    upstream.assert_far(image, upstream.pmc_clip_image(place, PICTURES, batch_statistics=True))


def test_the_notebooks_recipe_is_a_teacher_of_its_own(split, tmp_path):
    spec = upstream.find(split, tmp_path, recipe="notebook")
    assert spec.name == "pmc-clip.notebook"
    model = load_model(spec)
    upstream.assert_close(embed_images(model, PICTURES), upstream.pmc_clip_image(split.place, PICTURES, heads=8))
    upstream.assert_close(embed_texts(model, CAPTIONS), upstream.pmc_clip_text(split.place, CAPTIONS, pooling="pooler"))
    assert model.description.identity() != load_model(upstream.find(split, tmp_path)).description.identity()


def test_the_notebooks_scale_stands_in_for_the_missing_one(split, tmp_path):
    assert load_model(upstream.find(split, tmp_path)).logit_scale == pytest.approx(np.exp(4.4292), rel=1e-4)


def test_unknown_tensors_are_refused(tmp_path):
    written = upstream.write_pmc_clip_full(tmp_path / "up", extra={"adapter.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"unexpected: adapter\.weight"):
        load_model(upstream.find(written, tmp_path))


def test_numpy_inside_is_refused_with_the_way_out(tmp_path):
    written = upstream.write_pmc_clip_full(tmp_path / "up", numpy_inside=True)
    with pytest.raises(ModelError, match="mmkd teachers convert --trust"):
        load_model(upstream.find(written, tmp_path))


def test_full_size():
    architecture, expect = read_architecture("pmc-clip", "x"), read_catalog()["pmc-clip"].expect
    with torch.device("meta"):
        model = PmcClip(architecture, 32)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes["text_projection"] == [768, 768]
    assert shapes["visual.attnpool.c_proj.weight"] == [768, 2048]
    assert shapes["text_encoder.pooler.dense.weight"] == [768, 768]
    assert (expect.dim, model.visual.attnpool.num_heads) == (768, 32)
