"""UniMed-CLIP and MMKD-CLIP: checkpoints of a fork of open_clip, in their authors' layout and numbers."""

import json
import re
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import upstream_open_clip as upstream
from safetensors.torch import save_file
from upstream import unit

from common.errors import ModelError
from common.models import unimed
from common.models.embed import embed_images, embed_texts
from common.models.load import describe_model, find_spec, load_model, load_tokenizer, read_catalog
from common.models.open_clip import architecture_config, build, find_files, inspect
from common.models.spec import Geometry

pytestmark = pytest.mark.usefixtures("no_network")

NAMES = ["unimed-clip", "mmkd-clip"]
PACKAGED = ["unimed-clip", "mmkd-clip", "unimed-clip-l14-base", "unimed-clip-l14-large"]
CAPTIONS = list(upstream.CAPTIONS)
LEGACY = "text_encoder.transformer.embeddings.position_ids"
CLOSE, FAR = 1e-4, 2e-3
"""Largest difference of unit vectors: what counts as the same recipe, and what another recipe must exceed."""
CATALOGS: dict[str, dict] = {}
"""By what the user's file states, but for the path of the architecture: reading all entries takes a while."""


def difference(left, right) -> float:
    return float(np.abs(np.asarray(left) - np.asarray(right)).max())


def spec_of(written, tmp_path, **changes):
    key = json.dumps([written.name, written.entry["expect"], changes], sort_keys=True)
    if key not in CATALOGS:
        CATALOGS[key] = read_catalog(upstream.user_catalog(written, tmp_path / "mine.yaml", **changes))
    spec = find_spec(f"{written.name}={written.place}", CATALOGS[key])
    return spec.model_copy(update={"architecture": {**written.entry, **changes}.get("architecture")})


def write(name, folder):
    return upstream.WRITERS[name](folder / name)


def resaved(written, tensors):
    """The same teacher with other tensors in its file, bare."""
    torch.save(tensors, written.place)
    return written


def reconfigure(written, change):
    """Change a small architecture in place."""
    file = written.place.parent / "small_architecture.json"
    config = json.loads(file.read_text())
    change(config["model_cfg"])
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Each as published, its entry and the loaded model; made once, so never to be changed."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("teachers")
            written = write(name, folder)
            spec = spec_of(written, folder)
            made[name] = written, spec, load_model(spec)
        return made[name]

    return get


@pytest.fixture(scope="module")
def photos():
    return upstream.pictures()


# --- The numbers.


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_authors(teacher, photos, name):
    written, spec, model = teacher(name)
    image, text = embed_images(model, photos), embed_texts(model, CAPTIONS)
    assert (image.shape, text.shape) == ((3, upstream.DIM), (len(CAPTIONS), upstream.DIM))
    assert difference(image, written.image(photos)) < CLOSE
    assert difference(text, written.text(CAPTIONS)) < CLOSE
    assert difference(image[0], image[1]) > FAR
    assert difference(text[0], text[1]) > FAR
    assert model.description == describe_model(spec)
    assert model.logit_scale == pytest.approx(np.exp(upstream.LOG_SCALE), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_description_says_what_the_authors_do(teacher, name):
    description = describe_model(teacher(name)[1])
    assert description.family == "unimed"
    assert description.geometry == Geometry(size=64)  # short side, centre crop, bicubic, RGB
    assert (description.mean, description.std) == (upstream.OPENAI_MEAN, upstream.OPENAI_STD)
    assert (description.context_length, description.image_dim, description.text_dim) == (256, 16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_other_recipes_for_pictures_would_show(teacher, photos, name):
    written, _, model = teacher(name)
    tensors, image, right = upstream.published(written.place), embed_images(model, photos), "quickgelu"
    imagenet = upstream.prepare(photos, 64, upstream.IMAGENET_MEAN, upstream.IMAGENET_STD)
    with torch.no_grad():
        pixels = upstream.prepare(photos, 64)
        assert difference(image, upstream.clip_image(tensors, pixels, right)) < CLOSE
        others = {
            "activation": upstream.clip_image(tensors, pixels, "gelu"),
            "heads": upstream.clip_image(tensors, pixels, right, heads=4),
            "aspect": upstream.clip_image(tensors, upstream.prepare(photos, 64, resize="squash"), right),
            "filter": upstream.clip_image(tensors, upstream.prepare(photos, 64, filter_name="bilinear"), right),
            "constants": upstream.clip_image(tensors, imagenet, right),
        }
    assert {what: value for what, other in others.items() if (value := difference(image, other)) < FAR} == {}


@pytest.mark.parametrize("name", NAMES)
def test_pads_are_masked_and_the_class_token_is_projected(teacher, name):
    written, _, model = teacher(name)
    tensors, text = upstream.published(written.place), embed_texts(model, CAPTIONS)
    tokens = upstream.bert_tokens(CAPTIONS, written.place.parent)
    with torch.no_grad():
        assert difference(text, upstream.bert_text(tensors, tokens)) < CLOSE
        assert difference(text, upstream.bert_text(tensors, tokens, pads="attended")) > FAR
        assert difference(text, upstream.bert_text(tensors, tokens, pool="mean")) > FAR
        # A caption padded to 40 instead of 256 is the same, and one cut at CLIP's 77 is not.
        shorter = upstream.bert_tokens(CAPTIONS[:-1], written.place.parent, length=40)
        assert difference(text[:-1], unit(model.encode_text(shorter))) < 1e-5
        cut = upstream.bert_tokens(CAPTIONS[-1:], written.place.parent, length=77)
        assert difference(text[-1:], unit(model.encode_text(cut))) > FAR


@pytest.mark.parametrize("name", NAMES)
def test_word_pieces_are_lower_case_and_keep_their_end_token(teacher, name):
    written, spec, model = teacher(name)
    captions = [*CAPTIONS, "Chest X-RAY of the LUNG", "lung &amp;lt; heart\n  view"]
    ids = load_tokenizer(spec)(captions)
    assert (ids.dtype, ids.shape[1]) == (np.int32, 256)
    np.testing.assert_array_equal(ids, upstream.bert_tokens(captions, written.place.parent).numpy())
    np.testing.assert_array_equal(ids, model.tokenize(captions))
    assert ids[len(CAPTIONS) - 1, -1] == 3  # [SEP] of the caption that is too long
    np.testing.assert_array_equal(model.tokenize(["CHEST Lung"]), model.tokenize(["chest lung"]))


# --- One sample, one vector.


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_does_not_depend_on_the_batch(teacher, photos, name):
    _, _, model = teacher(name)
    for embed, items in ((embed_images, photos), (embed_texts, CAPTIONS)):
        together = embed(model, items)
        assert difference(together, np.concatenate([embed(model, [item]) for item in items])) < 1e-6
        assert difference(together, embed(model, items[::-1])[::-1]) < 1e-6
        assert difference(together, embed(model, [*items[1:], *items * 6, items[0]])[-1 - len(items) : -1]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_an_encoders_own_batches_do_not_matter_either(teacher, name):
    _, _, model = teacher(name)
    pixels = torch.from_numpy(np.random.default_rng(3).integers(0, 255, (5, 64, 64, 3), np.uint8))
    tokens = torch.from_numpy(model.tokenize(CAPTIONS))
    with torch.no_grad():
        for encode, items in ((model.encode_image, pixels), (model.encode_text, tokens)):
            together = unit(encode(items))
            assert difference(together, np.concatenate([unit(encode(item[None])) for item in items])) < 1e-6
            assert difference(together, unit(encode(items.flip(0)))[::-1]) < 1e-6


# --- Layouts.


def test_the_authors_files_have_the_documented_names(teacher):
    bare = torch.load(teacher("unimed-clip")[0].place, weights_only=True)
    assert {name.split(".")[0] for name in bare} == {"visual", "text_encoder", "logit_scale"}
    training = torch.load(teacher("mmkd-clip")[0].place, weights_only=True)
    assert set(training) == {"epoch", "name", "state_dict", "optimizer", "scaler"}
    assert {f"module.{name}" for name in bare} == set(training["state_dict"])


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_unwrapped_however_it_is_wrapped(tmp_path, teacher, photos, name):
    written, _, model = teacher(name)
    image, text = embed_images(model, photos), embed_texts(model, CAPTIONS)
    tensors = upstream.published(written.place)
    prefixed = {f"module.{name}": value for name, value in tensors.items()}
    stock = {name.replace("text_encoder.", "text.", 1): value for name, value in tensors.items() if name != LEGACY}
    layouts = {
        "bare": tensors,
        "prefixed": prefixed,
        "wrapped": {"epoch": 1, "state_dict": tensors},
        "training": {"epoch": 1, "name": "x", "state_dict": prefixed, "optimizer": {"state": {}}, "scaler": None},
        "no-position-ids": {name: value for name, value in tensors.items() if name != LEGACY},
        "stock": stock,  # by open_clip's names, as a store keeps an exported student
        "stock-position-ids": {**stock, "text.transformer.embeddings.position_ids": tensors[LEGACY]},
        "pooler": {**tensors, "text_encoder.transformer.pooler.dense.weight": torch.zeros(48, 48)},
    }
    for layout, content in layouts.items():
        folder = tmp_path / layout
        upstream.write_bert_vocabulary(folder)
        torch.save(content, folder / "file.pth")
        loaded = load_model(spec_of(replace(written, place=folder / "file.pth"), tmp_path))
        assert difference(embed_images(loaded, photos), image) == 0, layout
        assert difference(embed_texts(loaded, CAPTIONS), text) == 0, layout
    save_file(tensors, str(folder / "clean.safetensors"))
    loaded = load_model(spec_of(replace(written, place=folder / "clean.safetensors"), tmp_path))
    assert difference(embed_images(loaded, photos), image) == 0


def test_half_precision_is_widened(tmp_path, photos):
    written = write("unimed-clip", tmp_path)
    tensors = upstream.published(written.place)
    halved = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    resaved(written, halved)
    model = load_model(spec_of(written, tmp_path))
    assert {value.dtype for value in model.model.state_dict().values()} == {torch.float32}
    assert difference(embed_images(model, photos), written.image(photos)) < CLOSE
    assert difference(embed_texts(model, CAPTIONS), written.text(CAPTIONS)) < CLOSE


def test_the_file_is_known_by_its_published_name(teacher, tmp_path):
    for name in NAMES:
        written, spec, _ = teacher(name)
        catalog = read_catalog(upstream.user_catalog(written, tmp_path / "mine.yaml"))
        assert find_spec(str(written.place), catalog) == spec


def test_objects_in_a_checkpoint_are_not_executed(tmp_path):
    import argparse

    written = write("mmkd-clip", tmp_path)
    content = torch.load(written.place, weights_only=True)
    torch.save({**content, "args": argparse.Namespace(lr=1e-5)}, written.place)
    with pytest.raises(ModelError, match=r"MMKD_B16\.pth holds more than tensors \(argparse\.Namespace\).*--trust"):
        load_model(spec_of(written, tmp_path))


def test_a_vocabulary_is_needed_beside_the_file_and_its_absence_explained(tmp_path):
    written = write("unimed-clip", tmp_path)
    (written.place.parent / "vocab.txt").unlink()
    with pytest.raises(ModelError, match=rf"needs the tokenizer of {upstream.BIOMEDBERT}, which is not beside"):
        describe_model(spec_of(written, tmp_path))
    elsewhere = upstream.write_bert_vocabulary(tmp_path / "biomedbert")
    spec = spec_of(written, tmp_path, recipe={"tokenizer": str(elsewhere)})
    np.testing.assert_array_equal(
        load_tokenizer(spec)(CAPTIONS), upstream.bert_tokens(CAPTIONS, tmp_path / "biomedbert").numpy()
    )


# --- Activation and heads.


@pytest.mark.parametrize("configured", [False, None])
def test_an_architecture_without_quickgelu_is_refused(tmp_path, teacher, photos, configured):
    written = write("unimed-clip", tmp_path)
    reconfigure(
        written,
        lambda config: config.pop("quick_gelu") if configured is None else config.update(quick_gelu=configured),
    )
    with pytest.raises(ModelError, match="activation is gelu, expected quickgelu"):
        load_model(spec_of(written, tmp_path))
    # It would have loaded without complaint.
    careless, (_, _, right) = load_model(spec_of(written, tmp_path, expect={})), teacher("unimed-clip")
    assert difference(embed_images(careless, photos), embed_images(right, photos)) > FAR
    assert difference(embed_texts(careless, CAPTIONS), embed_texts(right, CAPTIONS)) == 0  # BERT has its own


def test_a_rival_recipe_of_the_users_changes_the_activation_and_the_name(tmp_path, teacher, photos):
    written = teacher("mmkd-clip")[0]
    file = upstream.user_catalog(written, tmp_path / "mine.yaml", recipes={"gelu": {"activation": "gelu"}})
    rival = load_model(find_spec(f"mmkd-clip@gelu={written.place}", read_catalog(file)))
    assert rival.description.name == "mmkd-clip.gelu"
    with torch.no_grad():
        authors = upstream.clip_image(upstream.published(written.place), upstream.prepare(photos, 64), "gelu")
    assert difference(embed_images(rival, photos), authors) < CLOSE
    assert difference(authors, embed_images(teacher("mmkd-clip")[2], photos)) > FAR
    assert rival.description.identity() != teacher("mmkd-clip")[2].description.identity()


def test_another_number_of_heads_changes_no_shape_and_is_refused(tmp_path, teacher, photos):
    written = write("unimed-clip", tmp_path)
    reconfigure(written, lambda config: config["vision_cfg"].update(head_width=32))
    with pytest.raises(ModelError, match="image_heads is 4, expected 2"):
        load_model(spec_of(written, tmp_path))
    careless, (_, _, right) = load_model(spec_of(written, tmp_path, expect={})), teacher("unimed-clip")
    assert difference(embed_images(careless, photos), embed_images(right, photos)) > FAR


# --- Strictness, which the fork lacks.


def test_missing_and_stray_and_misshapen_tensors_are_named_together(tmp_path):
    written = write("unimed-clip", tmp_path)
    tensors = upstream.published(written.place)
    gone = "text_encoder.transformer.encoder.layer.1.output.dense.bias"
    del tensors[gone]
    tensors["text_encoder.transformer.embeddings.token_ids"] = torch.zeros(2)
    tensors["visual.ln_post.bias"] = tensors["visual.ln_post.bias"][:1].clone()  # it would broadcast
    resaved(written, tensors)
    message = (
        r"does not fit its architecture .*Missing: text\.transformer\.encoder\.layer\.1\.output\.dense\.bias; "
        r"unexpected: text\.transformer\.embeddings\.token_ids; "
        r"of another shape: visual\.ln_post\.bias is \[1\], not \[128\]\."
    )
    with pytest.raises(ModelError, match=message):
        load_model(spec_of(written, tmp_path))


@pytest.mark.parametrize(
    "stray",
    [
        "text_encoder.proj.0.bias",
        "text_encoder.transformer.embeddings.position_idx",
        "visual.embeddings.position_ids",
        "text_decoder.transformer.embeddings.position_ids",
        "logit_bias",
    ],
)
def test_a_stray_tensor_is_refused(tmp_path, stray):
    written = write("unimed-clip", tmp_path)
    resaved(written, {**upstream.published(written.place), stray: torch.zeros(2)})
    shown = stray.replace("text_encoder.", "text.")
    with pytest.raises(ModelError, match=rf"Missing: none; unexpected: {re.escape(shown)}; of another shape: none"):
        load_model(spec_of(written, tmp_path))


def test_a_text_tower_under_both_names_is_refused(tmp_path):
    written = write("unimed-clip", tmp_path)
    tensors = upstream.published(written.place)
    resaved(written, {**tensors, "text.proj.2.weight": torch.ones_like(tensors["text_encoder.proj.2.weight"])})
    with pytest.raises(ModelError, match=r"text\.proj\.2\.weight"):
        load_model(spec_of(written, tmp_path))


def test_a_plain_clip_is_refused(tmp_path):
    """The fork would load it with strict=False and keep a random text tower."""
    written = write("unimed-clip", tmp_path)
    resaved(written, upstream.clip_tensors(upstream.Draw("a clip", 0), 16, 64))
    with pytest.raises(ModelError, match=r"Missing: text\.proj\.0\.weight, .* and \d+ more; unexpected: text\.\w+"):
        load_model(spec_of(written, tmp_path))


def test_an_image_tower_alone_is_refused(tmp_path):
    written = write("mmkd-clip", tmp_path)
    tensors = upstream.published(written.place)
    resaved(written, {name: value for name, value in tensors.items() if not name.startswith("text_encoder.")})
    with pytest.raises(ModelError, match=r"Missing: text\.proj\.0\.weight, .* and \d+ more; unexpected: none"):
        load_model(spec_of(written, tmp_path))


def test_positions_of_another_image_size_are_refused_not_resized(tmp_path):
    written = write("unimed-clip", tmp_path)
    reconfigure(written, lambda config: config["vision_cfg"].update(image_size=96))
    for expect in (written.entry["expect"], {}):
        with pytest.raises(
            ModelError, match=r"of another shape: visual\.positional_embedding is \[17, 128\], not \[37, 128\]\."
        ):
            load_model(spec_of(written, tmp_path, expect=expect))


def test_the_packaged_architecture_is_compared_with_a_small_file(tmp_path):
    """A file of other sizes does not pass for the published model."""
    written = write("mmkd-clip", tmp_path)
    message = r"\(\d+ tensors for 352\)\. Missing: .* and \d+ more; .*visual\.class_embedding is \[128\], not \[768\]"
    with pytest.raises(ModelError, match=message):
        load_model(find_spec(f"mmkd-clip={written.place}", read_catalog()))


# --- The full sizes, without their memory.


def full_size(name):
    spec = read_catalog()[name]
    config = architecture_config(spec)["model_cfg"]
    with torch.device("meta"):
        return spec, config, build(config)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_architectures_are_what_the_catalog_expects(name):
    spec, config, model = full_size(name)
    seen = {
        "dim": model.visual.proj.shape[1],
        "image_size": model.visual.image_size[0],
        "context_length": config["text_cfg"]["context_length"],
        **inspect(model),
    }
    assert seen == spec.expect.model_dump(exclude_none=True)
    assert inspect(model)["activation"] == "quickgelu"
    if name in NAMES:
        assert len(model.state_dict()) == 352
        assert round(sum(value.numel() for value in model.parameters()) / 1e6, 1) == 195.9
    assert model.text.proj[0].bias is None
    assert model.text.proj[2].bias is None


def authors_full_size(visual, bert):
    """Names and shapes of the fork's model: a stock image tower, a stock BERT as ``text_encoder``, a perceptron."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        image = open_clip.CLIP(**open_clip.get_model_config(visual)).visual
        text = BertModel(BertConfig(**bert), add_pooling_layer=False)
        width, dim = text.config.hidden_size, image.proj.shape[1]
        inner = (width + dim) // 2
        return {
            **{f"visual.{name}": value for name, value in image.state_dict().items()},
            **{f"text_encoder.transformer.{name}": value for name, value in text.state_dict().items()},
            "text_encoder.proj.0.weight": torch.empty(inner, width),
            "text_encoder.proj.2.weight": torch.empty(dim, inner),
            "logit_scale": torch.empty(()),
            LEGACY: torch.empty(1, 512),
        }


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.mark.parametrize(
    ("name", "visual", "bert", "count"),
    [
        ("unimed-clip", "ViT-B-16-quickgelu", {}, 353),
        ("mmkd-clip", "ViT-B-16-quickgelu", {}, 353),
        ("unimed-clip-l14-base", "ViT-L-14-336-quickgelu", {}, None),
        ("unimed-clip-l14-large", "ViT-L-14-336-quickgelu", LARGE, None),
    ],
)
def test_the_authors_full_size_names_become_the_models(name, visual, bert, count):
    stored = authors_full_size(visual, bert)
    if count is not None:
        assert len(stored) == count
    renamed = {key: tuple(value.shape) for key, value in unimed.to_stock_names(stored).items()}
    assert renamed == {key: tuple(value.shape) for key, value in full_size(name)[2].state_dict().items()}
    assert set(unimed.to_stock_names(stored)) != set(stored)


def test_the_perceptron_has_the_documented_sizes():
    shapes = {name: tuple(value.shape) for name, value in full_size("mmkd-clip")[2].state_dict().items()}
    assert (shapes["text.proj.0.weight"], shapes["text.proj.2.weight"]) == ((640, 768), (512, 640))
    assert shapes["visual.positional_embedding"] == (197, 768)
    assert shapes["text.transformer.embeddings.word_embeddings.weight"] == (30522, 768)


def test_the_exported_configuration_opens_in_stock_open_clip(teacher, tmp_path, photos):
    """What is written for a stock folder, with the renamed tensors, is the same model in the stock package."""
    written, spec, model = teacher("unimed-clip")
    folder = tmp_path / "stock"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": find_files(spec, weights=False).model_cfg}))
    save_file(unimed.to_stock_names(upstream.published(written.place)), str(folder / "open_clip_model.safetensors"))
    stock = upstream.stock_folder(folder)
    with torch.no_grad():
        image = unit(stock.encode_image(upstream.prepare(photos, 64)))
        text = unit(stock.encode_text(upstream.bert_tokens(CAPTIONS, written.place.parent)))
    assert difference(image, embed_images(model, photos)) < CLOSE
    assert difference(text, embed_texts(model, CAPTIONS)) < CLOSE
