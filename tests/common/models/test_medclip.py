"""The medclip family against its recipe written out: Swin by its old names, and BERT captions one at a time."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from upstream_others import (
    CAPTIONS,
    CONTEXT,
    MEDCLIP_MEAN,
    MEDCLIP_SIZE,
    MEDCLIP_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    assert_close,
    assert_far,
    assert_neighbours_do_not_matter,
    bert_ids,
    draw,
    encoded,
    find,
    gray_square,
    medclip_image,
    medclip_text,
    opened,
    pictures,
    read,
    standardised,
    write_medclip,
)

from common.errors import ModelError
from common.images import decode_rgb, fit
from common.models.architectures import read_architecture
from common.models.embed import embed_images, embed_texts, run_tower
from common.models.load import describe_model, find_spec, load_model, read_catalog
from common.models.medclip import STRAY_ENDS, SWIN_RENAMES, MedClip, to_todays_names
from common.models.spec import Geometry
from common.models.tensors import load_strictly, without

PICTURES = [*pictures(MEDCLIP_SIZE), encoded(draw(4 * MEDCLIP_SIZE, MEDCLIP_SIZE + 1, seed=7))]
"""The last is four times as wide as high: squashing shows."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_medclip(tmp_path_factory.mktemp("upstream") / "medclip")


@pytest.fixture(scope="module")
def loaded(written, tmp_path_factory):
    return load_model(find(written, tmp_path_factory.mktemp("catalogs")))


@pytest.fixture(scope="module")
def tensors(written):
    return read(written.place / "pytorch_model.bin")


def gray(data):
    """The same picture without its colours."""
    return encoded(opened(data).convert("L"))


# --- loading --------------------------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_documented_recipe(written, loaded):
    assert_close(embed_images(loaded, PICTURES), written.image(PICTURES))
    assert_close(embed_texts(loaded, CAPTIONS), written.text(CAPTIONS))


def test_neighbours_do_not_matter(loaded):
    assert_neighbours_do_not_matter(loaded, PICTURES, CAPTIONS)


def test_a_file_by_hand_loads_as_the_folder_does(written, loaded, tmp_path):
    model = load_model(find(written, tmp_path, place=written.place / "pytorch_model.bin"))
    assert model.description == loaded.description
    assert np.array_equal(embed_images(model, PICTURES), embed_images(loaded, PICTURES))


def test_the_file_has_the_old_names_and_the_old_buffers(tensors):
    """Otherwise the tests above would not show that they are renamed and dropped."""
    at = "vision_model.model.encoder.layers.0.blocks.1"
    old = ("attention.self.query.weight", "attention.self.relative_position_bias_table", "attention.output.dense.bias")
    for name in (*old, "attention.self.relative_position_index", "intermediate.dense.weight", "output.dense.weight"):
        assert f"{at}.{name}" in tensors, name
    assert not any("q_proj" in name or "mlp.fc" in name for name in tensors)
    assert "text_model.model.embeddings.position_ids" in tensors


def test_a_load_without_the_renames_fails(written, tensors):
    module = MedClip(read_architecture(written.entry["architecture"], "medclip"))
    with pytest.raises(ModelError, match=r"Missing: vision_model\.model\.encoder.*unexpected: vision_model\.model\."):
        load_strictly(module, without(tensors, suffixes=STRAY_ENDS), "the raw file")
    load_strictly(module, to_todays_names(tensors), "the renamed file")


@pytest.mark.parametrize("left_out", range(len(SWIN_RENAMES)), ids=lambda index: SWIN_RENAMES[index][1].strip("."))
def test_every_line_of_the_rename_table_is_needed(monkeypatch, written, tensors, left_out):
    module = MedClip(read_architecture(written.entry["architecture"], "medclip"))
    rest = tuple(line for number, line in enumerate(SWIN_RENAMES) if number != left_out)
    monkeypatch.setattr("common.models.medclip.SWIN_RENAMES", rest)
    with pytest.raises(ModelError, match="does not fit"):
        load_strictly(module, to_todays_names(tensors), "the file")


def test_the_renames_are_those_of_transformers_itself(written, tensors, tmp_path):
    """``SwinModel.from_pretrained`` converts old names too."""
    from transformers import SwinConfig, SwinModel

    vision = read_architecture(written.entry["architecture"], "medclip")["vision"]
    prefix = "vision_model.model."
    SwinConfig(**vision).save_pretrained(tmp_path)
    old = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    torch.save(old, tmp_path / "pytorch_model.bin")
    stock, info = SwinModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    expected = stock.state_dict()
    mine = {name.removeprefix(prefix): v for name, v in to_todays_names(tensors).items() if name.startswith(prefix)}
    assert set(mine) == set(expected)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


def test_todays_names_stay_as_they_are(tensors):
    once = to_todays_names(tensors)
    assert set(to_todays_names(once)) == set(once)
    assert not any(name.endswith(("relative_position_index", "position_ids")) for name in once)


@pytest.mark.parametrize("extra", ["vision_model.model.extra.weight", "classifier.weight"])
def test_an_unknown_extra_tensor_is_refused(tmp_path, extra):
    upstream = write_medclip(tmp_path / "medclip")
    file = upstream.place / "pytorch_model.bin"
    torch.save({**read(file), extra: torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=f"unexpected: {extra}"):
        load_model(find(upstream, tmp_path))


def test_a_missing_projection_is_refused(tmp_path):
    upstream = write_medclip(tmp_path / "medclip")
    file = upstream.place / "pytorch_model.bin"
    lost = "text_model.projection_head.weight"
    torch.save({name: value for name, value in read(file).items() if name != lost}, file)
    with pytest.raises(ModelError, match=f"Missing: {lost}"):
        load_model(find(upstream, tmp_path))


@pytest.mark.parametrize("what", ["image_heads", "text_heads", "patch_size"])
def test_another_structure_than_expected_is_refused(written, tmp_path, what):
    expect = {**written.entry["expect"], what: 12}
    with pytest.raises(ModelError, match=f"{what} is [24], expected 12"):
        load_model(find(written, tmp_path, expect=expect))


@pytest.mark.parametrize(("stored", "used"), [(math.log(1 / 0.07), 1 / 0.07), (6.0, 100.0), (-0.5, 1.0), (4.0, 54.598)])
def test_the_logit_scale_is_clamped(tmp_path, stored, used):
    model = load_model(find(write_medclip(tmp_path / "medclip", logit_scale=stored), tmp_path))
    assert model.logit_scale == pytest.approx(used, rel=1e-3)
    assert math.exp(6.0) > 400  # without the clamp


# --- pictures -------------------------------------------------------------------------------------------------------


def test_the_description_says_how_pictures_are_prepared(loaded):
    description = loaded.description
    assert description.geometry == Geometry(size=MEDCLIP_SIZE, resize="pad-square", colour="gray")
    assert description.mean == (MEDCLIP_MEAN,) * 3
    assert description.std == (MEDCLIP_STD,) * 3
    assert (description.image_dim, description.text_dim, description.context_length) == (24, 24, CONTEXT)


def test_pixels_are_one_gray_channel_on_a_black_square(loaded):
    for data in PICTURES:
        pixels = fit(decode_rgb(data), loaded.description.geometry)
        assert pixels.shape == (MEDCLIP_SIZE, MEDCLIP_SIZE, 1)
        assert np.array_equal(pixels[:, :, 0], gray_square(data, MEDCLIP_SIZE))


def test_colour_is_discarded(written, loaded):
    colours = embed_images(loaded, PICTURES)
    assert_close(embed_images(loaded, [gray(data) for data in PICTURES]), colours, atol=1e-6)

    def coloured(data):  # as a pipeline for colour pictures would, on the same square
        side = max(MEDCLIP_SIZE, *opened(data).size)
        square = Image.new("RGB", (side, side))
        square.paste(opened(data), ((side - opened(data).width) // 2, (side - opened(data).height) // 2))
        resized = square.resize((MEDCLIP_SIZE, MEDCLIP_SIZE), Image.Resampling.BICUBIC)
        return standardised(np.asarray(resized), OPENAI_MEAN, OPENAI_STD)

    for wrong in (coloured, lambda data: coloured(gray(data))):  # with colours, and with a deviation per channel
        assert_far(colours, medclip_image(written.place, PICTURES, prepare=wrong))


def test_padding_keeps_the_aspect(written, loaded):
    found = embed_images(loaded, PICTURES)

    def standard(image):
        pixels = np.asarray(image.convert("L").resize((MEDCLIP_SIZE, MEDCLIP_SIZE), Image.Resampling.BICUBIC))
        return ((torch.from_numpy(np.array(pixels)).float() / 255 - MEDCLIP_MEAN) / MEDCLIP_STD).expand(1, 3, -1, -1)

    def cropped(data):
        image = opened(data)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return standard(image.crop((left, top, left + side, top + side)))

    for wrong in (lambda data: standard(opened(data)), cropped):
        assert_far(found[-1:], medclip_image(written.place, PICTURES[-1:], prepare=wrong))
    square = [encoded(draw(MEDCLIP_SIZE + 9, MEDCLIP_SIZE + 9, seed=3))]  # nothing to pad: squashing is the same
    same = medclip_image(written.place, square, prepare=lambda data: standard(opened(data)))
    assert_close(embed_images(loaded, square), same)


def test_a_small_picture_is_not_enlarged(written, loaded):
    """The square is never smaller than the size, so a picture below it keeps its pixels."""
    small = draw(15, 10, seed=2)
    pixels = fit(small, loaded.description.geometry)[:, :, 0]
    left, top = (MEDCLIP_SIZE - 15) // 2, (MEDCLIP_SIZE - 10) // 2
    assert np.array_equal(pixels[top : top + 10, left : left + 15], np.asarray(small.convert("L")))
    assert np.count_nonzero(pixels) <= 150
    tight = Image.new("L", (15, 15))
    tight.paste(small, (0, 2))
    assert_far(embed_images(loaded, [encoded(small)]), embed_images(loaded, [encoded(tight.resize((32, 32)))]))


# --- captions -------------------------------------------------------------------------------------------------------


def test_the_length_a_caption_is_padded_to_does_not_matter(loaded):
    tokens = loaded.tokenize(["a lung", "CT", ""])
    whole = run_tower(loaded.encode_text, tokens)
    for length in (8, 20, 40):
        np.testing.assert_allclose(run_tower(loaded.encode_text, tokens[:, :length]), whole, atol=1e-6, rtol=0)


def test_pads_are_averaged_under_the_rival_recipe_alone(written, loaded, tmp_path):
    padded = load_model(find(written, tmp_path, "padded-77"))
    own = load_model(find(written, tmp_path, "own-tokens"))
    assert (padded.description.name, own.description.name) == ("medclip.padded-77", "medclip.own-tokens")
    assert own.description.identity() == loaded.description.identity()
    assert padded.description.identity() != loaded.description.identity()
    found, default = embed_texts(padded, CAPTIONS), embed_texts(loaded, CAPTIONS)
    assert_close(found, medclip_text(written.place, CAPTIONS, pad_to=CONTEXT))
    assert_close(embed_texts(own, CAPTIONS), default, atol=1e-6)
    assert_far(found[:1], default[:1])
    assert_close(found[4:5], default[4:5])  # this caption fills the context: there are no pads
    tokens = padded.tokenize(["a lung", "CT"])
    assert_far(run_tower(padded.encode_text, tokens[:, :20]), run_tower(padded.encode_text, tokens))
    assert_neighbours_do_not_matter(padded, (), CAPTIONS)
    assert np.array_equal(embed_images(padded, PICTURES), embed_images(loaded, PICTURES))


def test_what_upstream_gives_in_a_batch_depends_on_the_longest_caption(written, loaded):
    """The reason for dropping pads: alone, a caption has upstream's own vector."""
    longest = len(bert_ids(written.place, CAPTIONS[1]))
    alone, batched = written.text(["a lung"]), medclip_text(written.place, ["a lung"], pad_to=longest)
    assert_far(alone, batched)
    assert_close(embed_texts(loaded, ["a lung", CAPTIONS[1]])[:1], alone)


@pytest.mark.parametrize("layers", [(-1,), (0, 1, -1), (1, 2, 3), (0, 1, 2, 3, -1)])
def test_hidden_states_1_2_and_last_are_averaged(written, loaded, layers):
    assert_far(embed_texts(loaded, CAPTIONS), medclip_text(written.place, CAPTIONS, layers=layers))


def test_captions_are_lower_cased_in_spite_of_the_cased_vocabulary(written, loaded):
    captions = ["Chest CT of the Lung", "MRI and CT"]
    assert np.array_equal(loaded.tokenize(captions), loaded.tokenize([caption.lower() for caption in captions]))
    for caption in captions:
        ids, cased = (bert_ids(written.place, caption, lower=lower) for lower in (True, False))
        assert ids != cased
        assert loaded.tokenize([caption])[0, : len(ids)].tolist() == ids
    assert_far(embed_texts(loaded, captions), medclip_text(written.place, captions, lower=False))


def test_long_captions_are_cut_with_their_end_token(loaded):
    tokens = loaded.tokenize(list(CAPTIONS))
    assert tokens.shape == (len(CAPTIONS), CONTEXT)
    assert tokens[4, -1] == 3
    assert (tokens[0] == 0).sum() == CONTEXT - 4


# --- full size ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_published_size_has_the_documented_shapes():
    entry = read_catalog()["medclip"]
    with torch.device("meta"):
        model = MedClip(read_architecture(entry.architecture, entry.name)).eval()
        image = model.vision_model.projection_head(model.vision_model.model(torch.empty(1, 3, 224, 224)).pooler_output)
    assert image.shape == (1, entry.expect.dim) == (1, 512)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["vision_model.projection_head.weight"] == (512, 768)
    assert shapes["text_model.projection_head.weight"] == (512, 768)
    assert shapes["text_model.model.embeddings.word_embeddings.weight"] == (28996, 768)
    assert shapes["text_model.model.pooler.dense.weight"] == (768, 768)
    assert shapes["vision_model.model.embeddings.patch_embeddings.projection.weight"] == (96, 3, 4, 4)
    assert shapes["vision_model.model.layernorm.weight"] == (768,)
    tables = {shape for name, shape in shapes.items() if name.endswith("relative_position_bias_table")}
    assert tables == {(13 * 13, heads) for heads in (3, 6, 12, 24)}
    assert not any(name.endswith(STRAY_ENDS) for name in shapes)
    assert not any(name.endswith("projection_head.bias") for name in shapes)
    depths = [len(stage.blocks) for stage in model.vision_model.model.encoder.layers]
    assert depths == [2, 2, 6, 2]
    assert model.vision_model.model.config.num_heads[0] == entry.expect.image_heads
    assert model.text_model.model.config.num_attention_heads == entry.expect.text_heads


def test_the_published_architecture_is_assumed_until_an_entry_names_another(written, loaded):
    spec = find_spec(f"medclip={written.place}", read_catalog())
    assert (spec.family, spec.architecture) == ("medclip", "medclip-vit")
    description = describe_model(spec)
    assert (description.image_dim, description.geometry.size) == (512, 224)
    assert description.identity() != loaded.description.identity()


def test_a_bare_file_is_not_taken_for_another_model_that_is_published_under_the_same_name(written):
    """PLIP's file is called ``pytorch_model.bin`` too, so the user has to say which of them it is."""
    with pytest.raises(ModelError, match="Say which model it is, NAME="):
        find_spec(str(written.place / "pytorch_model.bin"), read_catalog())
