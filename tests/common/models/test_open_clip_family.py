"""BMC-CLIP, BiomedCLIP, QuiltNet, GenMedClip and PubMedCLIP's own file, in their authors' layout and numbers."""

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
from common.models.embed import embed_images, embed_texts
from common.models.load import describe_model, find_spec, load_model, load_tokenizer, read_catalog
from common.models.open_clip import architecture_config, build, inspect
from common.models.spec import Geometry

pytestmark = pytest.mark.usefixtures("no_network")

NAMES = ["bmca-clip", "biomedclip", "quiltnet-b-32", "genmedclip", "pubmedclip-original"]
NATIVE = [name for name in NAMES if name != "biomedclip"]
CAPTIONS = list(upstream.CAPTIONS)
CLOSE, FAR = 1e-4, 2e-3
"""Largest difference of unit vectors: what counts as the same recipe, and what another recipe must exceed."""

CATALOGS: dict[str, dict] = {}
"""By what the user's file states, but for the path of the architecture: reading all entries takes a while."""

pytestmark = pytest.mark.filterwarnings("ignore:.*QuickGELU mismatch.*:UserWarning")


def difference(left, right) -> float:
    return float(np.abs(np.asarray(left) - np.asarray(right)).max())


def spec_of(written, tmp_path, recipe="", **changes):
    key = json.dumps([written.name, written.entry["expect"], changes], sort_keys=True)
    if key not in CATALOGS:
        CATALOGS[key] = read_catalog(upstream.user_catalog(written, tmp_path / "mine.yaml", **changes))
    spec = find_spec(f"{written.name}{recipe}={written.place}", CATALOGS[key])
    return spec.model_copy(update={"architecture": {**written.entry, **changes}.get("architecture")})


def write(name, folder):
    return upstream.WRITERS[name](folder / name)


def rewrite(written, change):
    """Change a checkpoint in place: what the file holds -> what it shall hold."""
    file = upstream.weights_file(written)
    torch.save(change(torch.load(file, weights_only=True)), file)


def reconfigure(written, change):
    """Change the configuration of an open_clip folder in place."""
    file = written.place / "open_clip_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Each family as published, its entry and the loaded model; made once, so never to be changed."""
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
    # Pictures and captions are told apart, so that agreement means something.
    assert difference(image[0], image[1]) > FAR
    assert difference(text[0], text[1]) > FAR
    assert model.description == describe_model(spec)


@pytest.mark.parametrize("name", NAMES)
def test_the_description_says_what_the_authors_do(teacher, name):
    description = describe_model(teacher(name)[1])
    expect = teacher(name)[0].entry["expect"]
    assert description.geometry == Geometry(size=expect["image_size"])  # short side, centre crop, bicubic, RGB
    assert (description.mean, description.std) == (upstream.OPENAI_MEAN, upstream.OPENAI_STD)
    assert description.context_length == {"biomedclip": 256}.get(name, 77)
    assert (description.image_dim, description.text_dim, description.dtype) == (16, 16, "float32")


@pytest.mark.parametrize("name", NAMES)
def test_the_learned_scale_is_read(teacher, name):
    assert teacher(name)[2].logit_scale == pytest.approx(np.exp(upstream.LOG_SCALE), rel=1e-3)


@pytest.mark.parametrize("name", NATIVE)
def test_other_recipes_for_pictures_would_show(teacher, photos, name):
    written, _, model = teacher(name)
    image = embed_images(model, photos)
    tensors, size = upstream.published(upstream.weights_file(written)), written.entry["expect"]["image_size"]
    right = "quickgelu" if name == "pubmedclip-original" else "gelu"
    wrong = {"gelu": "quickgelu", "quickgelu": "gelu"}[right]
    with torch.no_grad():
        pixels = upstream.prepare(photos, size)
        assert difference(image, upstream.clip_image(tensors, pixels, right)) < CLOSE
        others = {
            "activation": upstream.clip_image(tensors, pixels, wrong),
            "heads": upstream.clip_image(tensors, pixels, right, heads=4),
            "aspect": upstream.clip_image(tensors, upstream.prepare(photos, size, resize="squash"), right),
            "filter": upstream.clip_image(tensors, upstream.prepare(photos, size, filter_name="bilinear"), right),
            "constants": upstream.clip_image(
                tensors, upstream.prepare(photos, size, upstream.IMAGENET_MEAN, upstream.IMAGENET_STD), right
            ),
        }
    assert {what: value for what, other in others.items() if (value := difference(image, other)) < FAR} == {}


@pytest.mark.parametrize("name", NATIVE)
def test_other_recipes_for_captions_would_show(teacher, name):
    written, _, model = teacher(name)
    text = embed_texts(model, CAPTIONS)
    tensors, tokens = upstream.published(upstream.weights_file(written)), upstream.clip_tokens(CAPTIONS)
    right = "quickgelu" if name == "pubmedclip-original" else "gelu"
    wrong = {"gelu": "quickgelu", "quickgelu": "gelu"}[right]
    with torch.no_grad():
        assert difference(text, upstream.clip_text(tensors, tokens, right)) < CLOSE
        assert difference(text, upstream.clip_text(tensors, tokens, wrong)) > FAR
        assert difference(text, upstream.clip_text(tensors, tokens, right, heads=1)) > FAR
        assert difference(text[:-1], upstream.clip_text(tensors, tokens[:-1], right, pool="last")) > FAR


def test_biomedclips_pads_are_masked_and_its_class_token_is_projected(teacher):
    written, _, model = teacher("biomedclip")
    tensors = upstream.published(upstream.weights_file(written))
    tokens, text = upstream.bert_tokens(CAPTIONS, written.place), embed_texts(model, CAPTIONS)
    with torch.no_grad():
        assert difference(text, upstream.bert_text(tensors, tokens, "text.")) < CLOSE
        assert difference(text, upstream.bert_text(tensors, tokens, "text.", pads="attended")) > FAR
        assert difference(text, upstream.bert_text(tensors, tokens, "text.", pool="mean")) > FAR
        # Masked pads: a caption padded to 40 instead of 256 is the same.
        shorter = upstream.bert_tokens(CAPTIONS[:-1], written.place, length=40)
        assert difference(text[:-1], unit(model.encode_text(shorter))) < 1e-5


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
    side = model.description.geometry.size
    pixels = torch.from_numpy(np.random.default_rng(3).integers(0, 255, (5, side, side, 3), np.uint8))
    tokens = torch.from_numpy(model.tokenize(CAPTIONS))
    with torch.no_grad():
        for encode, items in ((model.encode_image, pixels), (model.encode_text, tokens)):
            together = unit(encode(items))
            assert difference(together, np.concatenate([unit(encode(item[None])) for item in items])) < 1e-6
            assert difference(together, unit(encode(items.flip(0)))[::-1]) < 1e-6


# --- Token ids.


@pytest.mark.parametrize("name", NATIVE)
def test_byte_pairs_are_cut_at_the_context_with_their_end_token(teacher, name):
    written, spec, model = teacher(name)
    ids = load_tokenizer(spec)(CAPTIONS)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, upstream.clip_tokens(CAPTIONS).numpy())
    assert ids.shape[1] == 77
    assert ids[-1, -1] == upstream.EOT
    # Without the end token the caption would be pooled at some other token.
    cut = torch.from_numpy(ids[-1:].copy())
    cut[0, -1] = cut[0, -5]
    tensors = upstream.published(upstream.weights_file(written))
    right = "quickgelu" if name == "pubmedclip-original" else "gelu"
    with torch.no_grad():
        assert difference(embed_texts(model, CAPTIONS[-1:]), upstream.clip_text(tensors, cut, right)) > FAR


def test_biomedclips_word_pieces_are_lower_case_and_keep_their_end_token(teacher):
    written, spec, _ = teacher("biomedclip")
    captions = [*CAPTIONS, "Chest X-RAY of the LUNG", "lung &amp;lt; heart\n  view"]
    ids = load_tokenizer(spec)(captions)
    np.testing.assert_array_equal(ids, upstream.bert_tokens(captions, written.place).numpy())
    assert ids.shape[1] == 256
    assert ids[len(CAPTIONS) - 1, -1] == 3  # [SEP]
    np.testing.assert_array_equal(load_tokenizer(spec)(["CHEST Lung"]), load_tokenizer(spec)(["chest lung"]))


# --- Layouts.


def test_a_training_checkpoint_is_unwrapped_however_it_is_wrapped(tmp_path, teacher, photos):
    written, _, model = teacher("bmca-clip")
    image = embed_images(model, photos)
    tensors = upstream.published(written.place)
    prefixed = {f"module.{name}": value for name, value in tensors.items()}
    layouts = {
        "bare": tensors,
        "prefixed": prefixed,
        "wrapped": {"epoch": 1, "state_dict": tensors},
        "model_state_dict": {"model_state_dict": prefixed, "epoch": 1},
    }
    for layout, content in layouts.items():
        file = tmp_path / f"{layout}.pt"
        torch.save(content, file)
        loaded = load_model(spec_of(replace(written, place=file), tmp_path))
        assert difference(embed_images(loaded, photos), image) == 0, layout
    save_file(tensors, str(tmp_path / "clean.safetensors"))
    loaded = load_model(spec_of(replace(written, place=tmp_path / "clean.safetensors"), tmp_path))
    assert difference(embed_images(loaded, photos), image) == 0


def test_the_file_is_known_by_its_published_name_and_found_in_its_folder(teacher, tmp_path):
    written, spec, _ = teacher("bmca-clip")
    catalog = read_catalog(upstream.user_catalog(written, tmp_path / "mine.yaml"))
    assert find_spec(str(written.place), catalog) == spec
    there = find_spec(f"bmca-clip={written.place.parent}", catalog)
    assert describe_model(there).weights_sha256 == describe_model(spec).weights_sha256


@pytest.mark.parametrize("beside", ["optimizer", "args"])
def test_objects_in_a_checkpoint_are_not_executed(tmp_path, beside):
    import argparse

    written = write("bmca-clip", tmp_path)
    value = {"optimizer": {"lr": np.float64(1e-5)}, "args": argparse.Namespace(lr=1e-5)}[beside]
    rewrite(written, lambda content: {**content, beside: value})
    with pytest.raises(ModelError, match=r"BMC_CLIP_CF\.pt holds more than tensors .*mmkd teachers convert --trust"):
        load_model(spec_of(written, tmp_path))


def test_half_precision_is_widened(teacher, photos):
    written, _, model = teacher("pubmedclip-original")
    stored = torch.load(written.place, weights_only=True)["state_dict"]
    assert {value.dtype for value in stored.values()} == {torch.float16, torch.float32}
    loaded = model.model.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], value.float()) for name, value in stored.items())
    assert embed_images(model, photos).dtype == np.float32


def test_a_transformers_conversion_beside_the_file_is_not_taken(tmp_path, teacher, photos):
    written = write("quiltnet-b-32", tmp_path)
    torch.save({"text_model.embeddings.position_ids": torch.arange(77)}, written.place / "pytorch_model.bin")
    (written.place / "config.json").write_text('{"model_type": "clip", "vision_config": {"patch_size": 16}}')
    assert find_spec(str(written.place), {}).family == "open_clip"
    image = embed_images(load_model(spec_of(written, tmp_path)), photos)
    assert difference(image, embed_images(teacher("quiltnet-b-32")[2], photos)) == 0


def test_safetensors_serve_as_well_as_bin(tmp_path, teacher, photos):
    written = write("genmedclip", tmp_path)
    file = upstream.weights_file(written)
    save_file(torch.load(file, weights_only=True), str(file.with_suffix(".safetensors")))
    file.unlink()
    image = embed_images(load_model(spec_of(written, tmp_path)), photos)
    assert difference(image, embed_images(teacher("genmedclip")[2], photos)) == 0


def test_a_folders_own_preprocessing_is_followed(tmp_path, teacher, photos):
    written = write("genmedclip", tmp_path)
    stated = {"mean": upstream.IMAGENET_MEAN, "std": upstream.IMAGENET_STD}
    reconfigure(
        written,
        lambda config: config.update(
            preprocess_cfg={**stated, "interpolation": "bilinear", "resize_mode": "squash", "size": [64, 64]}
        ),
    )
    model = load_model(spec_of(written, tmp_path))
    pixels = upstream.prepare(photos, 64, *stated.values(), resize="squash", filter_name="bilinear")
    with torch.no_grad():
        authors = upstream.clip_image(upstream.published(upstream.weights_file(written)), pixels, "gelu")
    assert difference(embed_images(model, photos), authors) < CLOSE
    assert difference(authors, embed_images(teacher("genmedclip")[2], photos)) > FAR


def test_biomedclips_first_revisions_use_old_words(tmp_path, photos):
    written = upstream.write_biomedclip(tmp_path / "biomedclip", old_keys=True)
    with pytest.raises(TypeError):
        upstream.stock_folder(written.place)
    old = load_model(spec_of(written, tmp_path))

    def rename(config):
        text_cfg = config["model_cfg"]["text_cfg"]
        text_cfg["hf_proj_type"], text_cfg["hf_pooler_type"] = text_cfg.pop("proj"), text_cfg.pop("pooler_type")

    reconfigure(written, rename)
    assert difference(embed_images(old, photos), written.image(photos)) < CLOSE
    assert difference(embed_texts(old, CAPTIONS), written.text(CAPTIONS)) < CLOSE
    assert old.description == describe_model(spec_of(written, tmp_path))  # other words, not another model


# --- Activation.


def test_a_rival_recipe_changes_the_activation_and_the_name(teacher, photos, tmp_path):
    written, published, model = teacher("quiltnet-b-32")
    tensors = upstream.published(upstream.weights_file(written))
    pixels, tokens = upstream.prepare(photos, 96), upstream.clip_tokens(CAPTIONS)
    for activation in ("gelu", "quickgelu"):
        spec = spec_of(written, tmp_path, f"@{activation}")
        assert spec.name == f"quiltnet-b-32.{activation}"
        rival = load_model(spec)
        assert inspect(rival.model)["activation"] == activation
        assert rival.description == describe_model(spec)
        with torch.no_grad():
            # Both towers are native, so both change.
            image = upstream.clip_image(tensors, pixels, activation)
            text = upstream.clip_text(tensors, tokens, activation)
        assert difference(embed_images(rival, photos), image) < CLOSE
        assert difference(embed_texts(rival, CAPTIONS), text) < CLOSE
        apart = difference(image, embed_images(model, photos)), difference(text, embed_texts(model, CAPTIONS))
        assert max(apart) < CLOSE if activation == "gelu" else min(apart) > FAR
    rivals = [describe_model(spec_of(written, tmp_path, f"@{name}")) for name in ("gelu", "quickgelu")]
    assert rivals[0].identity() != rivals[1].identity()
    assert rivals[0].tokenizer_key == rivals[1].tokenizer_key == describe_model(published).tokenizer_key


@pytest.mark.parametrize(("stated", "configured"), [("gelu", True), ("quickgelu", False)])
def test_a_folder_of_another_activation_is_refused(tmp_path, stated, configured):
    written = write("quiltnet-b-32", tmp_path)
    reconfigure(written, lambda config: config["model_cfg"].update(quick_gelu=configured))
    load_model(spec_of(written, tmp_path))  # published facts leave it open
    expect = {**written.entry["expect"], "activation": stated}
    with pytest.raises(ModelError, match=rf"activation is \w+, expected {stated}"):
        load_model(spec_of(written, tmp_path, expect=expect))


def test_a_recipe_moves_the_expected_activation_with_it(tmp_path):
    written = write("quiltnet-b-32", tmp_path)
    expect = {**written.entry["expect"], "activation": "gelu"}
    assert load_model(spec_of(written, tmp_path, "@quickgelu", expect=expect)).description.name.endswith(".quickgelu")


def test_the_plain_architecture_for_openais_weights_is_refused(teacher, photos, tmp_path):
    written, _, model = teacher("pubmedclip-original")
    plain = json.loads((written.place.parent / "small_architecture.json").read_text())
    del plain["model_cfg"]["quick_gelu"]
    file = tmp_path / "plain.json"
    file.write_text(json.dumps(plain))
    with pytest.raises(ModelError, match="activation is gelu, expected quickgelu"):
        load_model(spec_of(written, tmp_path, architecture=str(file)))
    # It would have loaded without complaint.
    careless = load_model(spec_of(written, tmp_path, architecture=str(file), expect={}))
    assert difference(embed_images(careless, photos), embed_images(model, photos)) > FAR


def test_a_timm_tower_ignores_quick_gelu_and_is_seen_to(tmp_path, teacher, photos):
    written = write("biomedclip", tmp_path)
    reconfigure(written, lambda config: config["model_cfg"].update(quick_gelu=True))
    model = load_model(spec_of(written, tmp_path))  # although gelu is expected
    assert difference(embed_images(model, photos), written.image(photos)) < CLOSE
    assert difference(embed_images(model, photos), embed_images(teacher("biomedclip")[2], photos)) == 0
    with pytest.raises(ModelError, match="activation is gelu, expected quickgelu"):
        load_model(spec_of(written, tmp_path, expect={"activation": "quickgelu"}))


def test_constants_of_training_are_a_rival_recipe(teacher, photos, tmp_path):
    written, spec, model = teacher("pubmedclip-original")
    tensors, image = upstream.published(written.place), embed_images(model, photos)
    constants = {
        "openai-constants": (upstream.OPENAI_MEAN, upstream.OPENAI_STD),
        "imagenet-constants": (upstream.IMAGENET_MEAN, upstream.IMAGENET_STD),
    }
    for recipe, (mean, std) in constants.items():
        rival = load_model(spec_of(written, tmp_path, f"@{recipe}"))
        assert rival.description.name == f"pubmedclip-original.{recipe}"
        with torch.no_grad():
            authors = upstream.clip_image(tensors, upstream.prepare(photos, 96, mean, std), "quickgelu")
        assert difference(embed_images(rival, photos), authors) < CLOSE
        same = recipe == "openai-constants"
        assert difference(authors, image) < CLOSE if same else difference(authors, image) > FAR
        assert (rival.description.identity() == describe_model(spec).identity()) is same


# --- Heads.


@pytest.mark.parametrize("name", ["quiltnet-b-32", "genmedclip"])
def test_another_number_of_heads_changes_no_shape_and_is_refused(tmp_path, teacher, photos, name):
    written = write(name, tmp_path)
    reconfigure(written, lambda config: config["model_cfg"]["vision_cfg"].update(head_width=32))
    with pytest.raises(ModelError, match="image_heads is 4, expected 2"):
        load_model(spec_of(written, tmp_path))
    careless = load_model(spec_of(written, tmp_path, expect={}))
    assert difference(embed_images(careless, photos), embed_images(teacher(name)[2], photos)) > FAR


def test_another_number_of_text_heads_is_refused(tmp_path, teacher):
    written = write("quiltnet-b-32", tmp_path)
    reconfigure(written, lambda config: config["model_cfg"]["text_cfg"].update(heads=4))
    with pytest.raises(ModelError, match="text_heads is 4, expected 2"):
        load_model(spec_of(written, tmp_path))
    careless = load_model(spec_of(written, tmp_path, expect={}))
    assert difference(embed_texts(careless, CAPTIONS), embed_texts(teacher("quiltnet-b-32")[2], CAPTIONS)) > FAR


def test_biomedclips_text_heads_are_compared(tmp_path):
    written = write("biomedclip", tmp_path)
    text_config = written.place / "small_bert.json"
    text_config.write_text(json.dumps({**json.loads(text_config.read_text()), "num_attention_heads": 2}))
    with pytest.raises(ModelError, match="text_heads is 2, expected 4"):
        load_model(spec_of(written, tmp_path))


def test_a_text_towers_own_configuration_is_part_of_what_identifies_a_model(tmp_path):
    """As a store keeps it: the number of heads in text_config.json changes vectors but no tensor."""
    written = write("biomedclip", tmp_path)
    text_config = json.loads((written.place / "small_bert.json").read_text())
    reconfigure(written, lambda config: config["model_cfg"]["text_cfg"].update(hf_model_name="org/some-bert"))
    found = []
    for heads in (4, 2):
        stated = {**text_config, "num_attention_heads": heads}
        (written.place / "text_config.json").write_text(json.dumps(stated))
        model = load_model(spec_of(written, tmp_path, expect={}))
        found.append((embed_texts(model, CAPTIONS), model.description.identity()))
    assert difference(found[0][0], found[1][0]) > FAR
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("stated", "value"), [("dim", 512), ("image_size", 224), ("patch_size", 16), ("context_length", 256)]
)
def test_other_facts_of_the_entry_are_compared(teacher, tmp_path, stated, value):
    written = teacher("bmca-clip")[0]
    with pytest.raises(ModelError, match=rf"{stated} is \d+, expected {value}\."):
        load_model(spec_of(written, tmp_path, expect={**written.entry["expect"], stated: value}))


# --- Strictness.


def state_of(content):
    return content.get("state_dict", content)


def prefix_of(content):
    return "module." if "epoch" in content else ""


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(tmp_path, name):
    written = write(name, tmp_path)
    gone = {"biomedclip": "visual.trunk.blocks.1.mlp.fc1.bias"}.get(name, "visual.ln_post.bias")

    def change(content):
        del state_of(content)[prefix_of(content) + gone]
        return content

    rewrite(written, change)
    with pytest.raises(
        ModelError, match=rf"does not fit its architecture .*Missing: {re.escape(gone)}; unexpected: none"
    ):
        load_model(spec_of(written, tmp_path))


STRAY = {
    "bmca-clip": "text.transformer.embeddings.token_type_ids",
    "biomedclip": "text.transformer.pooler.dense.weight",
    "quiltnet-b-32": "text_model.embeddings.position_ids",
    "genmedclip": "visual.head.weight",
    "pubmedclip-original": "input_resolution",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_stray_tensor_is_named(tmp_path, name):
    written = write(name, tmp_path)

    def change(content):
        state_of(content)[prefix_of(content) + STRAY[name]] = torch.zeros(2, 2)
        return content

    rewrite(written, change)
    with pytest.raises(ModelError, match=rf"Missing: none; unexpected: {re.escape(STRAY[name])};"):
        load_model(spec_of(written, tmp_path))


def test_only_the_legacy_position_ids_are_left_out(tmp_path, teacher):
    written = teacher("biomedclip")[0]
    legacy = "text.transformer.embeddings.position_ids"
    stored = torch.load(upstream.weights_file(written), weights_only=True)
    assert stored[legacy].dtype == torch.int64
    assert legacy not in teacher("biomedclip")[2].model.state_dict()
    # Today's files lack it.
    today = write("biomedclip", tmp_path)
    rewrite(today, lambda content: {name: value for name, value in content.items() if name != legacy})
    assert difference(embed_texts(load_model(spec_of(today, tmp_path)), CAPTIONS), today.text(CAPTIONS)) < CLOSE
    rewrite(today, lambda content: {**content, "text_encoder.embeddings.position_ids": torch.arange(512)[None]})
    with pytest.raises(ModelError, match=r"unexpected: text_encoder\.embeddings\.position_ids"):
        load_model(spec_of(today, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_is_named(tmp_path, name):
    written = write(name, tmp_path)
    # For the first one the shapes would broadcast.
    changed = {"bmca-clip": "ln_final.bias", "biomedclip": "text.proj.2.weight"}.get(name, "visual.proj")

    def change(content):
        at = prefix_of(content) + changed
        state_of(content)[at] = state_of(content)[at][:1].clone()
        return content

    rewrite(written, change)
    with pytest.raises(ModelError, match=rf"of another shape: {re.escape(changed)} is \[1.*\], not \["):
        load_model(spec_of(written, tmp_path))


@pytest.mark.parametrize("name", ["quiltnet-b-32", "bmca-clip"])
def test_positions_of_another_image_size_are_refused_not_resized(tmp_path, teacher, name):
    written = teacher(name)[0]
    size, patch = (written.entry["expect"][key] for key in ("image_size", "patch_size"))
    larger = upstream.native_cfg(patch, size + 2 * patch)
    # Stock open_clip interpolates them without an error.
    open_clip.load_checkpoint(open_clip.CLIP(**larger), str(upstream.weights_file(written)))
    written = write(name, tmp_path)
    if written.place.is_dir():
        reconfigure(written, lambda config: config.update(model_cfg=larger))
    else:
        (written.place.parent / "small_architecture.json").write_text(json.dumps({"model_cfg": larger}))
    had, wants = ((side // patch) ** 2 + 1 for side in (size, size + 2 * patch))
    shapes = rf"visual\.positional_embedding is \[{had}, 128\], not \[{wants}, 128\]"
    for expect in (written.entry["expect"], {}):
        with pytest.raises(ModelError, match=rf"Missing: none; unexpected: none; of another shape: {shapes}"):
            load_model(spec_of(written, tmp_path, expect=expect))


def test_positions_of_another_context_are_refused_not_cut(tmp_path):
    written = write("genmedclip", tmp_path)
    reconfigure(written, lambda config: config["model_cfg"]["text_cfg"].update(context_length=64))
    upstream.stock_folder(written.place)  # stock open_clip resizes them
    with pytest.raises(ModelError, match=r"of another shape: positional_embedding is \[77, 32\], not \[64, 32\]"):
        load_model(spec_of(written, tmp_path, expect={}))


def test_another_models_file_is_refused(teacher, tmp_path):
    quiltnet, biomedclip = teacher("quiltnet-b-32")[0], teacher("biomedclip")[0]
    written = write("biomedclip", tmp_path)
    upstream.weights_file(written).write_bytes(upstream.weights_file(quiltnet).read_bytes())
    with pytest.raises(ModelError, match=r"Missing: text\.proj\.0\.weight, .* and \d+ more; unexpected: "):
        load_model(spec_of(written, tmp_path))
    written = write("quiltnet-b-32", tmp_path)
    upstream.weights_file(written).write_bytes(upstream.weights_file(biomedclip).read_bytes())
    with pytest.raises(ModelError, match=r"Missing: ln_final\.bias, .* and \d+ more; unexpected: text\.proj"):
        load_model(spec_of(written, tmp_path))


def test_a_torn_file_is_explained(tmp_path):
    written = write("pubmedclip-original", tmp_path)
    written.place.write_bytes(written.place.read_bytes()[:-4000])
    with pytest.raises(ModelError, match=r"PubMedCLIP_ViT32\.pth \(\d+ bytes\) is not a whole checkpoint"):
        load_model(spec_of(written, tmp_path))


# --- The full sizes, without their memory.


@pytest.mark.parametrize(
    ("name", "parameters", "text_width"),
    # The sizes of OpenAI's published models of the same shapes.
    [("bmca-clip", 427_616_513, 768), ("pubmedclip-original", 151_277_313, 512)],
)
def test_built_in_architectures_are_what_the_catalog_expects(name, parameters, text_width):
    spec = read_catalog()[name]
    with torch.device("meta"):
        model = build(architecture_config(spec)["model_cfg"])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    seen = {
        "dim": model.visual.proj.shape[1],
        "image_size": model.visual.image_size[0],
        "context_length": model.positional_embedding.shape[0],
        **inspect(model),
    }
    assert seen == spec.expect.model_dump(exclude_none=True)
    assert model.token_embedding.weight.shape == (49408, text_width)


def test_biomedclips_published_configuration_is_what_the_catalog_expects():
    config = {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": upstream.BIOMEDBERT,
            "hf_tokenizer_name": upstream.BIOMEDBERT,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    }
    with torch.device("meta"):
        model = build(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(shapes) == 351
    assert shapes["visual.head.proj.weight"] == (512, 768)
    assert "visual.head.proj.bias" not in shapes
    assert (shapes["text.proj.0.weight"], shapes["text.proj.2.weight"]) == ((640, 768), (512, 640))
    assert shapes["text.transformer.embeddings.word_embeddings.weight"] == (30522, 768)
    assert model.visual.trunk.norm.eps == 1e-6
    expect = read_catalog()["biomedclip"].expect.model_dump(exclude_none=True)
    assert {**expect, **inspect(model)} == expect
