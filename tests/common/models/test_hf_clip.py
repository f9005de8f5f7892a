"""The hf_clip family against transformers' own modules: PLIP, PubMedCLIP, and a SigLIP."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from upstream import unit, write_json
from upstream_others import (
    CAPTIONS,
    HF_CONTEXT,
    HF_SIZE,
    assert_close,
    assert_far,
    assert_neighbours_do_not_matter,
    draw,
    encoded,
    find,
    hf_clip_image,
    hf_clip_text,
    opened,
    pictures,
    read,
    scramble,
    write_byte_tokenizer,
    write_plip,
    write_pubmedclip,
)

from common.errors import ModelError
from common.models.embed import embed_images, embed_texts
from common.models.load import describe_model, find_spec, load_model, load_tokenizer, read_catalog
from common.models.spec import Geometry

PICTURES = pictures(HF_SIZE)
WRITERS = {"plip": write_plip, "pubmedclip": write_pubmedclip}
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    return {name: write(folder / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def loaded(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalogs")
    return {name: load_model(find(upstream, folder)) for name, upstream in written.items()}


@pytest.fixture
def plip_copy(written, tmp_path):
    """A PLIP whose files a test may change."""
    return shutil.copytree(written["plip"].place, tmp_path / "copy")


def change(file, **values):
    write_json(file, {**json.loads(file.read_text()), **values})


@pytest.mark.parametrize("name", WRITERS)
def test_vectors_are_those_of_the_documented_recipe(written, loaded, name):
    assert_close(embed_images(loaded[name], PICTURES), written[name].image(PICTURES))
    assert_close(embed_texts(loaded[name], CAPTIONS), written[name].text(CAPTIONS))


@pytest.mark.parametrize("name", WRITERS)
def test_neighbours_do_not_matter(loaded, name):
    assert_neighbours_do_not_matter(loaded[name], PICTURES, CAPTIONS)


def test_the_description_says_what_the_files_say(loaded):
    for model in loaded.values():
        description = model.description
        assert description.geometry == Geometry(size=HF_SIZE, crop_rounding="floor")
        assert (description.image_dim, description.text_dim, description.context_length) == (24, 24, HF_CONTEXT)
        assert {"mean": list(description.mean), "std": list(description.std)} == OPENAI
        assert model.logit_scale == pytest.approx(np.exp(4.2), rel=1e-5)


def test_old_position_buffers_are_in_the_file_and_tolerated(written, loaded):
    for name, upstream in written.items():
        stray = [key for key in read(upstream.place / "pytorch_model.bin") if key.endswith("position_ids")]
        assert len(stray) == 2
        assert loaded[name].description.image_dim == 24


@pytest.mark.parametrize("key", ["vision_model.adapter.weight", "classifier.weight"])
def test_other_left_over_tensors_are_refused(written, plip_copy, tmp_path, key):
    file = plip_copy / "pytorch_model.bin"
    torch.save({**read(file), key: torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=rf"does not fit its configuration.*unexpected: \['{key}'\]"):
        load_model(find(written["plip"], tmp_path, place=plip_copy))


def test_a_missing_tensor_is_refused(written, plip_copy, tmp_path):
    file = plip_copy / "pytorch_model.bin"
    torch.save({name: value for name, value in read(file).items() if name != "text_projection.weight"}, file)
    with pytest.raises(ModelError, match=r"Missing: \['text_projection\.weight'\]"):
        load_model(find(written["plip"], tmp_path, place=plip_copy))


def test_half_precision_files_compute_in_float32(written, loaded, plip_copy, tmp_path):
    file = plip_copy / "pytorch_model.bin"
    halves = {name: value.half() if value.is_floating_point() else value for name, value in read(file).items()}
    torch.save(halves, file)
    model = load_model(find(written["plip"], tmp_path, place=plip_copy))
    assert {value.dtype for value in model.model.parameters()} == {torch.float32}
    assert_close(embed_images(model, PICTURES), embed_images(loaded["plip"], PICTURES), atol=1e-2)


def test_another_activation_changes_the_vectors_and_is_refused(written, loaded, plip_copy, tmp_path):
    assert_far(embed_images(loaded["plip"], PICTURES), hf_clip_image(plip_copy, PICTURES, activation="gelu"), 1e-3)
    assert_far(embed_texts(loaded["plip"], CAPTIONS), hf_clip_text(plip_copy, CAPTIONS, activation="gelu"), 1e-3)
    config = json.loads((plip_copy / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "gelu"
    write_json(plip_copy / "config.json", config)
    spec = find(written["plip"], tmp_path, place=plip_copy)
    with pytest.raises(ModelError, match="activation is gelu, expected quickgelu"):
        load_model(spec)
    # Whoever says that it is right gets it.
    expect = {**written["plip"].entry["expect"], "activation": "gelu"}
    model = load_model(find(written["plip"], tmp_path, place=plip_copy, expect=expect))
    assert_close(embed_images(model, PICTURES), hf_clip_image(plip_copy, PICTURES, activation="gelu"))


@pytest.mark.parametrize(("tower", "what"), [("vision_config", "image_heads"), ("text_config", "text_heads")])
def test_another_number_of_heads_is_refused(written, plip_copy, tmp_path, tower, what):
    config = json.loads((plip_copy / "config.json").read_text())
    right = config[tower]["num_attention_heads"]
    config[tower]["num_attention_heads"] = 2 * right
    write_json(plip_copy / "config.json", config)
    with pytest.raises(ModelError, match=f"{what} is {2 * right}, expected {right}"):
        load_model(find(written["plip"], tmp_path, place=plip_copy))


def test_the_crop_is_rounded_as_transformers_does_unless_a_recipe_says_otherwise(written, loaded, tmp_path):
    """The first picture leaves a margin of 3: 1 pixel to the left by floor, 2 by rounding half to even."""
    upstream = written["plip"]
    default = embed_images(loaded["plip"], PICTURES)
    rounded = load_model(find(upstream, tmp_path, "crop-round"))
    floored = load_model(find(upstream, tmp_path, "crop-floor"))
    assert (rounded.description.name, floored.description.name) == ("plip.crop-round", "plip.crop-floor")
    assert_close(embed_images(floored, PICTURES), default, atol=1e-6)
    moved = embed_images(rounded, PICTURES)
    assert_far(moved[:1], default[:1])
    # One pixel further left is what the stock processor gives for a picture without its first column.
    shifted = opened(PICTURES[0]).resize((HF_SIZE + 3, HF_SIZE), Image.Resampling.BICUBIC)
    shifted = shifted.crop((2, 0, HF_SIZE + 2, HF_SIZE))
    assert_close(moved[:1], upstream.image([encoded(shifted)]))
    assert floored.description.identity() == loaded["plip"].description.identity()
    assert rounded.description.identity() != loaded["plip"].description.identity()


def test_an_even_margin_is_the_same_under_both_roundings(written, loaded, tmp_path):
    even = [encoded(draw(2 * HF_SIZE + 8, 2 * HF_SIZE, seed=5))]
    rounded = load_model(find(written["plip"], tmp_path, "crop-round"))
    assert_close(embed_images(rounded, even), embed_images(loaded["plip"], even), atol=1e-6)


def test_constants_of_a_recipe_replace_the_processors(written, loaded, tmp_path):
    upstream = written["pubmedclip"]
    same = load_model(find(upstream, tmp_path, "openai-constants"))
    other = load_model(find(upstream, tmp_path, "imagenet-constants"))
    default = embed_images(loaded["pubmedclip"], PICTURES)
    assert_close(embed_images(same, PICTURES), default, atol=1e-6)
    found = embed_images(other, PICTURES)
    assert_far(found, default, 1e-3)
    change(
        upstream.place / "preprocessor_config.json", image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    try:
        assert_close(found, upstream.image(PICTURES))
    finally:
        change(upstream.place / "preprocessor_config.json", image_mean=OPENAI["mean"], image_std=OPENAI["std"])


def test_long_captions_keep_their_end_token(written, loaded):
    tokens = loaded["plip"].tokenize([CAPTIONS[4], "a lung"])
    assert tokens.shape == (2, HF_CONTEXT)
    assert tokens.dtype == np.int32
    assert tokens[0, -1] == 257
    assert 257 not in tokens[0, :-1]
    cut = hf_clip_text(written["plip"].place, [CAPTIONS[4]], keep_end=False)
    assert_far(embed_texts(loaded["plip"], [CAPTIONS[4]]), cut)


def test_workers_get_the_same_token_ids_without_the_weights(written, loaded, plip_copy, tmp_path):
    (plip_copy / "pytorch_model.bin").unlink()
    tokenize = load_tokenizer(find(written["plip"], tmp_path, place=plip_copy))
    assert np.array_equal(tokenize(list(CAPTIONS)), loaded["plip"].tokenize(list(CAPTIONS)))


def test_a_single_file_is_refused_with_what_to_give_instead(written, tmp_path):
    file = written["plip"].place / "pytorch_model.bin"
    spec = find_spec(f"plip={file}", read_catalog())
    for ask in (load_model, describe_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"is a single file, .* needs its folder .* Give the folder\."):
            ask(spec)


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json"])
def test_a_folder_without_its_configuration_is_refused(written, plip_copy, tmp_path, missing):
    (plip_copy / missing).unlink()
    with pytest.raises(ModelError, match=f"holds no {missing}"):
        describe_model(find(written["plip"], tmp_path, place=plip_copy))


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"<html>not found</html>"],
    ids=["empty", "pointer", "page"],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_what_is_no_checkpoint_is_refused_with_the_models_name(written, plip_copy, tmp_path, name, content):
    (plip_copy / "pytorch_model.bin").unlink()
    (plip_copy / name).write_bytes(content)
    with pytest.raises(ModelError, match="Model 'plip'"):
        load_model(find(written["plip"], tmp_path, place=plip_copy))


def test_a_torn_download_is_refused(written, plip_copy, tmp_path):
    file = plip_copy / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match="Model 'plip'"):
        load_model(find(written["plip"], tmp_path, place=plip_copy))


def test_python_objects_in_the_file_are_refused(written, plip_copy, tmp_path):
    file = plip_copy / "pytorch_model.bin"
    torch.save({**read(file), "best": np.float64(0.5)}, file)
    with pytest.raises(ModelError, match="Model 'plip'"):
        load_model(find(written["plip"], tmp_path, place=plip_copy))


def test_a_processor_that_resizes_beyond_the_crop_is_followed(written, plip_copy, tmp_path):
    change(plip_copy / "preprocessor_config.json", size={"shortest_edge": 41})
    model = load_model(find(written["plip"], tmp_path, place=plip_copy))
    found = embed_images(model, PICTURES)
    assert_close(found, hf_clip_image(plip_copy, PICTURES))
    assert_far(found, written["plip"].image(PICTURES))


def test_a_bilinear_processor_is_followed(written, plip_copy, tmp_path):
    change(plip_copy / "preprocessor_config.json", resample=2)
    model = load_model(find(written["plip"], tmp_path, place=plip_copy))
    found = embed_images(model, PICTURES)
    assert_close(found, hf_clip_image(plip_copy, PICTURES))
    assert_far(found, written["plip"].image(PICTURES), 1e-3)


def test_a_filter_that_is_not_served_is_refused(written, plip_copy, tmp_path):
    change(plip_copy / "preprocessor_config.json", resample=0)
    with pytest.raises(ModelError, match="resamples with Pillow filter 0"):
        describe_model(find(written["plip"], tmp_path, place=plip_copy))


@pytest.mark.parametrize(
    "setting",
    [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}],
    ids=lambda s: next(iter(s)),
)
def test_a_processor_with_other_arithmetic_is_followed_or_refused(written, plip_copy, tmp_path, setting):
    change(plip_copy / "preprocessor_config.json", **setting)
    expected = hf_clip_image(plip_copy, PICTURES)
    assert_far(expected, written["plip"].image(PICTURES))
    try:
        model = load_model(find(written["plip"], tmp_path, place=plip_copy))
    except ModelError:
        return
    assert_close(embed_images(model, PICTURES), expected)


# --- SigLIP ---------------------------------------------------------------------------------------------------------

SIGLIP_PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": HF_SIZE, "width": HF_SIZE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A small SigLIP folder as ``save_pretrained`` writes it."""
    from transformers import SiglipConfig, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    words = write_byte_tokenizer(folder, HF_CONTEXT)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": words, "max_position_embeddings": HF_CONTEXT, "projection_size": 32}
    text |= {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    vision = {**tower, "image_size": HF_SIZE, "patch_size": 16}
    scramble(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), seed=3).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", SIGLIP_PROCESSOR)
    return folder


@torch.no_grad()
def test_a_siglip_gives_the_numbers_of_stock_transformers(siglip):
    from tokenizers import Tokenizer
    from transformers import SiglipImageProcessorPil, SiglipModel

    spec = find_spec(str(siglip), {})
    assert spec.family == "hf_clip"
    model, stock = load_model(spec), SiglipModel.from_pretrained(siglip).eval()
    assert model.description.geometry == Geometry(size=HF_SIZE, resize="squash", crop_rounding="floor")
    inputs = SiglipImageProcessorPil.from_pretrained(siglip)([opened(data) for data in PICTURES], return_tensors="pt")
    expected = stock.get_image_features(**inputs)
    assert_close(embed_images(model, PICTURES), unit(getattr(expected, "pooler_output", expected)))
    # SigLIP was trained with pads attended to, and takes the last position, which is a pad: the length matters.
    tokenizer = Tokenizer.from_file(str(siglip / "tokenizer.json"))
    tokenizer.enable_truncation(HF_CONTEXT)
    rows = {}
    for length in (HF_CONTEXT, HF_CONTEXT - 1):
        tokenizer.enable_padding(pad_id=257, pad_token="<end>", length=length)
        out = stock.get_text_features(input_ids=torch.tensor([e.ids for e in tokenizer.encode_batch(["a lung", "CT"])]))
        rows[length] = unit(getattr(out, "pooler_output", out))
    found = embed_texts(model, ["a lung", "CT"])
    assert_close(found, rows[HF_CONTEXT])
    assert_far(found, rows[HF_CONTEXT - 1])
    assert_neighbours_do_not_matter(model, PICTURES, CAPTIONS)


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}


@pytest.mark.parametrize("stated", [{}, SO400M], ids=["base", "so400m"])
def test_a_configuration_that_leaves_defaults_out_is_understood(tmp_path, stated):
    """As google/siglip-base-patch16-224 and google/siglip-so400m-patch14-384 state their text towers."""
    from transformers import SiglipConfig

    words = {"architectures": ["SiglipModel"], "model_type": "siglip", "initializer_factor": 1.0}
    towers = {f"{name}_config": {"model_type": f"siglip_{name}_model", **stated} for name in ("text", "vision")}
    write_json(tmp_path / "config.json", {**words, **towers})
    write_json(tmp_path / "preprocessor_config.json", {**SIGLIP_PROCESSOR, "size": {"height": 224, "width": 224}})
    write_byte_tokenizer(tmp_path, 64)
    (tmp_path / "model.safetensors").write_bytes(b"not read by describe")
    meant = SiglipConfig.from_pretrained(tmp_path).text_config
    assert (meant.projection_size, meant.max_position_embeddings) == (stated.get("hidden_size", 768), 64)
    description = describe_model(find_spec(str(tmp_path), {}))
    assert (description.image_dim, description.text_dim) == (meant.projection_size, meant.projection_size)
    assert description.context_length == 64


def test_a_model_without_text_features_is_refused(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=HF_SIZE, patch_size=16, projection_dim=24)
    CLIPVisionModel(config).save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path, HF_CONTEXT)
    write_json(tmp_path / "preprocessor_config.json", {**SIGLIP_PROCESSOR, "size": {"height": 32, "width": 32}})
    with pytest.raises(ModelError, match="CLIPVisionModel, which has no image and text features"):
        load_model(find_spec(f"tower={tmp_path}", {}))
