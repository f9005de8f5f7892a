"""Ultrasound: a fan of speckle below a probe, darker with depth, with lesions that shade or brighten what is behind."""

import numpy as np

from cluster.demo.brushes import X, Y, blank, blot, disc, dots, grain, paint, polar
from cluster.demo.modality import Finding, Modality, Spot

WHITE = (0.95, 0.95, 0.95)
BLACK = (0.02, 0.02, 0.02)
PROBE = (0.0, -1.35)  # the point the beams come from, above the picture
DEPTH, ANGLE = polar(PROBE)
FAN = (
    ((2.15 - DEPTH) / 0.04).clip(0, 1) * ((DEPTH - 0.55) / 0.04).clip(0, 1) * ((0.62 - np.abs(ANGLE)) / 0.03).clip(0, 1)
)


def background(rng: np.random.Generator) -> np.ndarray:
    """Soft tissue with layers near the probe and a bright far wall."""
    canvas = blank((0.46, 0.46, 0.46))
    canvas = canvas * (1 + 0.12 * grain(rng, 5))[..., None]
    for depth in (0.66, 0.74 + rng.uniform(0, 0.04)):
        canvas = paint(canvas, np.abs(DEPTH - depth) < 0.025, WHITE, 0.4)
    wall = 2.0 + 0.05 * np.sin(4 * ANGLE + rng.uniform(0, 6))
    return paint(canvas, np.abs(DEPTH - wall) < 0.03, WHITE, 0.5)


def finish(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Multiplicative speckle, attenuation with depth, and black outside the fan."""
    speckle = np.abs(1 + 0.16 * grain(rng, 64) + 0.2 * grain(rng, 32))
    gain = rng.uniform(0.85, 1.15) * (1.15 - rng.uniform(0.15, 0.3) * (DEPTH - 0.55))
    grey = canvas.mean(axis=2) * speckle * gain * FAN + 0.02
    return np.repeat(grey[..., None], 3, axis=2)


def _behind(spot: Spot, width: float) -> np.ndarray:
    """The beam below a lesion."""
    depth, angle = np.hypot(spot.x - PROBE[0], spot.y - PROBE[1]), np.arctan2(spot.x - PROBE[0], spot.y - PROBE[1])
    beam = ((width - np.abs(ANGLE - angle) * depth) / 0.05 + 0.5).clip(0, 1)
    return beam * ((DEPTH - depth) / 0.08).clip(0, 1)


def cyst(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A black, smooth, round hole with a bright beam behind it."""
    canvas = paint(canvas, _behind(spot, spot.radius * 0.6), WHITE, 0.3 * spot.strength)
    return paint(canvas, disc((spot.x, spot.y), spot.radius * 0.75, 0.06), BLACK, 0.9 * spot.strength)


def mass(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A dark grey, rough-edged body with texture of its own."""
    body = blot(rng, (spot.x, spot.y), spot.radius * 0.85, 0.08, 0.35)
    return paint(canvas, body * (0.9 + 0.15 * grain(rng, 24)).clip(0, 1), (0.2, 0.2, 0.2), 0.8 * spot.strength)


def calcification(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A bright crescent that throws a black shadow."""
    canvas = paint(canvas, _behind(spot, spot.radius * 0.6), BLACK, 0.75 * spot.strength)
    cap = disc((spot.x, spot.y), spot.radius * 0.3, 0.06, stretch=2.0)
    return paint(canvas, cap, WHITE, 0.85 * spot.strength)


def abscess(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A thick bright rim around dark, debris-filled fluid."""
    canvas = paint(canvas, blot(rng, (spot.x, spot.y), spot.radius * 0.95, 0.08, 0.15), WHITE, 0.55 * spot.strength)
    canvas = paint(canvas, disc((spot.x, spot.y), spot.radius * 0.6, 0.08), (0.1, 0.1, 0.1), 0.85 * spot.strength)
    debris = dots(rng, 5, (spot.x, spot.y + 0.2 * spot.radius), spot.radius * 0.5, 0.03)
    return paint(canvas, debris, WHITE, 0.5 * spot.strength)


def effusion(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A flat black layer of free fluid, slightly bent."""
    bend = 0.12 * np.sin(3 * X + rng.uniform(0, 6))
    thickness = 0.28 * spot.radius * (1 - ((X - spot.x) / (2.2 * spot.radius)) ** 2).clip(0, 1)
    layer = ((thickness - np.abs(Y - spot.y - bend + 0.12 * np.sin(3 * spot.x))) / 0.05 + 0.5).clip(0, 1)
    return paint(canvas, layer * (thickness > 0.01), BLACK, 0.9 * spot.strength)


ULTRASOUND = Modality(
    name="ultrasound",
    views=("ultrasound image", "sonogram", "b mode scan of the liver"),
    organ="liver",
    background=background,
    finish=finish,
    places={
        "left": (-0.5, -0.36, -0.05, 0.25),
        "right": (0.36, 0.5, -0.05, 0.25),
        "upper": (-0.1, 0.1, -0.4, -0.25),
        "lower": (-0.15, 0.15, 0.38, 0.5),
        "central": (-0.1, 0.1, 0.0, 0.15),
    },
    findings={
        "normal": Finding(("normal",), None),
        "cyst": Finding(("cyst", "anechoic lesion"), cyst),
        "mass": Finding(("mass", "solid tumour"), mass),
        "calcification": Finding(("calcification", "shadowing stone"), calcification),
        "abscess": Finding(("abscess", "infected collection"), abscess),
        "ascites": Finding(("ascites", "free fluid"), effusion),
    },
)
