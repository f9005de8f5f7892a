"""The one interface all teachers and students have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from common.models.spec import ModelDescription

if TYPE_CHECKING:
    import torch

Tokenize = Callable[[list[str]], np.ndarray]
"""Captions -> int32 token ids [B, context length], padded and truncated as the model's authors do."""


class DualEncoder(Protocol):
    """An image tower and a text tower with a common space, or an image tower alone. B = batch, L = context, D = width.

    ``description`` gives the geometry of the pictures, the widths (None for a tower it lacks) and what identifies it.
    """

    description: ModelDescription
    logit_scale: float | None
    """The factor on cosines that the model was trained with (already exponentiated), such as 100; None without a text
    tower."""

    def to(self, device: str) -> DualEncoder:
        """Move the weights to a device and return self."""
        ...

    def tokenize(self, captions: list[str]) -> np.ndarray:
        """Captions -> int32 token ids [B, L], padded to one length and cut as the model's authors do."""
        ...

    def encode_image(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Embed uint8 pictures [B, H, W, C] of the model's geometry.

        Returns:
            float32 [B, D], not normalised. Mean and standard deviation are applied inside, on the device. A picture's
            vector does not depend on the rest of the batch.
        """
        ...

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Embed int token ids [B, L] made by the model's own tokenizer.

        Returns:
            float32 [B, D], not normalised. A caption's vector does not depend on the rest of the batch.
        """
        ...
