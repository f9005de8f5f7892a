"""The student: an open_clip model that takes raw pixels and token ids and gives unit vectors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


def load_pretrained(student: Student, weights: str, name: str) -> None:
    """Start from open_clip weights: a checkpoint file, or a pretrained tag of the built-in architecture ``name``.

    Raises:
        TrainError: There is no such file or tag, or it does not fit.
    """
    import open_clip

    path = Path(weights)
    if not path.is_file():
        tag = open_clip.get_pretrained_cfg(name, weights)
        if not tag:
            raise TrainError(
                f"model.weights={weights!r} is neither a file nor a pretrained tag of {name} "
                f"(tags: {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'})."
            )
        if bool(tag.get("quick_gelu")) != bool((open_clip.get_model_config(name) or {}).get("quick_gelu")):
            raise TrainError(
                f"model.weights={weights!r} were trained with another activation than {name} has (QuickGELU against "
                "GELU). Use the architecture's variant with, or without, -quickgelu."
            )
        path = Path(open_clip.download_pretrained(tag))
    try:
        # open_clip's own loader resizes position embeddings and unpicks the layouts of older files.
        open_clip.load_checkpoint(student.model, str(path), strict=True, weights_only=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainError(f"The weights in {path} do not fit {name}: {' '.join(str(error).split())[:600]}") from error


def _build(architecture: Architecture) -> nn.Module:
    import open_clip

    folder = architecture.local_folder()
    try:
        with _quiet():
            return open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError) as error:
        raise TrainError(
            f"open_clip cannot build the student from {folder}: {type(error).__name__}: {str(error)[:600]}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back open_clip's warning that the folder has no weights: it is meant to have none."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
