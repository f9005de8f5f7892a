"""A model's own preprocessing, field by field: its own processor's vectors, or an error that names the field."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from upstream import unit, write_json
from upstream_others import HF_SIZE, assert_close, assert_far, opened, pictures

from common.errors import ModelError
from common.models.embed import embed_images
from common.models.hf_clip import HfClipEncoder
from common.models.load import describe_model, find_spec, load_model
from common.models.preprocessing import HARMLESS_FIELDS, OPEN_CLIP_FIELDS, PROCESSOR_FIELDS, PROCESSORS
from common.models.spec import Geometry, ModelSpec, Recipe
from common.models.timm_image import _geometry

PICTURES = pictures(HF_SIZE)
SQUARE = {"height": HF_SIZE, "width": HF_SIZE}
CROPPED = {"size": {"shortest_edge": HF_SIZE}, "crop_size": SQUARE}
BASES = {
    **dict.fromkeys(("CLIP", "ChineseCLIP", "Bit"), CROPPED),
    **{kind: {"size": SQUARE} for kind in ("Siglip", "ViT", "Blip")},
}
MEAN, STD = [0.1, 0.4, 0.7], [0.5, 0.3, 0.2]


def named(case):
    return json.dumps(case)[:60]


# --- transformers ---------------------------------------------------------------------------------------------------

FOLLOWED = [
    *[(kind, {}) for kind in PROCESSORS],
    *[(kind, {"resample": filter_}) for kind in PROCESSORS for filter_ in (2, 3)],
    *[(kind, {"image_mean": MEAN, "image_std": STD}) for kind in PROCESSORS],
    *[(kind, {"do_convert_rgb": value}) for kind in ("CLIP", "ViT") for value in (True, False, None)],
    ("CLIP", {"do_resize": True}),
    ("CLIP", {"size": HF_SIZE}),
    ("CLIP", {"size": {"shortest_edge": 41}}),
    ("CLIP", {"size": {"shortest_edge": 41, "longest_edge": None}}),
    ("CLIP", {"size": SQUARE}),
    ("CLIP", {"size": SQUARE, "do_center_crop": False}),
    ("CLIP", {"size": [HF_SIZE, HF_SIZE]}),
    ("CLIP", {"size": HF_SIZE, "default_to_square": True}),
    ("ViT", {"size": HF_SIZE}),
    ("Siglip", {"size": HF_SIZE, "default_to_square": True}),
    ("CLIP", {"crop_size": HF_SIZE}),
    ("CLIP", {"crop_size": [HF_SIZE, HF_SIZE]}),
    ("CLIP", {"size": SQUARE, "do_center_crop": None, "crop_size": None}),
    ("CLIP", {"do_pad": True, "pad_size": None}),
    ("CLIP", {"do_pad": None, "use_square_size": None}),
    ("ViT", {"default_to_square": None}),
    ("Siglip", {"do_center_crop": True, "crop_size": SQUARE}),
    ("Siglip", {"crop_size": {"height": 16, "width": 16}}),
    ("CLIP", {"do_rescale": False}),
    ("CLIP", {"do_rescale": None}),
    ("CLIP", {"rescale_factor": 1 / 127.5}),
    ("CLIP", {"do_normalize": False}),
    ("CLIP", {"do_normalize": None}),
    ("CLIP", {"do_normalize": False, "do_rescale": False}),
    ("CLIP", {"image_mean": 0.4, "image_std": 0.3}),
    ("CLIP", {"do_pad": True}),
    ("CLIP", {"do_pad": True, "pad_size": SQUARE}),
    ("CLIP", {"pad_size": {"height": 48, "width": 48}}),
    ("CLIP", {"use_square_size": False}),
]
REFUSED = [
    ("CLIP", {"do_resize": False}, "do_resize"),
    ("Siglip", {"do_resize": False}, "do_resize"),
    ("CLIP", {"do_resize": None}, "do_resize"),
    ("CLIP", {"do_center_crop": None}, "do_center_crop"),
    ("CLIP", {"crop_size": None}, "crop_size"),
    ("CLIP", {"size": None}, "size"),
    ("ViT", {"resample": None}, "resample"),
    ("CLIP", {"rescale_factor": None}, "rescale_factor"),
    ("CLIP", {"image_mean": None}, "image_mean"),
    ("CLIP", {"crop_size": {"height": 48, "width": 48}}, "crop_size"),
    ("Bit", {"crop_size": 33}, "crop_size"),
    ("CLIP", {"crop_size": {"height": 32, "width": 16}}, "crop_size"),
    ("CLIP", {"size": {"height": 40, "width": 40}}, "crop_size"),
    ("CLIP", {"size": {"height": 32, "width": 48}}, "size"),
    ("CLIP", {"size": {"shortest_edge": 32, "longest_edge": 64}}, "size"),
    ("CLIP", {"size": {"longest_edge": 32}}, "size"),
    ("CLIP", {"size": {"max_height": 32, "max_width": 32}}, "size"),
    ("Siglip", {"size": HF_SIZE}, "size"),
    ("CLIP", {"do_center_crop": False}, "do_center_crop"),
    ("ViT", {"default_to_square": False, "size": HF_SIZE}, "size"),
    ("CLIP", {"resample": 0}, "resample"),
    ("CLIP", {"resample": 1}, "resample"),
    ("CLIP", {"rescale_factor": 0.0}, "rescale_factor"),
    ("CLIP", {"image_mean": [0.5]}, "image_mean"),
    ("CLIP", {"image_std": [0.5, 0.5, 0.0]}, "image_std"),
    ("CLIP", {"do_pad": True, "pad_size": {"height": 48, "width": 48}}, "pad_size"),
    ("CLIP", {"use_square_size": True}, "use_square_size"),
    # Of other processors: each changes pixels there.
    ("CLIP", {"rescale_offset": True}, "rescale_offset"),
    ("ViT", {"do_flip_channel_order": True}, "do_flip_channel_order"),
    ("CLIP", {"crop_pct": 0.9}, "crop_pct"),
    ("CLIP", {"image_processor_type": "EfficientNetImageProcessor"}, "image_processor_type"),
    ("CLIP", {"sizes": 32}, "sizes"),
]
HARMLESS = {
    "image_processor_type": "CLIPImageProcessorFast",
    "feature_extractor_type": "CLIPFeatureExtractor",
    "processor_class": "CLIPProcessor",
    "auto_map": {"AutoImageProcessor": "mine.Processor"},
    "_valid_processor_keys": ["images", "do_resize", "size"],
    "_valid_kwargs_names": ["do_resize", "size"],
    "model_input_names": ["pixel_values"],
    "transformers_version": "5.23.0",
    "_processor_class": "CLIPProcessor",
    "_auto_class": None,
    "do_convert_rgb": True,
    "data_format": "channels_first",
    "input_data_format": None,
    "device": "cpu",
    "return_tensors": "pt",
    "disable_grouping": True,
    "use_fast": True,
    "backend": "torchvision",
    "image_seq_length": 3,
}


@pytest.fixture(scope="module")
def clip(make_hf_clip_folder):
    """A small CLIP whose processor a test may replace."""
    return make_hf_clip_folder("preprocessed", size=HF_SIZE)


@pytest.fixture(scope="module")
def stock(clip):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(clip).eval()


def state_processor(folder, kind, changes):
    stated = {"image_processor_type": f"{kind}ImageProcessor", **BASES[kind], **changes}
    write_json(folder / "preprocessor_config.json", stated)


@torch.no_grad()
def own_vectors(stock, folder, kind):
    """Those of the model behind its own processor, in the version that resizes with Pillow."""
    import transformers

    processor = getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(folder)
    rows = [processor(opened(picture), return_tensors="pt")["pixel_values"] for picture in PICTURES]
    return unit(stock.get_image_features(pixel_values=torch.cat(rows).float()).pooler_output)


@pytest.mark.parametrize(("kind", "changes"), FOLLOWED, ids=named)
def test_a_processors_field_is_followed(clip, stock, kind, changes):
    state_processor(clip, kind, changes)
    encoder = HfClipEncoder(stock, describe_model(find_spec(f"m={clip}", {})), stock.logit_scale, None)
    found, expected = embed_images(encoder, PICTURES), own_vectors(stock, clip, kind)
    assert (found * expected).sum(axis=1).min() > 1 - 1e-5
    assert_close(found, expected)


@pytest.mark.parametrize(("kind", "changes", "field"), REFUSED, ids=named)
def test_a_processors_field_that_is_not_followed_is_refused_by_name(clip, kind, changes, field):
    state_processor(clip, kind, changes)
    with pytest.raises(ModelError, match=rf"^Model 'm'.*\b{field}\b"):
        describe_model(find_spec(f"m={clip}", {}))


@pytest.mark.parametrize("field", HARMLESS_FIELDS)
def test_a_harmless_field_changes_nothing(clip, field):
    state_processor(clip, "CLIP", {})
    plain = describe_model(find_spec(f"m={clip}", {}))
    state_processor(clip, "CLIP", {field: HARMLESS[field]})
    assert describe_model(find_spec(f"m={clip}", {})) == plain


def test_every_field_of_transformers_has_its_line():
    from transformers.processing_utils import ImagesKwargs

    assert set(ImagesKwargs.__annotations__) <= {*PROCESSOR_FIELDS, *HARMLESS_FIELDS}
    assert not set(PROCESSOR_FIELDS) & set(HARMLESS_FIELDS)
    changed = {field for _, changes in FOLLOWED for field in changes}
    assert set(PROCESSOR_FIELDS) <= changed
    assert set(HARMLESS) == set(HARMLESS_FIELDS)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_a_processor_does_when_its_file_is_silent(clip, kind):
    import transformers

    processor = getattr(transformers, f"{kind}ImageProcessorPil")()
    for field, value in PROCESSORS[kind].items():
        theirs = getattr(processor, field)
        theirs = dict(theirs) if field in ("size", "crop_size") else theirs
        assert (list(theirs) if isinstance(theirs, tuple) else theirs) == value, field
    assert bool(processor.do_center_crop) == bool(PROCESSORS[kind].get("do_center_crop"))


def test_without_a_name_the_models_own_processor_is_meant(clip, stock):
    write_json(clip / "preprocessor_config.json", CROPPED)
    assert_close(embed_images(load_model(find_spec(f"m={clip}", {})), PICTURES), own_vectors(stock, clip, "CLIP"))


def test_the_torchvision_processor_gives_nearly_the_same(clip, stock):
    """transformers 5 resizes with it by default; the models were trained with Pillow."""
    from transformers import CLIPImageProcessor

    state_processor(clip, "CLIP", {"size": {"shortest_edge": 41}})
    rows = CLIPImageProcessor.from_pretrained(clip)([opened(picture) for picture in PICTURES], return_tensors="pt")
    with torch.no_grad():
        theirs = unit(stock.get_image_features(**rows).pooler_output)
    found = embed_images(load_model(find_spec(f"m={clip}", {})), PICTURES)
    assert (found * theirs).sum(axis=1).min() > 0.999


def test_a_recipe_that_states_everything_replaces_the_file(clip):
    state_processor(clip, "CLIP", {"do_resize": False, "unheard_of": 1})
    recipe = Recipe(geometry=Geometry(size=HF_SIZE, resize="squash"), mean=tuple(MEAN), std=tuple(STD))
    found = describe_model(ModelSpec(name="m", family="hf_clip", path=str(clip), recipe=recipe))
    assert (found.geometry, found.mean, found.std) == (recipe.geometry, recipe.mean, recipe.std)
    # A part of it leaves the rest to the file.
    partly = Recipe(mean=tuple(MEAN), std=tuple(STD))
    with pytest.raises(ModelError, match="unheard_of"):
        describe_model(ModelSpec(name="m", family="hf_clip", path=str(clip), recipe=partly))


def test_the_reported_folder_without_a_resize_is_refused(shared_data):
    folder = shared_data / "reports" / "case-11" / "clip_noresize"
    with pytest.raises(ModelError, match=r"preprocessor_config\.json states do_resize = False"):
        describe_model(find_spec(f"m={folder}", {}))


# --- processor_config.json ------------------------------------------------------------------------------------------


@pytest.fixture
def nested(clip, tmp_path):
    """As CLIPProcessor.save_pretrained of transformers 5 leaves it."""
    state_processor(clip, "CLIP", {"size": {"shortest_edge": 41}})
    folder = shutil.copytree(clip, tmp_path / "nested")
    inner = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    write_json(folder / "processor_config.json", {"image_processor": inner, "processor_class": "CLIPProcessor"})
    return folder


def test_a_processor_inside_processor_config_is_read(clip, nested, stock):
    plain, found = (load_model(find_spec(f"m={folder}", {})) for folder in (clip, nested))
    assert found.description.identity() == plain.description.identity()
    assert_close(embed_images(found, PICTURES), own_vectors(stock, clip, "CLIP"))


def test_the_reported_folder_saved_by_transformers_5_loads(shared_data):
    from transformers import AutoImageProcessor, AutoModel

    folder = shared_data / "reports" / "case-10" / "model"
    assert not (folder / "preprocessor_config.json").exists()
    images = [opened(picture) for picture in PICTURES]
    rows = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")
    with torch.no_grad():
        expected = unit(AutoModel.from_pretrained(folder).eval().get_image_features(**rows).pooler_output)
    assert_close(embed_images(load_model(find_spec(f"m={folder}", {})), PICTURES), expected)


def test_a_folder_with_both_files_is_read_where_they_agree_and_refused_where_not(clip, nested):
    shutil.copy(clip / "preprocessor_config.json", nested)
    plain, both = (describe_model(find_spec(f"m={folder}", {})) for folder in (clip, nested))
    assert both == plain
    state_processor(nested, "CLIP", {})
    with pytest.raises(ModelError, match=r"preprocessor_config\.json and processor_config\.json .*disagree: size"):
        describe_model(find_spec(f"m={nested}", {}))


@pytest.mark.parametrize("content", [{"processor_class": "CLIPProcessor"}, {"image_processor": None}], ids=named)
def test_a_processor_config_without_an_image_processor_says_what_to_do(nested, content):
    write_json(nested / "processor_config.json", content)
    with pytest.raises(ModelError, match=r"holds no preprocessor_config\.json, nor .* Save the model's own processor"):
        describe_model(find_spec(f"m={nested}", {}))


def test_a_store_keeps_the_file(nested, tmp_path):
    from common.models.store import FetchPlan, fetch

    fetch(FetchPlan(find_spec(f"m={nested}", {})), str(tmp_path / "store"))
    stored = describe_model(find_spec("m", {}, str(tmp_path / "store")))
    assert stored.identity() == describe_model(find_spec(f"m={nested}", {})).identity()


# --- open_clip ------------------------------------------------------------------------------------------------------

OPEN_FOLLOWED = [
    {},
    {"size": 32},
    {"size": [32, 32]},
    {"mode": "RGB"},
    {"mean": MEAN, "std": STD},
    {"mean": 0.4, "std": 0.3},
    {"interpolation": "bilinear"},
    {"interpolation": "random"},
    *[
        {"resize_mode": mode, "interpolation": name}
        for mode in ("shortest", "squash")
        for name in ("bicubic", "bilinear")
    ],
    {"resize_mode": "longest"},
    {"resize_mode": "longest", "fill_color": 0},
    {"resize_mode": "shortest", "fill_color": 128},
    {"resize_mode": "squash", "fill_color": 128},
    dict.fromkeys(OPEN_CLIP_FIELDS),
]
OPEN_REFUSED = [
    ({"size": 48}, "size"),
    ({"size": [32, 48]}, "48"),
    ({"mode": "L"}, "mode"),
    ({"mean": [0.5]}, "mean"),
    ({"std": "0.5"}, "std"),
    ({"interpolation": "nearest"}, "interpolation"),
    ({"resize_mode": "pad"}, "resize_mode"),
    ({"resize_mode": "longest", "fill_color": 128}, "fill_color"),
    ({"resize_mode": "longest", "fill_color": [1, 2, 3]}, "fill_color"),
    ({"resise_mode": "longest"}, "resise_mode"),
]


@pytest.fixture
def open_folder(make_clip_folder):
    return make_clip_folder("preprocessed-open", size=32)


def state_open(folder, changes):
    config = json.loads((folder / "open_clip_config.json").read_text())
    write_json(folder / "open_clip_config.json", {**config, "preprocess_cfg": changes})


@pytest.mark.parametrize("changes", OPEN_FOLLOWED, ids=named)
@torch.no_grad()
def test_a_field_of_open_clip_is_followed(open_folder, changes):
    import open_clip

    state_open(open_folder, changes)
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{open_folder}")
    rows = torch.stack([prepare(opened(picture)) for picture in PICTURES])
    expected = model.eval().encode_image(rows, normalize=True).numpy()
    found = embed_images(load_model(find_spec(f"m={open_folder}", {})), PICTURES)
    assert_close(found, expected)
    if changes.get("resize_mode") == "longest":
        state_open(open_folder, {})
        assert_far(found, embed_images(load_model(find_spec(f"m={open_folder}", {})), PICTURES), 1e-3)


@pytest.mark.parametrize(("changes", "field"), OPEN_REFUSED, ids=named)
def test_a_field_of_open_clip_that_is_not_followed_is_refused_by_name(open_folder, changes, field):
    state_open(open_folder, changes)
    with pytest.raises(
        ModelError, match=rf"^Model 'm'.*\b{field}\b.*open_clip_config\.json|open_clip_config\.json.*{field}"
    ):
        describe_model(find_spec(f"m={open_folder}", {}))


def test_every_field_of_open_clip_has_its_line():
    from open_clip.transform import PreprocessCfg

    assert {field.name for field in dataclasses.fields(PreprocessCfg)} == set(OPEN_CLIP_FIELDS)
    assert set(OPEN_CLIP_FIELDS) <= {field for changes in OPEN_FOLLOWED[:-1] for field in changes}


# --- timm, and recipes of one's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_mode": "border"},
        {"crop_mode": "squash", "crop_pct": 0.9},
        {"crop_pct": 1.2},
        {"interpolation": "lanczos"},
        {"input_size": (3, 32, 48)},
    ],
    ids=named,
)
def test_what_timm_does_otherwise_is_refused_by_name(changes):
    spec = ModelSpec(name="t", family="timm_image", architecture="resnet18", path="x")
    config = {"input_size": (3, 32, 32), "crop_pct": 0.875, "interpolation": "bilinear", "crop_mode": "center"}
    assert _geometry(config, spec) == Geometry(size=32, resize_to=36, interpolation="bilinear")
    with pytest.raises(ModelError, match=rf"timm's resnet18 states .*{list(changes)[-1]}"):
        _geometry({**config, **changes}, spec)


@pytest.mark.parametrize(
    "values",
    [{"resize_to": 20}, {"resize_to": 40, "resize": "squash"}, {"resize_to": 40, "resize": "longest"}],
    ids=named,
)
def test_a_resize_before_a_crop_that_would_not_be_done_is_refused(values):
    with pytest.raises(ValidationError, match="resize_to"):
        Recipe(geometry=Geometry(size=32, **values))


def test_vectors_of_the_reports_pictures_are_the_models_own(shared_data, open_folder):
    """Case 11's three pictures, padded with black."""
    import open_clip

    state_open(open_folder, {"resize_mode": "longest"})
    files = sorted((shared_data / "reports" / "case-11").glob("*.png"))
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{open_folder}")
    with torch.no_grad():
        rows = torch.stack([prepare(opened(file.read_bytes())) for file in files])
        expected = model.eval().encode_image(rows, normalize=True).numpy()
    found = embed_images(load_model(find_spec(f"m={open_folder}", {})), files)
    assert len(files) == 3
    assert np.allclose((found * expected).sum(axis=1), 1, atol=1e-5)
