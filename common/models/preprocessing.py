"""A model's own preprocessing, read from its files: each field is followed, known to change no pixel, or refused.

A field that nobody reads gives vectors that are not the model's, without a word; so what is not in these tables is an
error that names it. An entry that states ``recipe.geometry``, ``recipe.mean`` and ``recipe.std`` replaces it all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import ModelError
from common.models.files import read_model_json
from common.models.spec import OPENAI_MEAN, OPENAI_STD, Geometry, Recipe

Triple = tuple[float, float, float]
OPEN_CLIP_FIELDS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
"""Of open_clip's ``PreprocessCfg``; all are followed."""
PROCESSOR_FIELDS = (
    *("do_resize", "size", "default_to_square", "use_square_size", "resample"),
    *("do_center_crop", "crop_size", "do_pad", "pad_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
"""Of transformers' image processors; all are followed."""
HARMLESS_FIELDS = (
    # Names and lists of names. Where the processor's own code would be needed, its type is not one of PROCESSORS.
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_valid_processor_keys"),
    *("_valid_kwargs_names", "model_input_names", "transformers_version", "_processor_class", "_auto_class"),
    # Every picture is RGB here; other modes are errors in the processors that leave them as they are.
    "do_convert_rgb",
    # The form in which arrays go in and come out, where and in which groups they are computed, and with which library:
    # here always Pillow, which the models were trained with.
    *("data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "use_fast", "backend"),
    "image_seq_length",
)
_ALWAYS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_OPENAI = {"image_mean": list(OPENAI_MEAN), "image_std": list(OPENAI_STD), "resample": 3}
_CROP = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
_CLIP = {**_ALWAYS, **_OPENAI, **_CROP, "size": {"shortest_edge": 224}, "default_to_square": False}
_SQUASH = {**_ALWAYS, "size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PROCESSORS: dict[str, dict[str, Any]] = {  # type -> what it does where its file says nothing (its class attributes)
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "Bit": _CLIP,
    "Siglip": {**_SQUASH, "default_to_square": False, "resample": 3},
    "ViT": {**_SQUASH, "default_to_square": True, "resample": 2},
    "Blip": {**_ALWAYS, **_OPENAI, "size": {"height": 384, "width": 384}, "default_to_square": True},
}
OF_MODEL = {  # model_type -> the processor that transformers takes where the file names none
    "clip": "CLIP",
    "altclip": "CLIP",
    "groupvit": "CLIP",
    "metaclip_2": "CLIP",
    "chinese_clip": "ChineseCLIP",
    "siglip": "Siglip",
    "clipseg": "ViT",
    "blip": "Blip",
}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""The image processor alone, and since transformers 5 the whole processor with the image processor inside."""
_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling values, as processors store them


class Preprocessing(NamedTuple):
    """What becomes of a picture before the model sees it."""

    geometry: Geometry
    mean: Triple
    std: Triple


@dataclass(frozen=True)
class Stated:
    """Fields of a file, with what is needed to refuse one of them."""

    model: str
    where: str
    fields: dict[str, Any]

    def refused(self, name: str, why: str) -> ModelError:
        """A field that mmkd does not follow: the file, the field, its value, and what to do."""
        value = f" = {self.fields[name]!r}" if name in self.fields else ""
        return ModelError(
            f"Model {self.model!r}: {self.where} states {name}{value}, {why}. Without it the vectors would not be the "
            "model's own. If you know what it does to pictures, state recipe.geometry, recipe.mean and recipe.std in a "
            "YAML entry of your own (--catalog)."
        )


# --- open_clip --------------------------------------------------------------------------------------------------------


def of_open_clip(config: dict[str, Any], image_size: Any, recipe: Recipe, model: str, where: str) -> Preprocessing:
    """What open_clip's transform for inference does, from ``preprocess_cfg``.

    Args:
        config: ``preprocess_cfg``.
        image_size: Of the image tower; None: open_clip's default.
        recipe: What it states replaces the fields.
        model: Name for messages.
        where: File for messages.

    Raises:
        ModelError: A field is not known, or asks for something that is not followed.
    """
    # A null says nothing, as in open_clip's merge_preprocess_dict.
    stated = Stated(model, where, {name: value for name, value in config.items() if value is not None})
    replaced = recipe.geometry is not None and recipe.mean is not None and recipe.std is not None
    unknown = [name for name in stated.fields if name not in OPEN_CLIP_FIELDS]
    if unknown and not replaced:
        raise stated.refused(unknown[0], f"which open_clip does not know (known: {', '.join(OPEN_CLIP_FIELDS)})")
    return Preprocessing(
        recipe.geometry or _open_clip_geometry(stated, image_size),
        recipe.mean or _triple(stated, "mean", stated.fields.get("mean") or OPENAI_MEAN),
        recipe.std or _triple(stated, "std", stated.fields.get("std") or OPENAI_STD),
    )


def _open_clip_geometry(stated: Stated, image_size: Any) -> Geometry:
    fields = stated.fields
    if fields.get("mode", "RGB") != "RGB":
        raise stated.refused("mode", "and only RGB is served")
    tower = _open_clip_side(stated, 224 if image_size is None else image_size)
    size = _open_clip_side(stated, fields["size"]) if "size" in fields else tower
    if size != tower:
        raise stated.refused("size", f"and the image tower (vision_cfg) takes {tower}, which open_clip goes by")
    resize = fields.get("resize_mode") or "shortest"
    if resize not in ("shortest", "longest", "squash"):
        raise stated.refused("resize_mode", "which is none of shortest, longest and squash")
    # "random" is for training; open_clip takes bicubic for inference.
    stated_filter = fields.get("interpolation") or "bicubic"
    interpolation = "bicubic" if stated_filter == "random" else stated_filter
    if interpolation not in _FILTERS.values():
        raise stated.refused("interpolation", "which is neither bicubic nor bilinear")
    fill = fields.get("fill_color") or 0
    if resize == "longest" and any(fill if isinstance(fill, list | tuple) else [fill]):
        raise stated.refused("fill_color", "and with resize_mode longest pictures are padded with black (0) only")
    return Geometry(size=size, resize=resize, interpolation=interpolation)


def _open_clip_side(stated: Stated, size: Any) -> int:
    sides = list(size[-2:]) if isinstance(size, list | tuple) else [size]
    if len(set(sides)) != 1 or not _whole(sides[0]):
        raise ModelError(f"Model {stated.model!r} wants {size} pixels ({stated.where}); only squares are supported.")
    return int(sides[0])


# --- transformers -----------------------------------------------------------------------------------------------------


def of_processor(folder: Path, model_type: str, recipe: Recipe, model: str) -> Preprocessing:
    """What a transformers image processor does, in the version that resizes with Pillow.

    Args:
        folder: Of the model.
        model_type: From its ``config.json``, for files that do not name the processor.
        recipe: What it states replaces the fields.
        model: Name for messages.

    Raises:
        ModelError: There is no processor, a field is not known, or asks for something that is not followed.
    """
    if recipe.geometry is not None and recipe.mean is not None and recipe.std is not None:
        return Preprocessing(recipe.geometry, recipe.mean, recipe.std)
    stated = _with_defaults(read_processor(folder, model), model_type)
    mean, std = _constants(stated) if recipe.mean is None or recipe.std is None else (recipe.mean, recipe.std)
    return Preprocessing(recipe.geometry or _processor_geometry(stated), recipe.mean or mean, recipe.std or std)


def read_processor(folder: Path, model: str) -> Stated:
    """The fields of a folder's image processor, from whichever file holds it.

    A null is a value of its own in the fields that processors know (transformers takes it for false, or stops); in
    others it says nothing, and is left out.

    Raises:
        ModelError: Neither file holds one, or both do and disagree.
    """
    found = {}
    for name in PROCESSOR_FILES:
        if (folder / name).exists():
            whole = read_model_json(folder, name, model)
            content = whole if name == PROCESSOR_FILES[0] else whole.get("image_processor")
            if isinstance(content, dict):
                found[name] = {
                    key: value for key, value in content.items() if value is not None or key in PROCESSOR_FIELDS
                }
    if not found:
        raise ModelError(
            f"Model {model!r}: {folder} holds no {PROCESSOR_FILES[0]}, nor a {PROCESSOR_FILES[1]} with an "
            "image_processor in it. Save the model's own processor beside its weights (processor.save_pretrained), or "
            "state recipe.geometry, recipe.mean and recipe.std in a YAML entry of your own (--catalog)."
        )
    first, last = list(found)[0], list(found)[-1]
    # transformers 5 goes by the second, earlier ones by the first.
    for name in PROCESSOR_FIELDS:
        if name in found[first] and name in found[last] and found[first][name] != found[last][name]:
            raise ModelError(
                f"Model {model!r}: {first} and {last} in {folder} disagree: {name} is {found[first][name]!r} in the "
                f"first and {found[last][name]!r} in the second. Remove the one that is not the model's."
            )
    merged = {**found[last], **found[first]}
    return Stated(model, str(folder / first), merged)


def _with_defaults(stated: Stated, model_type: str) -> Stated:
    """The fields with those of the processor's class where the file says nothing.

    Raises:
        ModelError: The class or a field is not known.
    """
    named = next((key for key in ("image_processor_type", "feature_extractor_type") if key in stated.fields), None)
    if named is not None:
        kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(stated.fields[named]))
    else:
        kind = OF_MODEL.get(model_type, "")
    if kind not in PROCESSORS:
        why = f"and mmkd knows the arithmetic of {', '.join(f'{known}ImageProcessor' for known in PROCESSORS)}"
        if "auto_map" in stated.fields:
            why = f"which is its authors' own code and never run here, {why}"
        raise stated.refused(named or "no image_processor_type", why)
    for name in stated.fields:
        if name not in PROCESSOR_FIELDS and name not in HARMLESS_FIELDS:
            raise stated.refused(name, f"which is no field of {kind}ImageProcessor that mmkd knows")
    return Stated(stated.model, stated.where, {**PROCESSORS[kind], **stated.fields})


def _constants(stated: Stated) -> tuple[Triple, Triple]:
    """Mean and standard deviation of pixels between 0 and 1 that do what the processor's arithmetic does to 0..255."""
    fields = stated.fields
    mean, std = (_triple(stated, name, fields[name]) for name in ("image_mean", "image_std"))
    if not fields["do_normalize"]:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif not all(std):
        raise stated.refused("image_std", "and nothing can be divided by 0")
    factor = fields["rescale_factor"] if fields["do_rescale"] else 1.0
    if not isinstance(factor, int | float) or factor <= 0:
        raise stated.refused("rescale_factor", "which is not above 0")
    if abs(factor * 255 - 1) < 1e-6:
        return mean, std
    scale = factor * 255
    return (mean[0] / scale, mean[1] / scale, mean[2] / scale), (std[0] / scale, std[1] / scale, std[2] / scale)


def _processor_geometry(stated: Stated) -> Geometry:
    fields = stated.fields
    if not fields["do_resize"]:
        raise stated.refused("do_resize", "and only pictures that are resized become squares of one size")
    if fields.get("use_square_size"):
        raise stated.refused("use_square_size", "which mmkd does not follow")
    side, resize = _resized(stated)
    size = side
    if fields.get("do_center_crop"):
        size = _crop_side(stated)
        if size > side:
            raise stated.refused("crop_size", f"and resizes to {side} (size): the margin would have to be padded")
        if size < side and resize == "squash":
            raise stated.refused("crop_size", "and crops after a resize that ignores the aspect, which is not served")
    elif resize == "shortest":
        raise stated.refused("size", "without a crop (do_center_crop): such pictures are not squares")
    if fields.get("do_pad") and fields.get("pad_size") is not None and _square(fields["pad_size"]) != size:
        raise stated.refused("pad_size", f"and pictures of {size} pixels would have to be padded (do_pad)")
    values: dict[str, Any] = {"size": size, "resize": resize, "crop_rounding": "floor"}
    values |= {"resize_to": side if side != size else None, "interpolation": _FILTERS.get(fields["resample"])}
    if values["interpolation"] is None:
        raise ModelError(
            f"Model {stated.model!r} resamples with Pillow filter {fields['resample']} (resample in {stated.where}); "
            "only 2 (bilinear) and 3 (bicubic) are supported."
        )
    return Geometry.model_validate(values)


def _resized(stated: Stated) -> tuple[int, str]:
    """Side in pixels, and how a picture comes to it."""
    size = stated.fields["size"]
    if _whole(size) and not stated.fields["default_to_square"]:
        return int(size), "shortest"
    if isinstance(size, dict):
        sides = {name: value for name, value in size.items() if value is not None}
        if set(sides) == {"shortest_edge"} and _whole(sides["shortest_edge"]):
            return int(sides["shortest_edge"]), "shortest"
    side = _square(size)
    if side is None:
        raise stated.refused("size", "and only one shortest_edge, or an equal height and width, are followed")
    return side, "squash"


def _crop_side(stated: Stated) -> int:
    side = _square(stated.fields.get("crop_size"))
    if side is None:
        raise stated.refused("crop_size", "and only crops with an equal height and width are followed")
    return side


def _square(size: Any) -> int | None:
    """The side of a square that a processor states as a number, as two, or as height and width; None of any other."""
    if _whole(size):
        return int(size)
    if isinstance(size, dict):
        sides = {name: value for name, value in size.items() if value is not None}
        size = [sides["height"], sides["width"]] if set(sides) == {"height", "width"} else []
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1] and _whole(size[0]):
        return int(size[0])
    return None


def _triple(stated: Stated, name: str, value: Any) -> Triple:
    """One number per channel, from three or from one that stands for all."""
    values = value if isinstance(value, list | tuple) else [value] * 3
    numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in values)
    if len(values) != 3 or not numbers:
        raise stated.refused(name, "and expected are three numbers, of red, green and blue")
    return float(values[0]), float(values[1]), float(values[2])


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0
