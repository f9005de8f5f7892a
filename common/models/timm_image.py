"""The timm_image family: image-only encoders of timm, such as LVM-Med's; their text columns are null everywhere."""

from __future__ import annotations

from typing import Any

import torch

from common.config import fingerprint
from common.errors import ModelError
from common.models.dual_encoder import Tokenize
from common.models.encoder import Encoder
from common.models.expect import check_expectation
from common.models.files import locate, weights_sha256
from common.models.spec import Geometry, ModelDescription, ModelSpec
from common.models.tensors import Tensors, load_strictly, read_tensors, renamed

PREFERRED = ("model.safetensors", "pytorch_model.bin")


def describe(spec: ModelSpec) -> ModelDescription:
    """Sizes and constants as the recipe or else timm states them, and the checkpoint's hash."""
    weights = locate(spec).weights(PREFERRED, spec.name)
    with torch.device("meta"):
        model = build(spec)
    geometry = spec.recipe.geometry or _geometry(model.pretrained_cfg, spec)
    shapes = sorted((name, list(value.shape)) for name, value in model.state_dict().items())
    return ModelDescription(
        name=spec.name,
        family="timm_image",
        weights_sha256=weights_sha256(weights, spec.name),
        architecture=f"timm:{spec.architecture}:{fingerprint(shapes)}",
        geometry=geometry,
        mean=spec.recipe.mean or tuple(model.pretrained_cfg["mean"]),
        std=spec.recipe.std or tuple(model.pretrained_cfg["std"]),
        tokenizer_sha256=None,
        context_length=None,
        image_dim=_width(model, geometry.size),
        text_dim=None,
        dtype=spec.recipe.dtype,
    )


def build(spec: ModelSpec) -> Any:
    """The timm model without its classifier, with random weights.

    Raises:
        ModelError: timm knows no such architecture.
    """
    import timm

    if spec.architecture is None or not timm.is_model(spec.architecture):
        close = timm.list_models(f"*{(spec.architecture or 'resnet50')[:8]}*")[:6]
        raise ModelError(
            f"Model {spec.name!r}: timm knows no architecture {spec.architecture!r}. State architecture: in the "
            f"catalog YAML{', such as ' + ', '.join(close) if close else ''}."
        )
    return timm.create_model(spec.architecture, pretrained=False, num_classes=0)


def _width(model: Any, size: int) -> int:
    """Width of what comes out, found by a forward without numbers: necks and pools make it differ from num_features."""
    with torch.inference_mode():
        return int(model.eval()(torch.empty(1, 3, size, size, device="meta")).shape[-1])


def _geometry(config: dict[str, Any], spec: ModelSpec) -> Geometry:
    """What timm's transform for inference does.

    Raises:
        ModelError: It does something that is not served.
    """
    size, share = config["input_size"][-1], float(config.get("crop_pct") or 1)
    mode, filter_name = config.get("crop_mode") or "center", config.get("interpolation") or "bicubic"
    wrong = {
        "input_size": len(set(config["input_size"][1:])) != 1,  # not a square
        "interpolation": filter_name not in ("bicubic", "bilinear"),
        "crop_mode": mode not in ("center", "squash"),  # timm pads the borders
        "crop_pct": share > 1 or (share < 1 and mode == "squash"),  # timm pads, or crops what it has squashed
    }
    refused = [f"{name} = {config.get(name)!r}" for name, is_wrong in wrong.items() if is_wrong]
    if refused:
        raise ModelError(
            f"Model {spec.name!r}: timm's {spec.architecture} states {', '.join(refused)}, which mmkd does not follow. "
            "State recipe.geometry in a YAML entry of your own (--catalog)."
        )
    if mode == "squash":
        return Geometry.model_validate({"size": size, "resize": "squash", "interpolation": filter_name})
    resize_to = int(size / share) if share < 1 else None
    return Geometry.model_validate({"size": size, "resize_to": resize_to, "interpolation": filter_name})


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """There is none.

    Raises:
        ModelError: Always.
    """
    raise ModelError(f"Model {spec.name!r} is an image encoder without a text tower; it has no tokenizer.")


def load(spec: ModelSpec) -> TimmImageEncoder:
    """Load strictly, but for the classifier that the embedding does not pass through.

    Raises:
        ModelError: The checkpoint does not fit.
    """
    weights = locate(spec).weights(PREFERRED, spec.name)
    model = build(spec)
    tensors = to_timm_names(model, read_tensors(weights, spec.name))
    load_strictly(model, tensors, f"Model {spec.name!r}: {weights}")
    description = describe(spec)
    check_expectation(spec, description, {})
    return TimmImageEncoder(model, description, None, None)


def to_timm_names(model: Any, tensors: Tensors) -> Tensors:
    """Without the classifier, and with Segment Anything's names for its encoder's layers replaced by timm's."""
    if any(name.startswith("image_encoder.") for name in tensors):
        tensors = renamed(tensors, "image_encoder.")
    found = {name.replace(".mlp.lin", ".mlp.fc"): value for name, value in tensors.items()}
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    present = set(model.state_dict())
    return {
        name: value
        for name, value in found.items()
        if name in present or not name.startswith(tuple(f"{head}." for head in heads))
    }


class TimmImageEncoder(Encoder):
    """An image tower alone."""

    def image_features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Standardised pixels -> [B, D], as timm pools them."""
        features_BD: torch.Tensor = self.model(pixels_BCHW)
        return features_BD

    def text_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """There is no text tower; ``encode_text`` has said so before."""
        raise AssertionError("an image encoder was asked for text features")
