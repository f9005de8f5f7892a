"""Looking at a lake: what is in it, how its embeddings are spread, which pictures are twins or strangers. Only reads.

Counts and norms are of all rows; cosines are of a sample (:mod:`extractor.inspecting.sampling`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from common.errors import LakeError
from common.images import UndecodableImageError, decode_rgb
from common.lake import Lake, open_lake, require_teachers
from common.logs import logger
from common.seeding import rng
from common.storage import without_secrets
from extractor.inspecting.census import Census, Coverage, count_pairs, count_rejects, count_vectors
from extractor.inspecting.sampling import Sample, Vectors, draw_sample, main_caption, read_vectors
from extractor.inspecting.similarity import (
    Spread,
    histograms_of,
    mean_similarity,
    mismatched_cosines,
    near_pairs,
    spread_of,
)
from extractor.pages.charts import Histogram

NEAR_COSINE = 0.98
SHOWN = 12
"""Pictures, or pairs of them, in each gallery."""
THUMBNAIL, THUMBNAIL_PIXELS = 200, 50_000_000
CAPTION_LETTERS = 400
ALL = "(all)"


@dataclass(frozen=True)
class Cosines:
    """Of one teacher and modality; None where there is nothing to compare."""

    matched: Spread | None
    mismatched: Spread | None
    true_wins: float | None
    """How often a picture's own caption beats another one of its modality; 0.5 is guessing."""


@dataclass(frozen=True)
class TeacherFigures:
    """One teacher, inspected."""

    name: str
    coverage: Coverage
    norms: dict[str, tuple[float, float, float]]
    """Tower (``image``, ``text``) -> least, median and greatest length before normalisation."""
    norm_histograms: dict[str, Histogram]
    cosines: dict[str, Cosines]
    """Modality, and ``(all)``: mismatched captions are always of the picture's own modality."""
    cosine_histograms: dict[str, Histogram]


@dataclass(frozen=True)
class Picture:
    """A picture as the page shows it; ``jpeg`` is None where it cannot be decoded, and ``broken`` says why."""

    sample_id: str
    modality: str
    caption: str
    jpeg: bytes | None
    broken: str | None = None


@dataclass(frozen=True)
class Found:
    """One or two pictures worth a look, and the figure that makes them so (None: equal bytes)."""

    positions: tuple[int, ...]
    figure: float | None = None


@dataclass
class Inspection:
    """Everything :func:`inspect_lake` found."""

    lake: str
    census: Census
    rejects: dict[tuple[str, str], int]
    seed: int
    sampled: int = 0
    sampled_shards: int = 0
    teachers: list[TeacherFigures] = field(default_factory=list)
    equal_pictures: int = 0
    """Pictures whose bytes another one has too, in the whole lake."""
    equal_groups: int = 0
    near_count: int = 0
    """Pairs among the sampled pictures with a cosine above ``NEAR_COSINE`` whose bytes differ."""
    space: str | None = None
    """Teacher whose image vectors say what is near and what is strange."""
    matcher: str | None = None
    """Teacher whose two towers say what is poorly matched."""
    equals: list[Found] = field(default_factory=list)
    near: list[Found] = field(default_factory=list)
    strange: list[Found] = field(default_factory=list)
    poor: list[Found] = field(default_factory=list)
    pictures: dict[int, Picture] = field(default_factory=dict)
    """Position -> what is shown of it."""

    @property
    def is_embedded(self) -> bool:
        """Whether any teacher has embedded anything."""
        return any(sum(teacher.coverage.rows.values()) for teacher in self.teachers)

    def to_json(self) -> dict[str, Any]:
        """All figures as plain values; pictures by their sample ids."""

        def told(found: Sequence[Found]) -> list[dict[str, Any]]:
            return [
                {"samples": [self.pictures[place].sample_id for place in one.positions], "figure": one.figure}
                for one in found
            ]

        return {
            "lake": without_secrets(self.lake),
            "pairs": len(self.census.codes),
            "shards": len(self.census.rows),
            "without_caption": self.census.without_caption,
            "modalities": self.census.by_modality(),
            "sampled": {"pairs": self.sampled, "shards": self.sampled_shards, "seed": self.seed},
            "rejects": [
                {"stage": stage, "reason": reason, "rows": rows} for (stage, reason), rows in self.rejects.items()
            ],
            "teachers": {teacher.name: _teacher_json(teacher) for teacher in self.teachers},
            "equal_pictures": {"count": self.equal_pictures, "groups": self.equal_groups, "shown": told(self.equals)},
            "near_duplicates": {"teacher": self.space, "count": self.near_count, "shown": told(self.near)},
            "unlike_their_modality": {"teacher": self.space, "shown": told(self.strange)},
            "poorly_matched": {"teacher": self.matcher, "shown": told(self.poor)},
        }


def inspect_lake(uri: str, teachers: Sequence[str] | None = None, sample: int = 2000, seed: int = 0) -> Inspection:
    """Look at a lake; the same seed looks at the same rows.

    Args:
        uri: The lake.
        teachers: Which to look at, all by default. The first with an image tower says which pictures are alike.
        sample: At most so many pairs have their vectors read.
        seed: Of the sample, and of which captions are compared as mismatched.

    Raises:
        LakeError: No lake or no pairs; a named teacher has no embeddings; embeddings are not those of the pairs.
    """
    lake = open_lake(uri)
    names = require_teachers(lake, teachers) if teachers else lake.teachers()
    census = count_pairs(lake)
    drawn = draw_sample(lake, census, sample, seed) if names else None
    found = Inspection(lake.uri, census, dict(count_rejects(lake).most_common()), seed)
    found.equal_pictures, found.equal_groups, equals = census.equal_pictures(SHOWN)
    found.equals = [Found(pair) for pair in equals]
    if drawn is not None:
        found.sampled, found.sampled_shards = len(drawn.positions), len(drawn.rows)
        for name in names:
            logger.info("inspect: %s", name)
            _look_at(lake, name, census, drawn, found)
    _fetch_pictures(lake, found)
    return found


def _look_at(lake: Lake, name: str, census: Census, drawn: Sample, found: Inspection) -> None:
    """Measure one teacher, and find the twins and strangers if it is the first that can tell."""
    coverage = count_vectors(lake, name, census)
    images, texts = read_vectors(lake, name, drawn)
    both = np.intersect1d(images.places, texts.places)
    both = both[[bool(drawn.captions[place]) for place in both]]  # other tools may have stored vectors of no text
    matched = np.einsum("nd,nd->n", images.at(both), texts.at(both))
    cosines: dict[str, Cosines] = {}
    mismatched = [np.empty(0, np.float32)]
    wins = []
    for modality in sorted(set(drawn.modalities[both])):
        of_modality = drawn.modalities[both] == modality
        places = both[of_modality]
        captions = [drawn.captions[place] for place in places]
        draw = rng(found.seed, "mismatch", modality)
        others, won = mismatched_cosines(images.at(places), texts.at(places), captions, draw)
        cosines[modality] = Cosines(spread_of(matched[of_modality]), spread_of(others), won)
        mismatched.append(others)
        wins += [] if won is None else [(won, len(others))]
    everything = np.concatenate(mismatched)
    if len(both):
        share = sum(won * count for won, count in wins) / len(everything) if wins else None
        cosines = {ALL: Cosines(spread_of(matched), spread_of(everything), share), **cosines}
    norms = {"image": coverage.image_norms, "text": coverage.text_norms}
    figures = TeacherFigures(
        name,
        coverage,
        {tower: (float(v.min()), float(np.median(v)), float(v.max())) for tower, v in norms.items() if len(v)},
        histograms_of(norms),
        cosines,
        histograms_of({"matched": matched, "mismatched": everything}),
    )
    found.teachers.append(figures)
    if found.space is None and len(images.places):
        found.space = name
        _find_twins(images, drawn, census, found)
    if found.matcher is None and len(both):
        found.matcher = name
        lowest = np.argsort(matched, kind="stable")[:SHOWN]
        found.poor = [Found((int(drawn.positions[both[i]]),), float(matched[i])) for i in lowest]


def _find_twins(images: Vectors, drawn: Sample, census: Census, found: Inspection) -> None:
    positions = drawn.positions[images.places]
    found.near_count, pairs = near_pairs(images.vectors_ND, census.digests[positions], NEAR_COSINE, SHOWN)
    found.near = [Found((int(positions[a]), int(positions[b])), cosine) for a, b, cosine in pairs]
    modalities = drawn.modalities[images.places]
    similar = np.full(len(positions), np.nan)
    for modality in set(modalities):
        inside = modalities == modality
        similar[inside] = mean_similarity(images.vectors_ND[inside])
    lowest = [i for i in np.argsort(similar, kind="stable")[:SHOWN] if np.isfinite(similar[i])]
    found.strange = [Found((int(positions[i]),), float(similar[i])) for i in lowest]


def _fetch_pictures(lake: Lake, found: Inspection) -> None:
    """Read what the galleries show, one shard at a time."""
    shown = [*found.equals, *found.near, *found.strange, *found.poor]
    wanted = sorted({position for one in shown for position in one.positions})
    for index, start in found.census.starts.items():
        inside = [position for position in wanted if start <= position < start + found.census.rows[index]]
        if inside:
            rows = [position - start for position in inside]
            table = lake.read_pairs(index, ["sample_id", "image", "captions"]).take(rows)
            for position, row in zip(inside, table.to_pylist(), strict=True):
                modality = found.census.modalities[found.census.codes[position]]
                found.pictures[position] = _picture(row, modality)
    if len(found.pictures) != len(wanted):
        raise LakeError(f"{lake.uri}: the pairs were changed while they were looked at. Run the command again.")


def _picture(row: dict[str, Any], modality: str) -> Picture:
    caption = main_caption(row["captions"])
    caption = caption if len(caption) <= CAPTION_LETTERS else f"{caption[:CAPTION_LETTERS]}..."
    try:
        image = decode_rgb(row["image"], THUMBNAIL_PIXELS)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    except UndecodableImageError as error:
        return Picture(row["sample_id"], modality, caption, None, str(error))
    except MemoryError:
        return Picture(row["sample_id"], modality, caption, None, "not enough memory to decode it")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return Picture(row["sample_id"], modality, caption, buffer.getvalue())


def _teacher_json(teacher: TeacherFigures) -> dict[str, Any]:
    coverage = teacher.coverage
    return {
        "rows": coverage.rows,
        "image_vectors": coverage.images,
        "text_vectors": coverage.texts,
        "missing_shards": len(coverage.missing),
        "unreadable_shards": coverage.unreadable,
        "norms": {
            tower: dict(zip(("min", "median", "max"), values, strict=True)) for tower, values in teacher.norms.items()
        },
        "cosines": {
            modality: {
                "matched": None if found.matched is None else asdict(found.matched),
                "mismatched": None if found.mismatched is None else asdict(found.mismatched),
                "true_caption_wins": found.true_wins,
            }
            for modality, found in teacher.cosines.items()
        },
    }
