"""Draws the demo's image-caption pairs: known content, deterministic, picture by picture.

Two views of the same world: the *student's pairs*, whose captions are mostly generic as captions in papers are, and
each *specialist's corpus*, which holds other pictures of the specialist's own modalities with clean captions.
"""

import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cluster.demo.brushes import to_image
from cluster.demo.captions import Scene, clean_caption, generic_caption, partial_caption
from cluster.demo.modalities import MODALITIES
from cluster.demo.modality import Spot

LICENSE = "CC0-1.0"
RADIUS = {"small": (0.18, 0.24), "large": (0.32, 0.42)}
STRENGTH = (0.6, 1.0)  # the weakest findings are hard to see, so no model gets everything right
SHARE_INFORMATIVE = 0.35  # of the student's training pictures; the others have generic captions only
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Pair:
    """One picture with its captions and what is true of it."""

    key: str
    image: bytes
    captions: list[str]
    scene: Scene
    split: str

    @property
    def modality(self) -> str:
        """The kind of picture."""
        return self.scene.modality

    @property
    def label(self) -> str:
        """The finding."""
        return self.scene.finding


def student_pairs(seed: int, per_modality: Mapping[str, int], modalities: Sequence[str] = ()) -> Iterator[Pair]:
    """The student's pairs, modality by modality; training captions are mostly generic, the others are clean.

    Args:
        seed: The corpus is a function of it.
        per_modality: Split name (train, val, test) -> pictures per modality.
        modalities: Which modalities; all of them when empty.
    """
    for split, count in per_modality.items():
        for modality in modalities or tuple(MODALITIES):
            for number in range(count):
                rng = _generator(seed, "student", split, modality, number)
                scene = draw_scene(modality, rng)
                image = encode(draw_picture(scene, rng))
                captions = _student_captions(scene, rng) if split == "train" else [clean_caption(scene, rng)]
                yield Pair(f"{modality}-{split}-{number:05d}", image, captions, scene, split)


def specialist_pairs(seed: int, modalities: Sequence[str], per_modality: Mapping[str, int]) -> Iterator[Pair]:
    """A specialist's own corpus: pictures the student never sees, each with one clean caption."""
    for split, count in per_modality.items():
        for modality in modalities:
            for number in range(count):
                rng = _generator(seed, "specialist", split, modality, number)
                scene = draw_scene(modality, rng)
                image = encode(draw_picture(scene, rng))
                yield Pair(f"{modality}-clean-{split}-{number:05d}", image, [clean_caption(scene, rng)], scene, split)


def draw_scene(modality: str, rng: np.random.Generator) -> Scene:
    """Chooses what a picture of this modality shows, every finding equally often."""
    findings = MODALITIES[modality].findings
    finding = str(rng.choice(list(findings)))
    if findings[finding].paint is None:
        return Scene(modality, finding)
    return Scene(modality, finding, str(rng.choice(findings[finding].places)), str(rng.choice(list(RADIUS))))


def draw_picture(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws the scene; position, radius, visibility, anatomy and noise are drawn from `rng`."""
    modality = MODALITIES[scene.modality]
    canvas = modality.background(rng)
    paint = modality.findings[scene.finding].paint
    if paint is not None:
        x0, x1, y0, y1 = modality.places[scene.place]
        spot = Spot(rng.uniform(x0, x1), rng.uniform(y0, y1), rng.uniform(*RADIUS[scene.size]), rng.uniform(*STRENGTH))
        canvas = paint(canvas, spot, rng)
    return to_image(modality.finish(canvas, rng))


def encode(image: Image.Image) -> bytes:
    """The picture as JPEG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def write_jsonl(pairs: Iterable[Pair], folder: Path) -> Path:
    """Writes `images/<key>.jpg` and `pairs.jsonl` below the folder; returns the path of the JSONL file."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    listing = folder / "pairs.jsonl"
    with listing.open("w", encoding="ascii") as lines:
        for pair in pairs:
            (images / f"{pair.key}.jpg").write_bytes(pair.image)
            row = {
                "key": pair.key,
                "image": f"images/{pair.key}.jpg",
                "caption": pair.captions[0],
                "captions": pair.captions,
                "modality": pair.modality,
                "label": pair.label,
                "license": LICENSE,
                "split": pair.split,
            }
            lines.write(json.dumps(row) + "\n")
    return listing


def _student_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """One or two captions; an informative picture has one that says something, and perhaps a generic one."""
    captions = [generic_caption(scene, rng) for _ in range(rng.integers(1, 3))]
    if rng.random() < SHARE_INFORMATIVE:
        captions[0] = clean_caption(scene, rng) if rng.random() < 0.5 else partial_caption(scene, rng)
    return list(dict.fromkeys(captions))


def _generator(seed: int, corpus: str, split: str, modality: str, number: int) -> np.random.Generator:
    """A generator of the picture's own, so that no picture depends on how many come before it."""
    return np.random.default_rng((seed, zlib.crc32(f"{corpus}/{split}/{modality}".encode()), number))
