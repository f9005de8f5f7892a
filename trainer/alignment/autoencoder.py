"""MMKD-CLIP's shared latent space: an autoencoder whose first, linear layers are the maps (``models_ae.py``).

Each teacher has one linear map into the latent space and one out of it, for pictures and captions alike; between them
are two branches, one for pictures and one for captions, that all teachers share. It learns to reconstruct unit vectors.
Only the maps into the space are kept. Widths of the branches, rate and epochs are not published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from common.seeding import seed_of
from trainer.alignment.maps import SIDES, AffineMap, Maps
from trainer.config import AutoencoderConfig

TeacherPairs = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Teacher -> unit vectors of pictures and of their captions, float32 [N, T] each, of the rows it may speak for."""


class SharedAutoencoder(nn.Module):
    """The autoencoder of all teachers.

    Args:
        dims: Teacher -> width of its vectors.
        config: Widths, dropout and noise.
    """

    def __init__(self, dims: Mapping[str, int], config: AutoencoderConfig) -> None:
        super().__init__()
        latent, hidden = config.latent_dim, config.hidden_dim
        self.noise = config.noise
        # By number: a module's name may hold no dot, a teacher's may.
        self.teachers = tuple(dims)
        self.into = nn.ModuleList([nn.Linear(dim, latent) for dim in dims.values()])
        self.out_of = nn.ModuleList([nn.Linear(latent, dim) for dim in dims.values()])
        self.encoders = nn.ModuleDict({side: _encoder(latent, hidden, config.dropout) for side in SIDES})
        self.decoders = nn.ModuleDict({side: _decoder(latent, hidden) for side in SIDES})

    def forward(self, vectors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Squared error of the reconstruction, averaged over dimensions, sides, rows and teachers alike."""
        errors = []
        for number, name in enumerate(self.teachers):
            for side, given_NT in zip(SIDES, vectors.get(name, ()), strict=False):
                latent_NL = self.into[number](given_NT)
                if self.training and self.noise:
                    latent_NL = latent_NL + self.noise * torch.randn_like(latent_NL)
                rebuilt_NT = self.out_of[number](self.decoders[side](self.encoders[side](latent_NL)))
                errors.append((rebuilt_NT - given_NT).square().mean(dim=1))
        return torch.cat(errors).mean()

    def maps(self) -> Maps:
        """The maps into the latent space, the same for both sides."""
        found: Maps = {}
        for number, name in enumerate(self.teachers):
            layer = self.into[number]
            assert isinstance(layer, nn.Linear), "made so above"
            one = AffineMap(layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy())
            found[name] = dict.fromkeys(SIDES, one)
        return found


def _encoder(latent: int, hidden: int, dropout: float) -> nn.Sequential:
    first = (nn.Linear(latent, hidden), nn.ReLU(), nn.Dropout(dropout))
    return nn.Sequential(*first, nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout))


def _decoder(latent: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, latent))


def fit_autoencoder(
    epochs: Iterable[Iterable[TeacherPairs]], dims: Mapping[str, int], config: AutoencoderConfig, seed: int
) -> tuple[Maps, list[float]]:
    """Train on batches of rows, as many epochs as there are.

    Args:
        epochs: For each epoch its batches.
        dims: Teacher -> width of its vectors.
        config: Widths and rate.
        seed: Of weights, dropout and noise.

    Returns:
        The maps, and the mean error of each epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "alignment") % 2**63)
        model = SharedAutoencoder(dims, config)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        course = []
        for batches in epochs:
            total, count = 0.0, 0
            for batch in batches:
                there = {name: pair for name, pair in batch.items() if len(pair[0])}
                if not there:
                    continue
                tensors = {name: (torch.from_numpy(a), torch.from_numpy(b)) for name, (a, b) in there.items()}
                error = model(tensors)
                optimizer.zero_grad(set_to_none=True)
                error.backward()
                optimizer.step()
                total, count = total + float(error.detach()), count + 1
            course.append(total / max(count, 1))
        return model.maps(), course
