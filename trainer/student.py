"""The student: an open_clip model that takes raw pixels and token ids and gives unit vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from common.errors import TrainError
from trainer.architecture import Architecture

# B = batch, H x W = pixels, C = colours, L = context length, D = width of the common space.


class StudentOutput(NamedTuple):
    """L2-normalised features of a batch of pairs."""

    image_BD: torch.Tensor
    text_BD: torch.Tensor


class Student(nn.Module):
    """An open_clip model behind one forward, so that DistributedDataParallel sees both towers at once."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.model: Any = _build(architecture)
        # The objective owns the learned temperature; the model's own is only filled in when it is saved.
        self.model.logit_scale.requires_grad_(False)
        preprocess = architecture.config["preprocess_cfg"]
        self.register_buffer("mean", 255 * torch.tensor(preprocess["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocess["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_BHWC: torch.Tensor, tokens_BL: torch.Tensor) -> StudentOutput:
        """Embed uint8 pictures of the student's geometry and their captions' token ids."""
        pixels_BCHW = (pixels_BHWC.permute(0, 3, 1, 2).float() - self.mean) / self.std
        image_BD = self.model.encode_image(pixels_BCHW)
        text_BD = self.model.encode_text(tokens_BL.long())
        # Unit length in float32 also under autocast: bfloat16 cosines are too coarse for a scale of 100.
        return StudentOutput(
            nn.functional.normalize(image_BD.float(), dim=-1), nn.functional.normalize(text_BD.float(), dim=-1)
        )

    def tensors(self, log_scale: float) -> dict[str, torch.Tensor]:
        """The weights by open_clip's own names, on the CPU, with the objective's learned log scale filled in."""
        # Copied, since safetensors refuses two names for one storage.
        found = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        found["logit_scale"] = torch.full_like(found["logit_scale"], log_scale)
        return found

    def load_tensors(self, tensors: dict[str, torch.Tensor], where: str) -> None:
        """Fill in weights by open_clip's own names, strictly.

        Raises:
            TrainError: Names or shapes are not this architecture's.
        """
        try:
            self.model.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise TrainError(
                f"The weights in {where} do not fit the student's architecture: {' '.join(str(error).split())[:600]}"
            ) from error


def _build(architecture: Architecture) -> nn.Module:
    from common.models.open_clip import build

    try:
        module: nn.Module = build(architecture.config["model_cfg"])
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError) as error:
        raise TrainError(
            f"open_clip cannot build the student {architecture.config['model_cfg']}: {type(error).__name__}: "
            f"{str(error)[:600]}"
        ) from error
    return module
