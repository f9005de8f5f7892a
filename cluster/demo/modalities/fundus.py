"""Fundus photographs: an orange retina in a round frame, with optic disc, macula and branching vessels."""

import numpy as np

from cluster.demo.brushes import X, Y, blank, blot, disc, dots, glow, grain, paint, stroke
from cluster.demo.modality import Finding, Modality, Spot

VESSEL = (0.5, 0.1, 0.07)
YELLOW = (0.98, 0.88, 0.5)
FRAME = ((0.95 - np.hypot(X, Y)) / 0.05).clip(0, 1)


def background(rng: np.random.Generator) -> np.ndarray:
    """The retina; the optic disc lies on either side, as right and left eyes have it."""
    canvas = blank((0.82, 0.4, 0.18)) * (1 + 0.05 * grain(rng, 6))[..., None]
    side = rng.choice((-1.0, 1.0))
    nerve = (side * rng.uniform(0.6, 0.7), rng.uniform(-0.08, 0.08))
    canvas = paint(canvas, glow((-side * 0.15, 0.03), 0.2), (0.5, 0.18, 0.08), 0.6)
    canvas = paint(canvas, disc(nerve, rng.uniform(0.15, 0.18), 0.07), (0.99, 0.86, 0.6), 0.9)
    for up in (-1, 1):
        for reach in (0.45, 0.8):
            length, height = rng.uniform(1.0, 1.4), up * reach * rng.uniform(0.8, 1.05)
            arcade = [
                (nerve[0] - side * length * part, nerve[1] + height * np.sin(2.4 * part) ** 0.8)
                for part in (0.0, 0.12, 0.3, 0.55, 0.8, 1.0)
            ]
            canvas = paint(canvas, stroke(arcade, 0.018, 0.05), VESSEL, 0.7)
    return canvas


def finish(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven flash, camera noise, and black outside the round frame."""
    flash = rng.uniform(0.85, 1.1) * (1.05 - 0.25 * np.hypot(X - rng.uniform(-0.2, 0.2), Y) ** 2)
    return (canvas * flash[..., None] + 0.02 * grain(rng, 64)[..., None]) * FRAME[..., None]


def hemorrhage(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A dark red blot with a ragged edge."""
    return paint(
        canvas, blot(rng, (spot.x, spot.y), spot.radius * 0.7, 0.08, 0.4), (0.4, 0.03, 0.03), 0.85 * spot.strength
    )


def exudates(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """Sharp, bright yellow specks."""
    specks = dots(rng, int(6 + 20 * spot.radius), (spot.x, spot.y), spot.radius * 1.1, 0.04)
    return paint(canvas, specks, YELLOW, 0.95 * spot.strength)


def drusen(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """Pale, larger, blurred spots."""
    for x, y in rng.normal((spot.x, spot.y), spot.radius * 0.6, (int(4 + 12 * spot.radius), 2)):
        canvas = paint(canvas, glow((x, y), 0.07), (0.95, 0.7, 0.4), 0.6 * spot.strength)
    return canvas


def scar(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A pale patch with a dark pigmented rim."""
    canvas = paint(
        canvas, blot(rng, (spot.x, spot.y), spot.radius * 0.85, 0.06, 0.25), (0.25, 0.12, 0.1), 0.7 * spot.strength
    )
    return paint(
        canvas, blot(rng, (spot.x, spot.y), spot.radius * 0.6, 0.06, 0.2), (0.95, 0.8, 0.65), 0.85 * spot.strength
    )


def neovascularization(canvas: np.ndarray, spot: Spot, rng: np.random.Generator) -> np.ndarray:
    """A tangle of fine new vessels."""
    for _ in range(7):
        loop = rng.normal((spot.x, spot.y), spot.radius * 0.6, (4, 2))
        canvas = paint(
            canvas, stroke([tuple(point) for point in loop], 0.01, 0.04), (0.6, 0.04, 0.05), 0.75 * spot.strength
        )
    return canvas


FUNDUS = Modality(
    name="fundus",
    views=("fundus photograph", "retinal image", "photograph of the eye"),
    organ="retina",
    background=background,
    finish=finish,
    places={
        "left": (-0.6, -0.45, -0.2, 0.2),
        "right": (0.45, 0.6, -0.2, 0.2),
        "upper": (-0.2, 0.2, -0.6, -0.45),
        "lower": (-0.2, 0.2, 0.45, 0.6),
        "central": (-0.1, 0.1, -0.1, 0.1),
    },
    findings={
        "normal": Finding(("normal",), None),
        "hemorrhage": Finding(("hemorrhage", "retinal bleeding"), hemorrhage),
        "exudates": Finding(("exudates", "lipid deposits"), exudates),
        "drusen": Finding(("drusen", "pale deposits"), drusen),
        "scar": Finding(("scar", "atrophic patch"), scar),
        "neovascularization": Finding(("neovascularization", "new vessels"), neovascularization),
    },
)
