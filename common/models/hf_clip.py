"""The hf_clip family: transformers models with ``get_image_features`` and ``get_text_features`` (CLIP, SigLIP, ...)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import fingerprint
from common.errors import ModelError
from common.models.dual_encoder import Tokenize
from common.models.files import file_sha256, find_weights, local_copy, read_model_json, tokenizer_sha256
from common.models.spec import Geometry, ModelDescription, ModelSpec

PREFERRED = ("model.safetensors", "pytorch_model.bin")
_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling values, as processors store them


def describe(spec: ModelSpec) -> ModelDescription:
    """Read geometry, constants and sizes from the model's JSON files, and hash the checkpoint."""
    folder = local_copy(spec)
    config = read_model_json(folder, "config.json", spec.name)
    processor = read_model_json(folder, "preprocessor_config.json", spec.name)
    text_config = config.get("text_config") or {}
    dim = config.get("projection_dim") or text_config.get("projection_size") or text_config.get("hidden_size")
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if dim is None or mean is None or std is None:
        raise ModelError(
            f"Model {spec.name!r}: {folder} does not state its width (projection_dim) or its image_mean and image_std; "
            "it may not be a CLIP-like model. Only models with get_image_features and get_text_features are served."
        )
    return ModelDescription(
        name=spec.name,
        family="hf_clip",
        weights_sha256=file_sha256(find_weights(folder, PREFERRED, spec.name)),
        architecture=f"{config.get('model_type')}:{fingerprint(config)}",
        geometry=spec.geometry or _geometry(processor, spec.name),
        mean=spec.mean or tuple(mean),
        std=spec.std or tuple(std),
        tokenizer_sha256=tokenizer_sha256(folder, "max_length"),
        # transformers' CLIP text default, for configurations that leave it out
        context_length=int(text_config.get("max_position_embeddings", 77)),
        image_dim=int(dim),
        text_dim=int(dim),
        dtype=spec.dtype,
    )


def _geometry(processor: dict[str, Any], name: str) -> Geometry:
    size, crop = processor.get("size", 224), processor.get("crop_size")
    resize, side = "shortest", size
    if isinstance(size, dict):
        side = size.get("shortest_edge") or size.get("height")
        resize = "shortest" if "shortest_edge" in size else "squash"
    if processor.get("do_center_crop", crop is not None) and crop is not None:
        target = crop["height"] if isinstance(crop, dict) else crop
        if target != side:
            raise ModelError(
                f"Model {name!r} resizes to {side} and crops to {target}; only equal sizes are supported. "
                "State a geometry for it in the catalog YAML."
            )
    filter_name = _FILTERS.get(processor.get("resample", 3))
    if filter_name is None:
        raise ModelError(f"Model {name!r} resamples with Pillow filter {processor.get('resample')}; not supported.")
    values = {"size": side, "resize": resize, "interpolation": filter_name, "crop_rounding": "floor"}
    return Geometry.model_validate(values)


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """The model's own tokenizer, padded and cut to the context length (the end-of-text token is kept)."""
    from transformers import AutoTokenizer

    folder, length = local_copy(spec), describe(spec).context_length
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenize(captions: list[str]) -> np.ndarray:
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=length).input_ids
        return np.asarray(ids, dtype=np.int32)

    return tokenize


def load(spec: ModelSpec) -> HfClipEncoder:
    """Load strictly on the CPU in eval mode.

    Raises:
        ModelError: Tensors are missing or left over, or the model lacks one of the two towers.
    """
    from transformers import AutoModel

    folder = local_copy(spec)
    try:
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"Model {spec.name!r}: {folder} does not load: {str(error)[:600]}") from error
    # Buffers that transformers stopped saving; files written before then still hold them.
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
    if info["missing_keys"] or unexpected or info["mismatched_keys"]:
        raise ModelError(
            f"Model {spec.name!r}: the checkpoint in {folder} does not fit its configuration. "
            f"Missing: {sorted(info['missing_keys'])[:5]}; unexpected: {sorted(unexpected)[:5]}; "
            f"of another shape: {sorted(info['mismatched_keys'])[:5]}."
        )
    if not (
        callable(getattr(model, "get_image_features", None)) and callable(getattr(model, "get_text_features", None))
    ):
        raise ModelError(f"Model {spec.name!r} is a {type(model).__name__}, which has no image and text features.")
    return HfClipEncoder(model, describe(spec), _pad_id(folder))


def _pad_id(folder: Path) -> int | None:
    """Id of the padding token when pads must be masked: not for CLIP, whose pad is its end token or a word."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    causal = tokenizer.pad_token_id == tokenizer.eos_token_id or tokenizer.sep_token_id is None
    return None if causal else tokenizer.pad_token_id


class HfClipEncoder:
    """A dual encoder around a transformers model. B = batch, L = context length, D = width."""

    def __init__(self, model: Any, description: ModelDescription, pad_id: int | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.description = description
        self.pad_id = pad_id
        self.logit_scale = float(self.model.logit_scale.detach().exp().mean())
        self._mean = torch.tensor(description.mean).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(description.std).view(1, 3, 1, 1) * 255

    def to(self, device: str) -> HfClipEncoder:
        """Move the weights and the constants to a device and return self."""
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def encode_image(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Uint8 [B, H, W, 3] -> float32 [B, D], not normalised."""
        pixels_BCHW = (pixels_BHWC.permute(0, 3, 1, 2).float() - self._mean) / self._std
        return _tensor(self.model.get_image_features(pixel_values=pixels_BCHW))

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L] -> float32 [B, D], not normalised."""
        tokens_BL = tokens_BL.long()
        mask_BL = None if self.pad_id is None else (tokens_BL != self.pad_id).long()
        return _tensor(self.model.get_text_features(input_ids=tokens_BL, attention_mask=mask_BL))


def _tensor(output: Any) -> torch.Tensor:
    """The projected features: transformers 4 returns the tensor, transformers 5 an object that holds it."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features.float()
