"""``mmkd align``: fit maps on the train rows that teachers may speak for, shard by shard, and say what they change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.config import fingerprint
from common.errors import TrainError
from common.lake import open_lake
from common.logs import Progress, logger
from common.seeding import rng
from trainer.alignment.agreement import Sample, describe_agreement, format_agreement
from trainer.alignment.maps import SIDES, Maps, save_alignment, touch_alignment
from trainer.alignment.standardise import Moments
from trainer.config import AlignConfig
from trainer.selection.stored import choose_selection
from trainer.train_rows import TrainRows


def align(lake_uri: str, config: AlignConfig) -> str:
    """Fit an alignment to a lake's teachers and keep it under ``alignment/<fingerprint>/``.

    Memory is bounded by a shard of all teachers. Test and val rows are never looked at.

    Returns:
        The fingerprint.

    Raises:
        LakeError: No lake, no embeddings, or no selection that covers the teachers.
        TrainError: There is too little to fit to.
    """
    lake = open_lake(lake_uri)
    selection, teachers = choose_selection(lake, config.selection, config.teachers)
    identity = {
        "config": {**config.model_dump(mode="json"), "teachers": sorted(teachers), "selection": selection},
        "teachers": {name: fingerprint(lake.read_teacher(name)["fingerprint"]) for name in sorted(teachers)},
        "shards": lake.shards(),
    }
    name = fingerprint(identity)
    if touch_alignment(lake, name):
        logger.info("align: alignment/%s is there already, made with the same settings; nothing to do", name)
        return name
    rows = TrainRows(lake, selection, tuple(sorted(teachers)))
    facts: dict[str, Any] = {}
    if config.recipe == "none":
        maps: Maps = {name: {} for name in rows.teachers}
    elif config.recipe == "standardise":
        maps = standardise(rows)
    else:
        maps, facts["course"] = fit_paper(rows, config)
    without = sum(rows.without_caption.values())
    if without:
        logger.info("align: %d train rows have no caption and are left out", without)
    facts["agreement"] = describe_agreement(take_sample(rows, config), maps)
    save_alignment(lake, identity, maps, facts)
    logger.info("align: wrote alignment/%s\n%s", name, format_agreement(facts["agreement"]))
    if config.recipe == "standardise":
        logger.info(
            "align: each side was turned by itself, so pictures no longer find their captions; this alignment is for "
            "distill.heads, which learn each side alone"
        )
    return name


def standardise(rows: TrainRows) -> Maps:
    """PHI-S for each teacher and side, from one pass over the shards."""
    moments = {name: {side: Moments() for side in SIDES if rows.dims[name][side]} for name in rows.teachers}
    progress = Progress("align", len(rows.shards), "shards")
    for shard in rows.shards:
        for name, sides in rows.read(shard).items():
            for side, vectors in sides.items():
                moments[name][side].add(vectors[np.isfinite(vectors[:, 0])])
        progress.advance(1)
    return {
        name: {side: one.standardising(f"teacher {name!r} ({side})") for side, one in sides.items()}
        for name, sides in moments.items()
    }


def fit_paper(rows: TrainRows, config: AlignConfig) -> tuple[Maps, list[float]]:
    """The shared autoencoder, for teachers with two towers of one width.

    Raises:
        TrainError: There is none, or one has only one tower.
    """
    from trainer.alignment.autoencoder import fit_autoencoder

    uneven = [name for name, dims in rows.dims.items() if not dims["image"] or dims["image"] != dims["text"]]
    if uneven:
        raise TrainError(
            f"The paper's autoencoder needs teachers with two towers of one width, unlike {', '.join(uneven)}. Name "
            "the others with --teachers, or use --recipe standardise."
        )
    progress = Progress("align", config.autoencoder.epochs * len(rows.shards), "shards")
    heard = set()

    def epoch(number: int) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
        size = config.autoencoder.batch_size
        for shard in rng(config.seed, "align shards", number).permutation(rows.shards):
            found = rows.read(int(shard))
            count = len(next(iter(found.values()))["image"])
            order = rng(config.seed, "align rows", number, int(shard)).permutation(count)
            for first in range(0, count, size):
                batch = {}
                for name, sides in found.items():
                    image, text = (sides[side][order[first : first + size]] for side in SIDES)
                    both = np.isfinite(image[:, 0]) & np.isfinite(text[:, 0])
                    batch[name] = image[both], text[both]
                    if both.any():
                        heard.add(name)
                yield batch
            progress.advance(1)
        if unheard := sorted(set(rows.teachers) - heard):
            raise TrainError(
                f"There is no train row for which {', '.join(unheard)} may speak with picture and caption, so nothing "
                "could be fitted to it. Loosen the selection, or name the other teachers with --teachers."
            )

    dims = {name: int(found["image"] or 0) for name, found in rows.dims.items()}
    epochs = (epoch(number) for number in range(config.autoencoder.epochs))
    maps, course = fit_autoencoder(epochs, dims, config.autoencoder, config.seed)
    logger.info("align: error of the reconstruction by epoch: %s", ", ".join(f"{error:.5f}" for error in course))
    return maps, [round(error, 8) for error in course]


def take_sample(rows: TrainRows, config: AlignConfig) -> Sample:
    """Rows to describe the change by: whole shards drawn by the seed, until there are enough."""
    taken: dict[str, dict[str, list[np.ndarray]]] = {name: {side: [] for side in SIDES} for name in rows.teachers}
    count = 0
    for shard in rng(config.seed, "align sample").permutation(rows.shards):
        found = rows.read(int(shard))
        for name, sides in found.items():
            for side, vectors in sides.items():
                taken[name][side].append(vectors)
        count += max((len(vectors) for sides in found.values() for vectors in sides.values()), default=0)
        if count >= config.sample_rows:
            break
    return {
        name: {side: np.concatenate(parts)[: config.sample_rows] for side, parts in sides.items() if parts}
        for name, sides in taken.items()
    }
