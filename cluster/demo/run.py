"""The whole pipeline, small: pairs, specialists trained on the spot, every step a cluster would run, and a report."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from cluster.config import DemoConfig
from cluster.demo.settings import SPECIALISTS, student_config, write_templates
from cluster.session import ray_session
from common.errors import ConfigError
from common.lake import Lake, open_lake
from common.logs import duration, logger
from extractor.config import ExtractConfig, IngestConfig
from trainer.config import EvaluateConfig, SelectConfig

STEPS = ("pairs", "teachers", "ingest", "extract", "select", "stage 1", "stage 2", "evaluate", "export and report")
SHARD_ROWS = 512
MIN_PAIRS_FOR_A_SPECIALIST = 16


class Clock:
    """Announces each step with its number, and how long is left judging by the typical share of each step."""

    # Shares of the whole on two cores, measured; only used to tell people how long it will take.
    SHARES = (0.02, 0.30, 0.04, 0.11, 0.005, 0.21, 0.285, 0.02, 0.01)

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.number = 0

    def step(self, what: str) -> None:
        """Begin the next step."""
        spent, passed = time.monotonic() - self.started, sum(self.SHARES[: self.number])
        left = f", about {duration(spent / passed * (1 - passed))} left" if passed else ""
        logger.info("[%d/%d] %s: %s%s", self.number + 1, len(STEPS), STEPS[self.number], what, left)
        self.number += 1


def run_demo(
    lake_uri: str, pairs: str | None, teachers: Sequence[str] | None, catalog: str | None, config: DemoConfig
) -> None:
    """Run everything and say where it lies. Finished parts of an earlier demo in the same folder are kept.

    Args:
        lake_uri: A local folder.
        pairs: JSONL or CSV of the user's own; None draws pictures.
        teachers: References of teachers to use; None trains specialists on the spot.
        catalog: A YAML with models of the user's own.
        config: Sizes and seed.

    Raises:
        ConfigError: The lake is not a local folder, or another demo lies in it.
        SourceError: The user's pairs cannot be read.
    """
    if "://" in lake_uri:
        raise ConfigError(f"The demo writes pictures and models to a local folder; {lake_uri} is not one.")
    home, clock = Path(lake_uri), Clock()
    check_same_demo(home, pairs, teachers, config)
    with ray_session():
        clock.step(f"taking {pairs}" if pairs else "drawing pictures whose content is known")
        source = pairs or draw_pairs(home, config)
        if pairs:
            lake = ingest_pairs(source, lake_uri, clock)
            references = teachers or train_on_lake(lake, home, config, clock)
        else:
            references = teachers or train_specialists(home, config, clock)
            lake = ingest_pairs(source, lake_uri, clock)
        steps(lake, home, references, catalog, None if pairs else write_templates(home), config, clock)
    logger.info("demo finished in %s", duration(time.monotonic() - clock.started))


def check_same_demo(home: Path, pairs: str | None, teachers: Sequence[str] | None, config: DemoConfig) -> None:
    """Keep what an interrupted demo left, but only if it was the same demo.

    Raises:
        ConfigError: The folder holds another demo, or files that are none.
    """
    mark = home / "demo.json"
    wanted = {"pairs": pairs, "teachers": list(teachers or ()), "config": config.model_dump(mode="json")}
    if mark.exists():
        if json.loads(mark.read_text()) != wanted:
            raise ConfigError(
                f"{home} holds a demo made with other options. Give another --lake, or delete the folder."
            )
    elif home.exists() and any(home.iterdir()):
        raise ConfigError(f"{home} is not empty and holds no demo. Give another --lake, or delete the folder.")
    home.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(wanted, indent=2) + "\n")


def draw_pairs(home: Path, config: DemoConfig) -> str:
    """Draw the student's pairs into ``source/``; returns the address of their JSONL file."""
    from cluster.demo.corpus import student_pairs, write_jsonl

    folder = home / "source"
    if not (folder / "pairs.jsonl").exists():
        counts = {"train": config.train_pictures, "val": config.val_pictures, "test": config.test_pictures}
        partial = home / ".source"
        shutil.rmtree(partial, ignore_errors=True)
        write_jsonl(student_pairs(config.seed, counts), partial)
        partial.rename(folder)
    return str(folder / "pairs.jsonl")


def train_specialists(home: Path, config: DemoConfig, clock: Clock) -> list[str]:
    """Train each specialist on pictures of its own; returns references for extract."""
    from cluster.demo.corpus import specialist_pairs
    from cluster.demo.specialists import make_corpus, train_specialist

    clock.step(f"training {len(SPECIALISTS)} specialists, each on its own modalities and cleaner captions")
    references = []
    for specialist in SPECIALISTS:
        folder = home / "teachers" / specialist.name
        if not (folder / "open_clip_model.safetensors").exists():
            counts = {"train": config.teacher_pictures}
            own = list(specialist_pairs(config.seed, specialist.modalities, counts))
            corpus = make_corpus([pair.image for pair in own], [pair.captions for pair in own], config.image_size)
            train_specialist(specialist, corpus, folder, config)
        references.append(f"{specialist.name}={folder}")
    return references


def train_on_lake(lake: Lake, home: Path, config: DemoConfig, clock: Clock) -> list[str]:
    """Train one specialist for each modality of the user's own pairs that has enough of them."""
    from cluster.demo.settings import specialist_for
    from cluster.demo.specialists import make_corpus, train_specialist

    columns = ["image", "captions", "modality", "split"]
    table = pa.concat_tables([lake.read_pairs(index, columns) for index in lake.shards()])
    rows = [row for row in table.to_pylist() if row["split"] == "train"]
    counts = Counter(row["modality"] or "unknown" for row in rows)
    chosen = [modality for modality, count in counts.most_common(6) if count >= MIN_PAIRS_FOR_A_SPECIALIST]
    if not chosen:
        raise ConfigError(
            f"The demo trains a specialist for each modality with at least {MIN_PAIRS_FOR_A_SPECIALIST} pairs in the "
            f"train split; found {dict(counts)}. Give more pairs, or name --teachers."
        )
    clock.step(f"no --teachers given, so training a specialist for each of: {', '.join(chosen)}")
    references = []
    for position, modality in enumerate(chosen):
        specialist = specialist_for(modality, position)
        folder = home / "teachers" / specialist.name
        mine = [row for row in rows if (row["modality"] or "unknown") == modality][: config.teacher_pictures]
        corpus = make_corpus([row["image"] for row in mine], [row["captions"] for row in mine], config.image_size)
        train_specialist(specialist, corpus, folder, config)
        references.append(f"{specialist.name}={folder}")
    return references


def ingest_pairs(source: str, lake_uri: str, clock: Clock) -> Lake:
    """``mmkd ingest``."""
    from extractor.ingest import ingest

    clock.step(f"{source} -> pairs/")
    ingest([source], lake_uri, IngestConfig(shard_rows=SHARD_ROWS, val_fraction=0.05, test_fraction=0.2))
    return open_lake(lake_uri)


def steps(
    lake: Lake,
    home: Path,
    teachers: Sequence[str],
    catalog: str | None,
    templates: str | None,
    config: DemoConfig,
    clock: Clock,
) -> None:
    """``mmkd extract``, ``select``, ``train stage1``, ``train stage2``, ``evaluate`` and ``export``."""
    from cluster.demo.closing import evaluate_all, export_and_report
    from extractor.pipeline import extract
    from trainer.selection import select
    from trainer.stage1 import train_stage1
    from trainer.stage2 import train_stage2

    clock.step("every teacher embeds every pair -> features/")
    extract(lake.uri, ExtractConfig(teachers=tuple(teachers), catalog=catalog, micro_batch=128))
    clock.step("which teacher may speak for which sample -> selection/")
    select(lake.uri, SelectConfig(min_skill=config.min_skill))
    stage1, stage2 = student_config(lake, home, config)
    clock.step("contrastive pre-training of the student on the pairs alone -> runs/stage1")
    first = train_stage1(lake.uri, "stage1", stage1)
    clock.step("distillation from the stored embeddings -> runs/stage2")
    second = train_stage2(lake.uri, "stage2", first.checkpoint, stage2)
    clock.step("teachers and students on test pictures nobody trained on -> scores/")
    settings = EvaluateConfig(templates=templates)
    models = [*teachers, f"stage-1={first.checkpoint}", f"distilled={second.checkpoint}"]
    evaluation = evaluate_all(lake, models, catalog, settings)
    clock.step("the student as a folder stock open_clip loads, and a page to look at")
    export_and_report(lake, home, second.checkpoint, evaluation, settings)
