"""Soft shapes, textures and compositing on a square canvas: what the demo's pictures are drawn with.

A canvas is a float array [PIXELS, PIXELS, 3] with values in 0..1; a mask is [PIXELS, PIXELS] in 0..1.
Coordinates run from -1 (left, top) to +1 (right, bottom), so nothing here depends on the resolution.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

PIXELS = 64

_axis = ((np.arange(PIXELS) + 0.5) / PIXELS * 2 - 1).astype(np.float32)
X, Y = np.meshgrid(_axis, _axis)

Colour = tuple[float, float, float]
Point = tuple[float, float]


def blank(colour: Colour) -> np.ndarray:
    """A canvas of one colour."""
    return np.broadcast_to(np.asarray(colour, np.float32), (PIXELS, PIXELS, 3)).copy()


def paint(canvas: np.ndarray, mask: np.ndarray, colour: Colour, strength: float = 1.0) -> np.ndarray:
    """The canvas with `colour` laid over it where the mask is, `strength` being the opacity."""
    opacity = (mask * strength)[..., None]
    return canvas * (1 - opacity) + np.asarray(colour, np.float32) * opacity


def disc(centre: Point, radius: float, soft: float = 0.1, stretch: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """A filled ellipse; `soft` is the width of its blurred rim, `stretch` its length over its width."""
    return _fill(_distance(centre, stretch, angle) / radius, soft / radius)


def blot(rng: np.random.Generator, centre: Point, radius: float, soft: float = 0.1, rough: float = 0.2) -> np.ndarray:
    """A disc with an irregular outline: its radius varies by about the fraction `rough` around the rim."""
    turn = np.arctan2(Y - centre[1], X - centre[0])
    outline = np.ones_like(X)
    for lobes in (2, 3, 5):
        outline += rough * rng.normal(0, 1.2 / lobes) * np.cos(lobes * turn + rng.uniform(0, 2 * np.pi))
    return _fill(_distance(centre, 1.0, 0.0) / (radius * outline.clip(0.3)), soft / radius)


def glow(centre: Point, radius: float, stretch: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """A Gaussian bump."""
    return np.exp(-0.5 * (_distance(centre, stretch, angle) / radius) ** 2)


def stroke(points: Sequence[Point], width: float, soft: float = 0.04) -> np.ndarray:
    """A line through the points."""
    nearest = np.full_like(X, np.inf)
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        dx, dy = x1 - x0, y1 - y0
        along = (((X - x0) * dx + (Y - y0) * dy) / (dx * dx + dy * dy + 1e-6)).clip(0, 1)
        nearest = np.minimum(nearest, (X - x0 - along * dx) ** 2 + (Y - y0 - along * dy) ** 2)
    return ((width - np.sqrt(nearest)) / soft + 0.5).clip(0, 1)


def dots(rng: np.random.Generator, count: int, centre: Point, spread: float, radius: float) -> np.ndarray:
    """Many small round marks scattered around a centre."""
    mask = np.zeros_like(X)
    for x, y in rng.normal(centre, spread / 2, size=(count, 2)):
        mask = np.maximum(mask, ((radius * rng.uniform(0.7, 1.3) - np.hypot(X - x, Y - y)) / 0.04 + 0.5).clip(0, 1))
    return mask


def grain(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth random texture, mean 0 and deviation about 1, with `cells` bumps across the picture."""
    if cells >= PIXELS:
        return rng.standard_normal((PIXELS, PIXELS), dtype=np.float32)
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)) * 1.4


def polar(apex: Point) -> tuple[np.ndarray, np.ndarray]:
    """Depth and angle (from straight down) of every pixel as seen from a point, as a probe sees them."""
    return np.hypot(X - apex[0], Y - apex[1]), np.arctan2(X - apex[0], Y - apex[1])


def to_image(canvas: np.ndarray) -> Image.Image:
    """The canvas as an 8-bit RGB picture."""
    return Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))


def _distance(centre: Point, stretch: float, angle: float) -> np.ndarray:
    dx, dy = X - centre[0], Y - centre[1]
    along = dx * np.cos(angle) + dy * np.sin(angle)
    across = dy * np.cos(angle) - dx * np.sin(angle)
    return np.hypot(along / stretch, across)


def _fill(relative_distance: np.ndarray, soft: float) -> np.ndarray:
    return ((1 - relative_distance) / max(soft, 1e-3) + 0.5).clip(0, 1)
