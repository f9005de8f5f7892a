"""The open_clip family: model folders (``open_clip_config.json``), hub ids, and architecture + pretrained tag."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import fingerprint
from common.errors import ModelError
from common.models.dual_encoder import Tokenize
from common.models.files import file_sha256, find_weights, local_copy, read_model_json, tokenizer_sha256
from common.models.spec import Geometry, ModelDescription, ModelSpec

PREFERRED = (  # the order of open_clip.factory._find_checkpoint_in_dir
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
)


@dataclass(frozen=True)
class _Files:
    """A model's configuration, its checkpoint, and its folder when it has one."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    weights: Path
    folder: Path | None


def _locate(spec: ModelSpec) -> _Files:
    import open_clip

    if spec.pretrained is not None and spec.architecture is not None:
        model_cfg = open_clip.get_model_config(spec.architecture)
        if model_cfg is None:
            raise ModelError(f"Model {spec.name!r}: open_clip knows no architecture {spec.architecture!r}.")
        if Path(spec.pretrained).is_file():
            return _Files(model_cfg, {}, Path(spec.pretrained), None)
        tag_cfg = open_clip.get_pretrained_cfg(spec.architecture, spec.pretrained)
        if not tag_cfg:
            known = ", ".join(open_clip.list_pretrained_tags_by_model(spec.architecture)) or "none"
            raise ModelError(
                f"Model {spec.name!r}: {spec.pretrained!r} is neither a file nor a pretrained tag of "
                f"{spec.architecture} (known tags: {known})."
            )
        if bool(tag_cfg.get("quick_gelu")) != bool(model_cfg.get("quick_gelu")):
            raise ModelError(
                f"Model {spec.name!r}: the weights {spec.pretrained!r} were trained with "
                f"{'QuickGELU' if tag_cfg.get('quick_gelu') else 'GELU'} and the architecture {spec.architecture} uses "
                f"the other. Name the architecture {_other_activation(spec.architecture)} instead."
            )
        try:
            weights = Path(open_clip.download_pretrained(tag_cfg))
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"Model {spec.name!r}: the weights {spec.architecture}/{spec.pretrained} could not be fetched "
                f"({type(error).__name__}: {error}). Check the network, or give a file as pretrained."
            ) from error
        return _Files(model_cfg, dict(tag_cfg), weights, None)
    folder = local_copy(spec)
    config = read_model_json(folder, "open_clip_config.json", spec.name)
    return _Files(
        config.get("model_cfg", config),
        config.get("preprocess_cfg", {}),
        find_weights(folder, PREFERRED, spec.name),
        folder,
    )


def _other_activation(architecture: str) -> str:
    suffix = "-quickgelu"
    return architecture.removesuffix(suffix) if architecture.endswith(suffix) else architecture + suffix


def describe(spec: ModelSpec) -> ModelDescription:
    """Read geometry, constants and sizes from the configuration, and hash the checkpoint."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    files = _locate(spec)
    text_cfg, vision_cfg = files.model_cfg.get("text_cfg", {}), files.model_cfg.get("vision_cfg", {})
    preprocess = files.preprocess_cfg
    size = preprocess.get("size", vision_cfg.get("image_size", 224))
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise ModelError(f"Model {spec.name!r} wants {size} pixels; only squares are supported.")
        size = size[0]
    geometry = spec.geometry or Geometry(
        size=size,
        resize=preprocess.get("resize_mode") or "shortest",
        interpolation=preprocess.get("interpolation") or "bicubic",
    )
    uses_hf = "hf_tokenizer_name" in text_cfg or "hf_model_name" in text_cfg
    named = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    # A folder holds its tokenizer, whatever the configuration calls it; a built-in model is told by the name.
    settings = [
        uses_hf if files.folder else [named, spec.architecture if named is None else None],
        text_cfg.get("tokenizer_kwargs"),
        text_cfg.get("tokenizer_mode"),
    ]
    return ModelDescription(
        name=spec.name,
        family="open_clip",
        weights_sha256=file_sha256(files.weights),
        architecture=f"open_clip:{fingerprint(files.model_cfg)}",
        geometry=geometry,
        mean=spec.mean or tuple(preprocess.get("mean") or OPENAI_DATASET_MEAN),
        std=spec.std or tuple(preprocess.get("std") or OPENAI_DATASET_STD),
        tokenizer_sha256=tokenizer_sha256(files.folder, settings)
        if files.folder
        else fingerprint(["clip-bpe", settings]),
        context_length=int(text_cfg.get("context_length", 77)),
        image_dim=int(files.model_cfg["embed_dim"]),
        text_dim=int(files.model_cfg["embed_dim"]),
        dtype=spec.dtype,
    )


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """The tokenizer open_clip itself would choose for the model."""
    import open_clip

    files = _locate(spec)
    name = f"local-dir:{files.folder}" if files.folder else str(spec.architecture)
    tokenizer: Any = open_clip.get_tokenizer(name)

    def tokenize(captions: list[str]) -> np.ndarray:
        return np.asarray(tokenizer(captions).numpy(), dtype=np.int32)

    return tokenize


def load(spec: ModelSpec) -> OpenClipEncoder:
    """Load strictly (open_clip's own rule: every tensor must be there and fit), on the CPU, in eval mode.

    Raises:
        ModelError: The checkpoint does not fit the architecture, or is not a plain tensor file.
    """
    import open_clip

    files = _locate(spec)
    try:
        if files.folder is not None:
            model = open_clip.create_model(f"local-dir:{files.folder}", pretrained_text=False)
        else:
            model = open_clip.create_model(str(spec.architecture), pretrained=str(files.weights), pretrained_text=False)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(
            f"Model {spec.name!r}: {files.weights} does not load into its architecture: {str(error)[:600]}"
        ) from error
    return OpenClipEncoder(model, describe(spec))


class OpenClipEncoder:
    """A dual encoder around an open_clip model. B = batch, L = context length, D = width."""

    def __init__(self, model: Any, description: ModelDescription) -> None:
        self.model = model.eval().requires_grad_(False)
        self.description = description
        self.logit_scale = float(self.model.logit_scale.detach().exp().mean())
        self._mean = torch.tensor(description.mean).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(description.std).view(1, 3, 1, 1) * 255

    def to(self, device: str) -> OpenClipEncoder:
        """Move the weights and the constants to a device and return self."""
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def encode_image(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Uint8 [B, H, W, 3] -> float32 [B, D], not normalised."""
        pixels_BCHW = (pixels_BHWC.permute(0, 3, 1, 2).float() - self._mean) / self._std
        features_BD: torch.Tensor = self.model.encode_image(pixels_BCHW, normalize=False)
        return features_BD.float()

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L] -> float32 [B, D], not normalised."""
        features_BD: torch.Tensor = self.model.encode_text(tokens_BL.long(), normalize=False)
        return features_BD.float()
