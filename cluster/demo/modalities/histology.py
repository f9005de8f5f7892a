"""Histology: a pink stained section full of purple nuclei."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from cluster.demo.brushes import PIXELS, X, Y, blank, blot, disc, grain, paint
from cluster.demo.modality import Finding, Modality, Spot

PINK = (0.93, 0.72, 0.82)
PURPLE = (0.42, 0.24, 0.56)
INK = (0.24, 0.1, 0.4)
WHITE = (0.98, 0.96, 0.97)


def background(rng: np.random.Generator) -> np.ndarray:
    """Eosin-stained tissue with evenly spread nuclei of even size."""
    canvas = blank(PINK) * (1 + 0.05 * grain(rng, 7))[..., None]
    return paint(canvas, _cells(rng, rng.uniform(-1.1, 1.1, (70, 2)), 0.055, 0.15), PURPLE, 0.75)


def finish(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stain and illumination vary from slide to slide, by colour channel."""
    return canvas * rng.uniform(0.88, 1.06, 3).astype(np.float32) + 0.02 * grain(rng, 64)[..., None]


def _cells(rng: np.random.Generator, centres: np.ndarray, radius: float, unevenness: float) -> np.ndarray:
    """A mask of oval nuclei, drawn at twice the resolution so that their rims stay smooth."""
    sheet = Image.new("L", (2 * PIXELS, 2 * PIXELS))
    pen = ImageDraw.Draw(sheet)
    radii = radius * rng.lognormal(0, unevenness, (len(centres), 2)) * PIXELS
    for (x, y), (rx, ry) in zip((centres + 1) * PIXELS, radii, strict=True):
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
    small = sheet.reduce(2).filter(ImageFilter.GaussianBlur(0.4))
    return np.asarray(small, np.float32) / 255


def _clear(canvas: np.ndarray, mask: np.ndarray, strength: float) -> np.ndarray:
    """The tissue under a lesion without its own nuclei."""
    return paint(canvas, mask, PINK, 0.9 * strength)


def carcinoma(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A nest of large, dark, uneven nuclei."""
    nest = blot(rng, (spot.x, spot.y), spot.radius * 1.2, 0.1, 0.2)
    centres = rng.uniform(-1.25, 1.25, (22, 2)) * spot.radius + (spot.x, spot.y)
    canvas = _clear(canvas, nest, spot.strength)
    return paint(canvas, _cells(rng, centres, 0.1, 0.35) * nest, INK, 0.9 * spot.strength)


def inflammation(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A crowd of very small, round, dark nuclei."""
    centres = rng.normal((spot.x, spot.y), spot.radius * 0.6, (int(300 * spot.radius), 2))
    return paint(canvas, _cells(rng, centres, 0.036, 0.1), INK, 0.95 * spot.strength)


def necrosis(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A smeared, deep pink area without nuclei, only dust."""
    area = blot(rng, (spot.x, spot.y), spot.radius * 1.2, 0.2, 0.25)
    smear = (0.75 + 0.3 * grain(rng, 20)).clip(0, 1)
    return paint(paint(canvas, area, PINK, 0.85 * spot.strength), area * smear, (0.86, 0.5, 0.64), 0.8 * spot.strength)


def steatosis(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A cluster of empty round vacuoles."""
    centres = rng.normal((spot.x, spot.y), spot.radius * 0.65, (int(8 + 40 * spot.radius), 2))
    return paint(canvas, _cells(rng, centres, 0.085, 0.2), WHITE, 0.9 * spot.strength)


def fibrosis(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A bundle of wavy collagen fibres."""
    angle = rng.uniform(0, np.pi)
    across = X * np.cos(angle) + Y * np.sin(angle) + 0.08 * grain(rng, 5)
    fibres = 0.5 + 0.5 * np.sin(30 * across)
    area = disc((spot.x, spot.y), spot.radius * 1.25, 0.25, stretch=1.2, angle=angle + np.pi / 2)
    canvas = _clear(canvas, area, 0.8 * spot.strength)
    return paint(canvas, area * fibres, (0.74, 0.42, 0.62), 0.75 * spot.strength)


HISTOLOGY = Modality(
    name="histology",
    views=("histology section", "stained biopsy", "micrograph of the specimen"),
    organ="tissue",
    background=background,
    finish=finish,
    places={
        "left": (-0.65, -0.5, -0.25, 0.25),
        "right": (0.5, 0.65, -0.25, 0.25),
        "upper": (-0.25, 0.25, -0.65, -0.5),
        "lower": (-0.25, 0.25, 0.5, 0.65),
        "central": (-0.12, 0.12, -0.12, 0.12),
    },
    findings={
        "normal": Finding(("normal",), None),
        "carcinoma": Finding(("carcinoma", "malignant nest"), carcinoma),
        "inflammation": Finding(("inflammation", "lymphocytic infiltrate"), inflammation),
        "necrosis": Finding(("necrosis", "dead tissue"), necrosis),
        "steatosis": Finding(("steatosis", "fat vacuoles"), steatosis),
        "fibrosis": Finding(("fibrosis", "collagen bundle"), fibrosis),
    },
)
