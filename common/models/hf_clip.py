"""The hf_clip family: transformers models with ``get_image_features`` and ``get_text_features`` (CLIP, SigLIP, ...)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import fingerprint
from common.errors import ModelError
from common.models.dual_encoder import Tokenize
from common.models.encoder import Encoder
from common.models.expect import activation_of, check_expectation
from common.models.files import (
    ModelFiles,
    check_readable,
    checkpoint_files,
    locate,
    needs_own_code,
    read_model_json,
    tokenizer_folder,
    tokenizer_sha256,
    weights_sha256,
)
from common.models.preprocessing import of_processor
from common.models.spec import ModelDescription, ModelSpec
from common.models.tensors import explain_unreadable
from common.models.tokenizing import check_tokenizer_code, padded, pretrained_tokenizer

if TYPE_CHECKING:
    import torch

PREFERRED = ("model.safetensors", "pytorch_model.bin")


def describe(spec: ModelSpec) -> ModelDescription:
    """Read geometry, constants and sizes from the model's JSON files, and hash the checkpoint."""
    files = _folder(spec)
    folder = files.folder
    config = read_model_json(folder, "config.json", spec.name)
    dim = _dim(spec, folder)
    if dim is None:
        raise ModelError(
            f"Model {spec.name!r}: {folder} does not state its width (projection_dim); it may not be a CLIP-like "
            "model. Only models with get_image_features and get_text_features are served."
        )
    pixels = of_processor(folder, str(config.get("model_type")), spec.recipe, spec.name)
    tokenizer = tokenizer_folder(spec, files)
    check_tokenizer_code(tokenizer, spec.name)
    return ModelDescription(
        name=spec.name,
        family="hf_clip",
        weights_sha256=weights_sha256(files.weights(PREFERRED, spec.name), spec.name),
        architecture=f"{config.get('model_type')}:{fingerprint(config)}",
        geometry=pixels.geometry,
        mean=pixels.mean,
        std=pixels.std,
        tokenizer_sha256=tokenizer_sha256(tokenizer, spec.name, "max_length"),
        context_length=_context_length(spec, folder),
        image_dim=int(dim),
        text_dim=int(dim),
        dtype=spec.recipe.dtype,
    )


def _folder(spec: ModelSpec, weights: bool = True) -> ModelFiles:
    """The model's folder; a single file says too little to build a transformers model from.

    Raises:
        ModelError: A file was named.
    """
    files = locate(spec, weights)
    if files.file is not None:
        raise ModelError(
            f"Model {spec.name!r}: {files.file} is a single file, and a transformers model needs its folder with "
            "config.json, preprocessor_config.json and the tokenizer. Give the folder."
        )
    return files


def _full_config(spec: ModelSpec, folder: Path) -> Any:
    """The configuration with the defaults of its model type: published files leave out what equals them.

    Raises:
        ModelError: transformers does not know the model type.
    """
    from transformers import AutoConfig

    stated = read_model_json(folder, "config.json", spec.name)  # says clearly when it is missing or torn
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "auto_map" in stated and isinstance(error, ValueError):
            raise needs_own_code(folder / "config.json", spec.name) from error
        raise ModelError(f"Model {spec.name!r}: transformers cannot read {folder}/config.json: {error}") from error


def _dim(spec: ModelSpec, folder: Path) -> int | None:
    config = _full_config(spec, folder)
    text = getattr(config, "text_config", None)
    # CLIP states the common width itself; SigLIP's text tower does, or has no projection.
    found = (getattr(config, "projection_dim", None), getattr(text, "projection_size", None))
    return next((width for width in (*found, getattr(text, "hidden_size", None)) if width), None)


def _context_length(spec: ModelSpec, folder: Path) -> int:
    text = getattr(_full_config(spec, folder), "text_config", None)
    return spec.recipe.context_length or int(getattr(text, "max_position_embeddings", 77))


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """The model's own tokenizer, padded and cut to the context length (the end-of-text token is kept)."""
    files = _folder(spec, weights=False)
    return padded(pretrained_tokenizer(tokenizer_folder(spec, files)), _context_length(spec, files.folder))


def load(spec: ModelSpec) -> HfClipEncoder:
    """Load strictly on the CPU in eval mode.

    Raises:
        ModelError: Tensors are missing or left over, or the model lacks one of the two towers.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel

    files = _folder(spec)
    folder = files.folder
    _full_config(spec, folder)  # says what is wrong with it in mmkd's words
    weights = files.weights(PREFERRED, spec.name)
    for file in checkpoint_files(weights, spec.name):
        check_readable(file, spec.name)
    settings = {"dtype": torch.float32, "trust_remote_code": False}
    try:
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **settings)
    except (pickle.UnpicklingError, EOFError, SafetensorError) as error:
        raise explain_unreadable(weights, spec.name, error) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise needs_own_code(folder, spec.name) from error
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
    description = describe(spec)
    check_expectation(spec, description, inspect(model))
    encoder = HfClipEncoder(model, description, model.logit_scale, lambda: load_tokenizer(spec))
    encoder.pad_id = _pad_id(tokenizer_folder(spec, files))
    return encoder


def inspect(model: Any) -> dict[str, Any]:
    """What the towers are like inside, by the names of ``Expectation``."""
    found: dict[str, Any] = {}
    vision, text = getattr(model.config, "vision_config", None), getattr(model.config, "text_config", None)
    if vision is not None:
        found |= {"image_heads": getattr(vision, "num_attention_heads", None)}
        found |= {"patch_size": getattr(vision, "patch_size", None)}
        # The module, not the configuration's word for it: that is what runs.
        acts = [m for n, m in model.vision_model.named_modules() if n.endswith("mlp.activation_fn")]
        if acts:
            found["activation"] = activation_of(acts[0])
    if text is not None:
        found["text_heads"] = getattr(text, "num_attention_heads", None)
    return found


def _pad_id(folder: Path) -> int | None:
    """Id of the padding token when pads must be masked: not for CLIP, whose pad is its end token or a word."""
    tokenizer = pretrained_tokenizer(folder)
    causal = tokenizer.pad_token_id == tokenizer.eos_token_id or tokenizer.sep_token_id is None
    return None if causal else tokenizer.pad_token_id


class HfClipEncoder(Encoder):
    """A dual encoder around a transformers model. B = batch, L = context length, D = width."""

    pad_id: int | None = None
    """Set by ``load`` where pads must be masked."""

    def image_features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Standardised pixels -> [B, D]."""
        return _tensor(self.model.get_image_features(pixel_values=pixels_BCHW))

    def text_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids -> [B, D]."""
        mask_BL = None if self.pad_id is None else (tokens_BL != self.pad_id).long()
        return _tensor(self.model.get_text_features(input_ids=tokens_BL, attention_mask=mask_BL))


def _tensor(output: Any) -> torch.Tensor:
    """The projected features: transformers 4 returns the tensor, transformers 5 an object that holds it."""
    features: torch.Tensor = getattr(output, "pooler_output", output)
    return features.float()
