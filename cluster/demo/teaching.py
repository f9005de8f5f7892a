"""Where the demo's teachers come from: specialists for the drawn corpus, or for the modalities of the user's pairs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import yaml

from cluster.config import DemoConfig
from cluster.demo.corpus import specialist_pairs
from cluster.demo.settings import SPECIALISTS, specialist_for
from cluster.demo.specialists import Specialist, make_corpus, train_specialist
from common.captions import captioned
from common.errors import ConfigError
from common.lake import Lake
from common.logs import logger

MIN_PAIRS = 16
MAX_SPECIALISTS = 6
CATALOG = "teachers.yaml"


def train_on_drawings(home: Path, config: DemoConfig) -> list[Specialist]:
    """Train each of the demo's specialists on drawn pictures that the student never sees."""
    for specialist in SPECIALISTS:
        folder = home / "teachers" / specialist.name
        if not is_trained(folder):
            pairs = list(specialist_pairs(config.seed, specialist.modalities, {"train": config.teacher_pictures}))
            corpus = make_corpus([pair.image for pair in pairs], [pair.captions for pair in pairs], config.image_size)
            train_specialist(specialist, corpus, folder, config)
    return list(SPECIALISTS)


def train_on_pairs(lake: Lake, home: Path, config: DemoConfig) -> list[Specialist]:
    """Train one specialist for each modality of the user's own pairs that has enough of them.

    Raises:
        ConfigError: No modality has enough pairs.
    """
    rows = rows_by_modality(lake, config.teacher_pictures)
    counts = Counter({modality: len(found) for modality, found in rows.items()})
    chosen = [modality for modality, count in counts.most_common(MAX_SPECIALISTS) if count >= MIN_PAIRS]
    if not chosen:
        raise ConfigError(
            f"The demo trains a specialist for each modality with at least {MIN_PAIRS} pairs in the train split; "
            f"found {dict(counts) or 'none'}. Give more pairs, or name --teachers."
        )
    logger.info("specialists for: %s", ", ".join(f"{modality} ({counts[modality]} pairs)" for modality in chosen))
    specialists = [specialist_for(modality, position) for position, modality in enumerate(chosen)]
    for specialist in specialists:
        folder = home / "teachers" / specialist.name
        mine = rows[specialist.modalities[0]]
        if not is_trained(folder):
            corpus = make_corpus([row["image"] for row in mine], [row["captions"] for row in mine], config.image_size)
            train_specialist(specialist, corpus, folder, config)
    return specialists


def rows_by_modality(lake: Lake, most: int) -> dict[str, list[dict[str, Any]]]:
    """Modality -> its first train rows with a caption, at most ``most``; reads shard by shard and keeps no more."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for index in lake.shards():
        table = lake.read_pairs(index, ["image", "captions", "modality", "split"])
        table = table.filter(captioned(table["captions"]))
        for row in table.filter(pc.equal(table["split"], "train")).to_pylist():
            rows = found[row["modality"] or "unknown"]
            if len(rows) < most:
                rows.append(row)
    return dict(found)


def is_trained(folder: Path) -> bool:
    """Whether a finished specialist lies in the folder."""
    return (folder / "open_clip_model.safetensors").exists()


def write_catalog(home: Path, specialists: Sequence[Specialist], origin: str) -> str:
    """Describe the specialists in a YAML that ``--catalog`` reads; returns its path."""
    entries = {
        specialist.name: {
            "family": "open_clip",
            "path": f"teachers/{specialist.name}",  # relative to the catalog: the demo's folder may be moved
            "license": "CC0-1.0" if origin == "drawn" else "as the pairs it was trained on",
            "derivatives": "allowed",
            "derivative_terms": "none: trained by the mmkd demo",
            "facts": {"trained on": f"{', '.join(specialist.modalities)} ({origin} pictures)"},
        }
        for specialist in specialists
    }
    file = home / CATALOG
    file.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    return str(file)
