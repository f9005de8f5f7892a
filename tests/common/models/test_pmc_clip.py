"""The pmc_clip family against its recipes written out in plain torch, in both distributions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from upstream_others import (
    CAPTIONS,
    CONTEXT,
    PMC_EXPECT,
    PMC_IMAGE,
    PMC_PROJECTION,
    PMC_SIZE,
    PMC_TEXT,
    assert_close,
    assert_far,
    assert_neighbours_do_not_matter,
    find,
    pictures,
    pmc_clip_image,
    pmc_clip_text,
    read,
    write_pmc_clip_full,
    write_pmc_clip_split,
)

from common.errors import ModelError
from common.models.architectures import read_architecture
from common.models.convert import convert_trusted
from common.models.embed import embed_images, embed_texts
from common.models.load import describe_model, load_model, load_tokenizer, read_catalog
from common.models.pmc_clip import NOTEBOOK_LOG_SCALE, PmcClip
from common.models.spec import Geometry

PICTURES = pictures(PMC_SIZE)
WRITERS = {"split": write_pmc_clip_split, "full": write_pmc_clip_full}
RECIPES = {  # recipe -> heads of the attention pool, which BERT output
    "training-code": (32, "cls"),
    "notebook": (8, "pooler"),
    "heads-8-cls": (8, "cls"),
    "heads-32-pooler": (32, "pooler"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    return {name: write(folder / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def loaded(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalogs")
    return {name: load_model(find(upstream, folder)) for name, upstream in written.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_vectors_are_those_of_the_training_code(written, loaded, name):
    assert_close(embed_images(loaded[name], PICTURES), written[name].image(PICTURES))
    assert_close(embed_texts(loaded[name], CAPTIONS), written[name].text(CAPTIONS))


def test_both_distributions_give_the_same_vectors(loaded):
    split, full = loaded["split"], loaded["full"]
    assert np.array_equal(embed_images(split, PICTURES), embed_images(full, PICTURES))
    assert np.array_equal(embed_texts(split, CAPTIONS), embed_texts(full, CAPTIONS))


def test_neighbours_do_not_matter(loaded):
    assert_neighbours_do_not_matter(loaded["split"], PICTURES, CAPTIONS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rival_recipes_give_their_own_vectors(written, loaded, tmp_path, recipe):
    heads, pooling = RECIPES[recipe]
    folder = written["split"].place
    model = load_model(find(written["split"], tmp_path, recipe))
    assert model.description.name == f"pmc-clip.{recipe}"
    assert model.description.settings == {"pool_heads": str(heads), "pooling": pooling, "pads": "attended"}
    image, text = embed_images(model, PICTURES), embed_texts(model, CAPTIONS)
    assert_close(image, pmc_clip_image(folder, PICTURES, heads=heads))
    assert_close(text, pmc_clip_text(folder, CAPTIONS, pooling=pooling))
    # The other value loads as silently, and gives other vectors.
    assert_far(image, pmc_clip_image(folder, PICTURES, heads=40 - heads))
    assert_far(text, pmc_clip_text(folder, CAPTIONS, pooling="cls" if pooling == "pooler" else "pooler"))


def test_recipes_are_told_apart_by_name_and_by_identity(written, loaded, tmp_path):
    upstream = written["split"]
    found = {recipe: describe_model(find(upstream, tmp_path, recipe)) for recipe in RECIPES}
    assert len({description.name for description in found.values()}) == len(RECIPES)
    default = loaded["split"].description
    assert default.name == "pmc-clip"
    same = [recipe for recipe, description in found.items() if description.identity() == default.identity()]
    assert same == ["training-code"]
    assert len({str(description.identity()) for description in found.values()}) == len(RECIPES)
    with pytest.raises(ModelError, match=r"no recipe 'colab'.*pmc-clip@notebook"):
        find(upstream, tmp_path, "colab")


def test_the_projection_is_not_transposed(written, loaded):
    """It is square in the published model too, so that a linear layer would load it without complaint."""
    projection = read(written["split"].place / PMC_PROJECTION)
    assert projection.shape[0] == projection.shape[1]
    assert_far(embed_texts(loaded["split"], CAPTIONS), pmc_clip_text(written["split"].place, CAPTIONS, transposed=True))


def test_pads_are_attended_to(written, loaded):
    masked = pmc_clip_text(written["split"].place, CAPTIONS, attend_pads=False)
    found = embed_texts(loaded["split"], CAPTIONS)
    assert_far(found[:1], masked[:1])
    assert_close(found[4:5], masked[4:5])  # this caption fills the context, so that there are no pads


def test_batch_normalisation_uses_its_running_statistics(written, loaded):
    model = loaded["split"]
    assert not any(module.training for module in model.model.modules())
    assert_far(embed_images(model, PICTURES), pmc_clip_image(written["split"].place, PICTURES, batch_statistics=True))


def test_captions_are_cut_to_77_with_their_end_token(loaded):
    tokens = loaded["split"].tokenize(list(CAPTIONS))
    assert tokens.shape == (len(CAPTIONS), CONTEXT)
    assert (tokens[:, 0] == 2).all()
    assert tokens[4, -1] == 3
    assert (tokens[0, -1], tokens[2, :3].tolist()) == (0, [2, 3, 0])


def test_tokens_need_only_the_vocabulary(written, loaded, tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "vocab.txt").write_bytes((written["split"].place / "vocab.txt").read_bytes())
    tokenize = load_tokenizer(find(written["split"], tmp_path, place=folder))
    assert np.array_equal(tokenize(list(CAPTIONS)), loaded["split"].tokenize(list(CAPTIONS)))


def test_the_logit_scale_is_the_notebooks_unless_the_file_has_one(loaded):
    assert loaded["split"].logit_scale == pytest.approx(math.exp(4.4292), rel=1e-5)
    assert loaded["full"].logit_scale == pytest.approx(50.0, rel=1e-5)
    assert NOTEBOOK_LOG_SCALE == 4.4292


def test_the_description_says_how_the_model_is_run(loaded):
    description = loaded["full"].description
    assert description.geometry == Geometry(size=PMC_SIZE)
    assert description.mean == (0.48145466, 0.4578275, 0.40821073)
    assert description.std == (0.26862954, 0.26130258, 0.27577711)
    assert (description.image_dim, description.text_dim, description.context_length) == (32, 32, CONTEXT)


# --- the full checkpoint --------------------------------------------------------------------------------------------


def test_the_full_checkpoint_holds_what_embeddings_do_not_need(written):
    """Otherwise the tests above would not show that it is dropped."""
    names = set(read(written["full"].place / "checkpoint.pt"))
    stray = {"positional_embedding", "ln_final.weight", "mlm_projection", "img_special_token"}
    assert stray | {"fusion_module.resblocks.0.attn.in_proj_weight"} <= names
    assert "text_encoder.embeddings.position_ids" in names
    raw = torch.load(written["full"].place / "checkpoint.pt", weights_only=True)
    assert all(name.startswith("module.") for name in raw["state_dict"])


def test_a_positional_embedding_in_the_file_renames_nothing(written, loaded, tmp_path):
    """Stock open_clip takes it for a sign of an old layout and renames the projection, which then fits nowhere."""
    from open_clip.model import convert_to_custom_text_state_dict

    tensors = read(written["full"].place / "checkpoint.pt")
    renamed = convert_to_custom_text_state_dict(tensors)
    assert "text_projection" in tensors
    assert "text.text_projection" in renamed
    assert "text_projection" not in renamed
    file = tmp_path / "checkpoint.pt"
    (tmp_path / "vocab.txt").write_bytes((written["full"].place / "vocab.txt").read_bytes())
    torch.save({name: value for name, value in tensors.items() if name != "positional_embedding"}, file)
    without = load_model(find(written["full"], tmp_path, place=file))
    assert np.array_equal(embed_images(without, PICTURES), embed_images(loaded["full"], PICTURES))
    assert np.array_equal(embed_texts(without, CAPTIONS), embed_texts(loaded["full"], CAPTIONS))


@pytest.mark.parametrize("extra", ["caption_decoder.weight", "visual.mim_head.weight", "text_encoder.extra.weight"])
def test_an_unknown_extra_tensor_is_refused(tmp_path, extra):
    upstream = write_pmc_clip_full(tmp_path / "full", extra={extra: torch.zeros(2)})
    with pytest.raises(ModelError, match=rf"does not fit its architecture.*unexpected: {extra}"):
        load_model(find(upstream, tmp_path))


def test_a_checkpoint_without_its_projection_is_refused(written, tmp_path):
    tensors = read(written["full"].place / "checkpoint.pt")
    file = tmp_path / "checkpoint.pt"
    (tmp_path / "vocab.txt").write_bytes((written["full"].place / "vocab.txt").read_bytes())
    torch.save({name: value for name, value in tensors.items() if name != "text_projection"}, file)
    with pytest.raises(ModelError, match="Missing: text_projection; unexpected: none"):
        load_model(find(written["full"], tmp_path, place=file))


def test_numpy_inside_is_explained_and_a_conversion_loads(loaded, tmp_path):
    upstream = write_pmc_clip_full(tmp_path / "full", numpy_inside=True)
    file = upstream.place / "checkpoint.pt"
    with pytest.raises(ModelError, match=r"holds more than tensors \(numpy.*mmkd teachers convert --trust"):
        load_model(find(upstream, tmp_path))
    target = upstream.place / "checkpoint.safetensors"
    convert_trusted(file, target)
    for place in (target, upstream.place):  # the file by hand, and the folder, where it is preferred
        model = load_model(find(upstream, tmp_path, place=place))
        assert_close(embed_images(model, PICTURES), embed_images(loaded["full"], PICTURES), atol=1e-6)
        assert_close(embed_texts(model, CAPTIONS), embed_texts(loaded["full"], CAPTIONS), atol=1e-6)
        assert model.logit_scale == pytest.approx(50.0, rel=1e-5)


# --- the split files ------------------------------------------------------------------------------------------------


def test_the_split_files_are_what_upstream_publishes(written):
    folder = written["split"].place
    assert sorted(file.name for file in folder.iterdir()) == sorted([PMC_IMAGE, PMC_TEXT, PMC_PROJECTION, "vocab.txt"])
    assert PMC_IMAGE == "image_encoder(resnet50).pth"
    assert isinstance(torch.load(folder / PMC_PROJECTION, weights_only=True), torch.Tensor)
    assert {"embeddings.position_ids", "pooler.dense.weight"} <= set(read(folder / PMC_TEXT))
    assert tuple(read_catalog()["pmc-clip"].source.files) == (PMC_IMAGE, PMC_TEXT, PMC_PROJECTION)


@pytest.mark.parametrize("missing", [PMC_IMAGE, PMC_TEXT, PMC_PROJECTION])
def test_one_of_the_three_files_missing_is_refused(tmp_path, missing):
    upstream = write_pmc_clip_split(tmp_path / "split")
    (upstream.place / missing).unlink()
    with pytest.raises(ModelError, match="Model 'pmc-clip'"):
        load_model(find(upstream, tmp_path))


@pytest.mark.parametrize("changed", [PMC_IMAGE, PMC_TEXT, PMC_PROJECTION])
def test_each_of_the_three_files_is_part_of_the_identity(written, loaded, tmp_path, changed):
    upstream = write_pmc_clip_split(tmp_path / "split")
    content = torch.load(upstream.place / changed, weights_only=True)
    first = content if isinstance(content, torch.Tensor) else next(iter(content.values()))
    first += 1
    torch.save(content, upstream.place / changed)
    description = describe_model(find(upstream, tmp_path))
    assert description.weights_sha256 != loaded["split"].description.weights_sha256
    again = write_pmc_clip_split(tmp_path / "again")
    unchanged = describe_model(find(again, tmp_path))
    assert unchanged.weights_sha256 == loaded["split"].description.weights_sha256


def test_an_image_file_of_another_layout_is_refused(tmp_path):
    upstream = write_pmc_clip_split(tmp_path / "split")
    file = upstream.place / PMC_IMAGE
    torch.save({f"trunk.{name}": value for name, value in read(file).items()}, file)
    with pytest.raises(ModelError, match=r"unexpected: visual\.trunk\."):
        load_model(find(upstream, tmp_path))


# --- expectations and full size -------------------------------------------------------------------------------------


def test_wrong_heads_are_refused_where_the_entry_expects_others(written, tmp_path):
    expecting = {"expect": {**PMC_EXPECT, "image_heads": 32}}
    load_model(find(written["split"], tmp_path, **expecting))
    with pytest.raises(ModelError, match="image_heads is 8, expected 32"):
        load_model(find(written["split"], tmp_path, "notebook", **expecting))
    wrong = {"expect": {**PMC_EXPECT, "text_heads": 12}}
    with pytest.raises(ModelError, match="text_heads is 2, expected 12"):
        load_model(find(written["split"], tmp_path, **wrong))


def test_without_a_recipe_the_heads_are_stock_open_clips(written, tmp_path):
    """width * 32 / 64: 32 for the published 64, 4 for the small tower's 8."""
    upstream = written["split"]
    model = load_model(find(replace(upstream, entry={**upstream.entry, "recipe": {}}), tmp_path))
    assert model.description.settings["pool_heads"] == "4"
    assert model.description.settings["pooling"] == "cls"
    assert_close(embed_images(model, PICTURES), pmc_clip_image(upstream.place, PICTURES, heads=4))


@torch.no_grad()
def test_the_published_size_has_the_documented_shapes():
    entry = read_catalog()["pmc-clip"]
    with torch.device("meta"):
        model = PmcClip(read_architecture(entry.architecture, entry.name), entry.recipe.pool_heads).eval()
        image = model.visual(torch.empty(1, 3, 224, 224))
        out = model.text_encoder(input_ids=torch.zeros(1, CONTEXT, dtype=torch.long))
        text = out.pooler_output @ model.text_projection
    assert image.shape == text.shape == (1, entry.expect.dim) == (1, 768)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["text_projection"] == (768, 768)
    assert shapes["visual.conv1.weight"] == (32, 3, 3, 3)
    assert shapes["visual.attnpool.positional_embedding"] == (7 * 7 + 1, 2048)
    assert shapes["visual.attnpool.c_proj.weight"] == (768, 2048)
    assert shapes["text_encoder.embeddings.word_embeddings.weight"] == (30522, 768)
    assert shapes["text_encoder.pooler.dense.weight"] == (768, 768)
    assert shapes["logit_scale"] == ()
    depths = [
        len({name.split(".")[2] for name in shapes if name.startswith(f"visual.layer{i}.")}) for i in (1, 2, 3, 4)
    ]
    assert depths == [3, 4, 6, 3]
    assert len({name.split(".")[3] for name in shapes if name.startswith("text_encoder.encoder.layer.")}) == 12
    assert model.visual.attnpool.num_heads == 32
    assert model.text_encoder.config.num_attention_heads == entry.expect.text_heads
