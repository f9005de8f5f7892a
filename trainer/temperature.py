"""Fitting a teacher's temperature: the factor on its cosines by which it tells the train pairs apart best.

A teacher's own logit scale was learned on its own data, often in batches of thousands and at its upper bound. How sharp
its softmax ought to be depends on the pairs and on how many there are to choose from, so it is fitted to both
(temperature scaling after Guo et al. 2017, with the CLIP loss for the likelihood).
"""

from __future__ import annotations

import numpy as np
import torch

from common.lake import Lake
from common.logs import logger
from common.seeding import rng
from trainer.losses import clip_loss
from trainer.train_rows import TrainRows

FIT_ROWS = 8192
"""Pairs of a teacher that its temperature is fitted to."""
MOST_AT_ONCE = 2048
"""Pairs among which each is to be found, at most: memory grows with its square, the factor only with its logarithm."""
LEAST, MOST = 1.0, 200.0
HALVINGS = 40


def best_scale(image_ND: np.ndarray, text_ND: np.ndarray, batch: int) -> float:
    """The factor on cosines with the least CLIP loss, between 1 and 200.

    The loss is convex in the factor, so its slope is halved down to zero.

    Args:
        image_ND: Unit vectors of pictures.
        text_ND: Unit vectors of their captions.
        batch: Pairs among which each is to be found, at most 2048; what is left over is not used, unless there is no
            full batch.
    """
    batch = min(batch, MOST_AT_ONCE)
    count = max(1, len(image_ND) // batch) * batch
    pairs = [
        (torch.from_numpy(image_ND[first : first + batch]), torch.from_numpy(text_ND[first : first + batch]))
        for first in range(0, min(count, len(image_ND)), batch)
    ]
    low, high = np.log(LEAST), np.log(MOST)
    for _ in range(HALVINGS):
        scale = torch.tensor(float(np.exp((low + high) / 2)), requires_grad=True)
        torch.stack([clip_loss(image, text, scale) for image, text in pairs]).mean().backward()
        assert scale.grad is not None
        if scale.grad > 0:
            high = (low + high) / 2
        else:
            low = (low + high) / 2
    return float(np.exp((low + high) / 2))


def fitted_scales(
    lake: Lake, selection: str, teachers: tuple[str, ...], batch: int, seed: int
) -> dict[str, float | None]:
    """Each teacher's factor, fitted to train pairs of shards that the seed draws; None for one without two towers."""
    found: dict[str, float | None] = {}
    for name in teachers:
        image, text = _pairs(TrainRows(lake, selection, (name,)), name, seed)
        found[name] = best_scale(image, text, batch) if len(image) > 1 else None
        if found[name] is None:
            logger.info("teacher %s: too few pairs with both vectors to fit a temperature to; its own is taken", name)
    return found


def _pairs(rows: TrainRows, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A teacher's vectors of up to ``FIT_ROWS`` admitted train pairs, shuffled."""
    dims = rows.dims[name]
    empty = np.empty((0, 1), np.float32)
    if not dims["image"] or dims["image"] != dims["text"]:
        return empty, empty
    parts, count = [], 0
    for shard in rng(seed, "temperature").permutation(rows.shards):
        sides = rows.read(int(shard))[name]
        both = np.isfinite(sides["image"][:, 0]) & np.isfinite(sides["text"][:, 0])
        parts.append((sides["image"][both], sides["text"][both]))
        count += int(both.sum())
        if count >= FIT_ROWS:
            break
    image, text = (np.concatenate(side) for side in zip(*parts, strict=True))
    order = rng(seed, "temperature rows").permutation(len(image))[:FIT_ROWS]
    return image[order], text[order]
