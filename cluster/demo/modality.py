"""What the demo knows about a modality: its words, its findings, where they can be, and how all of it is drawn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Spot:
    """Where one finding is painted, how large, and how visible (1 is plain, towards 0 is subtle)."""

    x: float
    y: float
    radius: float
    strength: float


Painter = Callable[[np.ndarray, Spot, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Finding:
    """One class of the zero-shot task; `paint` is None for the normal picture, which has no place and no size."""

    names: tuple[str, ...]
    paint: Painter | None
    places: tuple[str, ...] = ("left", "right", "upper", "lower", "central")


@dataclass(frozen=True)
class Modality:
    """One kind of picture: `views` and `organ` are how captions call it, `places` maps a place to (x0, x1, y0, y1)."""

    name: str
    views: tuple[str, ...]
    organ: str
    background: Callable[[np.random.Generator], np.ndarray]
    finish: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    places: Mapping[str, Box]
    findings: Mapping[str, Finding]
