"""What the encoders of all families share: constants on the device, eval mode, the tokenizer, plain float32 out.

B = batch, H x W = pixels, C = channels, L = context length, D = width.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import ModelError
from common.models.dual_encoder import Tokenize
from common.models.spec import ModelDescription

if TYPE_CHECKING:  # families are imported for their tokenizers alone, too
    import torch

PICTURES_AT_ONCE = 2
"""So many are standardised together on a CPU: they fit into a core's cache."""
_OF_THREAD = threading.local()
"""``floats``: where a thread's last batch was standardised, for whatever model comes next."""


class Encoder(ABC):
    """A frozen module with the pictures' constants; a family says how its module is called.

    Args:
        model: The loaded module, on the CPU.
        description: What its files say.
        log_scale: The learned logarithm of the factor on cosines; None where there is no text tower.
        tokenizer: Loads the tokenizer when it is first needed.
    """

    def __init__(
        self,
        model: Any,
        description: ModelDescription,
        log_scale: torch.Tensor | float | None,
        tokenizer: Callable[[], Tokenize] | None,
    ) -> None:
        import torch

        self.model = model.eval().requires_grad_(False)
        self.description = description
        self.logit_scale = None if log_scale is None else float(torch.as_tensor(log_scale).detach().exp().mean())
        self._load_tokenizer = tokenizer
        channels = description.geometry.channels
        self._mean = torch.tensor(description.mean[:channels]).view(1, channels, 1, 1) * 255
        self._std = torch.tensor(description.std[:channels]).view(1, channels, 1, 1) * 255

    def to(self, device: str) -> Encoder:
        """Move the weights and the constants to a device and return self."""
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def tokenize(self, captions: list[str]) -> np.ndarray:
        """Captions -> int32 token ids [B, L].

        Raises:
            ModelError: The model has no text tower, or its tokenizer cannot be found.
        """
        return self._tokenize(captions)

    @cached_property
    def _tokenize(self) -> Tokenize:
        if self._load_tokenizer is None:
            raise ModelError(f"Model {self.description.name!r} has no text tower, so it has no tokenizer.")
        return self._load_tokenizer()

    def encode_image(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Uint8 [B, H, W, C] of the model's geometry -> float32 [B, D], not normalised."""
        pixels_BCHW = self._standardised(pixels_BHWC)
        if pixels_BCHW.shape[1] == 1:
            pixels_BCHW = pixels_BCHW.expand(-1, 3, -1, -1)
        return self.image_features(pixels_BCHW).float()

    def _standardised(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Float32 [B, C, H, W]; on a CPU in memory that the thread's next call takes again.

        There a fresh batch of floats costs more in page faults than in arithmetic, arithmetic on a channels-last view
        four times as much as on planes, and whole batches leave the cache between two steps: together a factor of five.
        """
        import torch

        planes_BCHW = pixels_BHWC.permute(0, 3, 1, 2)
        if pixels_BHWC.device.type != "cpu":
            return planes_BCHW.contiguous().float().sub_(self._mean).div_(self._std)
        kept = getattr(_OF_THREAD, "floats", None)
        if kept is None or len(kept) < planes_BCHW.numel():
            with torch.inference_mode(False):  # a tensor made in that mode could not be filled outside of it
                _OF_THREAD.floats = kept = torch.empty(planes_BCHW.numel(), dtype=torch.float32)
        floats_BCHW = kept[: planes_BCHW.numel()].view(planes_BCHW.shape)
        for start in range(0, len(planes_BCHW), PICTURES_AT_ONCE):
            few_BCHW = planes_BCHW[start : start + PICTURES_AT_ONCE].contiguous().float().sub_(self._mean)
            torch.div(few_BCHW, self._std, out=floats_BCHW[start : start + len(few_BCHW)])
        return floats_BCHW

    def encode_text(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Int token ids [B, L] -> float32 [B, D], not normalised.

        Raises:
            ModelError: The model has no text tower.
        """
        if self.description.text_dim is None:
            raise ModelError(f"Model {self.description.name!r} has no text tower.")
        return self.text_features(tokens_BL.long()).float()

    @abstractmethod
    def image_features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Standardised pixels, always three channels -> [B, D]."""

    @abstractmethod
    def text_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Int64 token ids -> [B, D]; never called where the description has no text width."""
