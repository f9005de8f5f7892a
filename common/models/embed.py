"""Embed a few pictures or captions with any model; the small sibling of extraction. D = width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from common.images import decode_rgb, fit
from common.models.dual_encoder import DualEncoder

MICRO_BATCH = 16
"""Rows of every forward pass: the last one is padded, so that a vector does not depend on its neighbours."""


def embed_images(model: DualEncoder, pictures: Sequence[bytes | str | Path]) -> np.ndarray:
    """Pictures, as encoded bytes or local paths, in a model's own geometry.

    Returns:
        Unit vectors, float32 [N, D].

    Raises:
        UndecodableImageError: One of them is not a picture.
    """
    geometry = model.description.geometry
    encoded = [Path(item).read_bytes() if isinstance(item, str | Path) else item for item in pictures]
    pixels = np.stack([fit(decode_rgb(data), geometry) for data in encoded])
    return run_tower(model.encode_image, pixels)


def embed_texts(model: DualEncoder, captions: Sequence[str]) -> np.ndarray:
    """Captions with a model's own tokenizer.

    Returns:
        Unit vectors, float32 [N, D].

    Raises:
        ModelError: The model has no text tower or no tokenizer.
    """
    return run_tower(model.encode_text, model.tokenize(list(captions)))


@torch.inference_mode()
def run_tower(
    tower: Callable[[torch.Tensor], torch.Tensor], inputs: np.ndarray, rows: int = MICRO_BATCH, device: str = "cpu"
) -> np.ndarray:
    """At least one input through a tower, in passes of one shape.

    Args:
        tower: ``encode_image`` or ``encode_text`` of a model that lies on ``device``.
        inputs: [N, ...].
        rows: Of every pass.
        device: Where the model lies.

    Returns:
        Unit vectors, float32 [N, D].
    """
    parts = []
    for start in range(0, len(inputs), rows):
        chunk = inputs[start : start + rows]
        padded = np.zeros((rows, *inputs.shape[1:]), inputs.dtype)
        padded[: len(chunk)] = chunk
        parts.append(tower(torch.from_numpy(padded).to(device))[: len(chunk)].float())
    return torch.nn.functional.normalize(torch.cat(parts), dim=1).cpu().numpy()
