"""Chest radiographs: two dark lungs in a grey thorax, with ribs, spine, heart and film grain."""

import numpy as np

from cluster.demo.brushes import X, Y, blank, blot, disc, glow, grain, paint, stroke
from cluster.demo.modality import Finding, Modality, Spot

WHITE = (0.95, 0.95, 0.95)
BLACK = (0.03, 0.03, 0.03)
LUNG = 0.45  # distance of each lung's centre from the midline


def background(rng: np.random.Generator) -> np.ndarray:
    """Thorax with lungs, mediastinum, heart and ribs."""
    canvas = blank((0.08, 0.08, 0.08))
    canvas = paint(canvas, disc((0, 0.1), 1.0, 0.3, stretch=0.95, angle=np.pi / 2), (0.62, 0.62, 0.62))
    reach = rng.uniform(0.66, 0.74)
    for side in (-1, 1):
        lung = disc((side * LUNG, -0.02), 0.37, 0.12, stretch=reach / 0.37, angle=np.pi / 2 + side * 0.08)
        canvas = paint(canvas, lung, (0.17, 0.17, 0.17), 0.9)
    lean = rng.uniform(-0.05, 0.05)
    for row in np.linspace(-0.75, 0.65, 7) + rng.uniform(-0.06, 0.06):
        arch = np.abs(Y - row - 0.28 * (X - lean) ** 2) < 0.035
        canvas = paint(canvas, arch & (np.abs(X) < 0.85), WHITE, 0.11)
    heart = disc((0.12 + lean, 0.38), rng.uniform(0.24, 0.3), 0.12, stretch=1.25, angle=0.6)
    canvas = paint(canvas, heart, (0.72, 0.72, 0.72), 0.85)
    return paint(canvas, disc((lean, 0), 0.11, 0.06, stretch=9, angle=np.pi / 2), (0.75, 0.75, 0.75), 0.7)


def finish(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure and film grain, the same in all three channels."""
    grey = canvas.mean(axis=2) * rng.uniform(0.82, 1.15) + rng.uniform(-0.05, 0.05)
    grey = grey + 0.035 * grain(rng, 64) + 0.05 * grain(rng, 9)
    return np.repeat(grey[..., None], 3, axis=2)


def consolidation(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A cloudy white patch without an edge."""
    cloud = glow((spot.x, spot.y), spot.radius * 1.1) * (0.85 + 0.25 * grain(rng, 14)).clip(0, 1)
    return paint(canvas, cloud, WHITE, 0.7 * spot.strength)


def nodule(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A round, sharply bounded white coin."""
    return paint(canvas, blot(rng, (spot.x, spot.y), spot.radius * 0.62, 0.07, 0.08), WHITE, 0.62 * spot.strength)


def effusion(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """Fluid that fills the base of one lung up to a curved level."""
    side = np.sign(spot.x)
    level = 0.62 - 1.1 * spot.radius + rng.uniform(-0.04, 0.04)
    depth = Y - level + 0.5 * (np.abs(X) - LUNG)
    fluid = (depth / 0.12 + 0.5).clip(0, 1) * disc((side * LUNG, 0.1), 0.4, 0.1, stretch=2, angle=np.pi / 2)
    return paint(canvas, fluid, (0.8, 0.8, 0.8), 0.75 * spot.strength)


def pneumothorax(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """Air outside the lung: a black rim at the side of the chest, bounded by a fine white line."""
    side = np.sign(spot.x)
    edge = 0.82 - 0.7 * spot.radius - 0.15 * (Y + 0.1) ** 2
    inside = disc((side * LUNG, -0.05), 0.4, 0.1, stretch=1.8, angle=np.pi / 2)
    air = ((X * side - edge) / 0.05 + 0.5).clip(0, 1) * inside
    canvas = paint(canvas, air, BLACK, 0.9 * spot.strength)
    return paint(canvas, (np.abs(X * side - edge) < 0.025) * inside, WHITE, 0.45 * spot.strength)


def reticulation(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A net of fine white lines."""
    near = disc((spot.x, spot.y), spot.radius * 1.5, 0.2)
    for _ in range(9):
        start = rng.normal((spot.x, spot.y), spot.radius * 0.7)
        angle = rng.uniform(0, np.pi)
        end = start + 1.3 * spot.radius * np.array((np.cos(angle), np.sin(angle)))
        canvas = paint(canvas, stroke((tuple(start), tuple(end)), 0.012) * near, WHITE, 0.55 * spot.strength)
    return canvas


RADIOGRAPH = Modality(
    name="radiograph",
    views=("chest radiograph", "frontal chest film", "x ray of the chest"),
    organ="lung",
    background=background,
    finish=finish,
    places={
        "left": (-0.55, -0.35, -0.2, 0.2),
        "right": (0.35, 0.55, -0.3, 0.1),
        "upper": (0.25, 0.5, -0.6, -0.42),
        "lower": (0.35, 0.55, 0.4, 0.55),
        "central": (0.18, 0.26, -0.15, 0.1),
    },
    findings={
        "normal": Finding(("normal",), None),
        "consolidation": Finding(("consolidation", "airspace opacity"), consolidation),
        "nodule": Finding(("nodule", "coin lesion"), nodule),
        "effusion": Finding(("effusion", "pleural fluid"), effusion, places=("left", "right")),
        "pneumothorax": Finding(("pneumothorax", "pleural air"), pneumothorax, places=("left", "right")),
        "reticulation": Finding(("reticulation", "interstitial lines"), reticulation),
    },
)
