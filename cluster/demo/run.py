"""The whole pipeline, small: pairs, specialists trained on the spot, every step a cluster would run, and a report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.config import DemoConfig
from cluster.session import ray_session
from common.errors import ConfigError
from common.lake import Lake, open_lake
from common.logs import duration, logger
from extractor.config import ExtractConfig, IngestConfig
from trainer.config import EvaluateConfig, SelectConfig

SHARD_ROWS = 512


class Clock:
    """Announces each step, and how long is left judging by the usual share of the steps that are still to come."""

    SHARES = {  # percent of the whole on two cores, measured; only for telling people how long it will take
        "pairs": 2,
        "teachers": 30,
        "ingest": 4,
        "extract": 11,
        "select": 0.5,
        "stage 1": 21,
        "stage 2": 28.5,
        "evaluate": 2,
        "export": 1,
    }

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.begun: list[str] = []

    def step(self, name: str, what: str) -> None:
        """Begin a step."""
        spent = time.monotonic() - self.started
        done = sum(self.SHARES[past] for past in self.begun)
        left = f", about {duration(spent / done * (sum(self.SHARES.values()) - done))} left" if done else ""
        self.begun.append(name)
        logger.info("[%d/%d] %s: %s%s", len(self.begun), len(self.SHARES), name, what, left)


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
    from cluster.demo.settings import write_templates

    with ray_session():
        source = pairs or draw_pairs(home, config, clock)
        lake = ingest_pairs(source, lake_uri, clock)
        if teachers is None:
            teachers, catalog = train_teachers(lake, home, pairs, config, clock)
            origin = "pairs" if pairs else "drawn"
        else:
            origin = "given"
        templates = None if pairs else write_templates(home)
        run_steps(lake, home, teachers, catalog, templates, origin, config, clock)
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


def draw_pairs(home: Path, config: DemoConfig, clock: Clock) -> str:
    """Draw the student's pairs into ``source/``; returns the address of their JSONL file."""
    from cluster.demo.corpus import student_pairs, write_jsonl

    clock.step("pairs", "drawing pictures whose content is known")
    folder = home / "source"
    if not (folder / "pairs.jsonl").exists():
        counts = {"train": config.train_pictures, "val": config.val_pictures, "test": config.test_pictures}
        partial = home / ".source"
        shutil.rmtree(partial, ignore_errors=True)
        write_jsonl(student_pairs(config.seed, counts), partial)
        partial.rename(folder)
    return str(folder / "pairs.jsonl")


def ingest_pairs(source: str, lake_uri: str, clock: Clock) -> Lake:
    """``mmkd ingest``."""
    from extractor.ingest import ingest

    clock.step("ingest", f"{source} -> pairs/")
    ingest([source], lake_uri, IngestConfig(shard_rows=SHARD_ROWS, val_fraction=0.05, test_fraction=0.2))
    return open_lake(lake_uri)


def train_teachers(
    lake: Lake, home: Path, pairs: str | None, config: DemoConfig, clock: Clock
) -> tuple[list[str], str]:
    """Train specialists; returns their names and the catalog that describes them."""
    from cluster.demo.teaching import train_on_drawings, train_on_pairs, write_catalog

    if pairs is None:
        clock.step("teachers", "training specialists, each on its own kind of picture with cleaner captions")
        specialists, origin = train_on_drawings(home, config), "drawn"
    else:
        clock.step("teachers", "none were named, so training a specialist for each modality found")
        specialists, origin = train_on_pairs(lake, home, config), "the lake's own"
    return [specialist.name for specialist in specialists], write_catalog(home, specialists, origin)


def run_steps(
    lake: Lake,
    home: Path,
    teachers: Sequence[str],
    catalog: str | None,
    templates: str | None,
    origin: str,
    config: DemoConfig,
    clock: Clock,
) -> None:
    """``mmkd extract``, ``select``, ``train stage1``, ``train stage2``, ``evaluate`` and ``export``."""
    from cluster.demo.closing import evaluate_all, export_and_report
    from cluster.demo.settings import student_config
    from extractor.pipeline import extract
    from trainer.selection.select import select
    from trainer.stage1 import train_stage1
    from trainer.stage2 import train_stage2

    clock.step("extract", "every teacher embeds every pair -> features/")
    extract(lake.uri, ExtractConfig(teachers=tuple(teachers), catalog=catalog, micro_batch=128))
    clock.step("select", "which teacher may speak for which sample -> selection/")
    select(lake.uri, SelectConfig(min_skill=config.min_skill, keep_fraction=0.9))
    stage1, stage2 = student_config(lake, home, config)
    clock.step("stage 1", "contrastive pre-training of the student on the pairs alone -> runs/stage1")
    first = train_stage1(lake.uri, "stage1", stage1)
    clock.step("stage 2", "distillation from the stored embeddings -> runs/stage2")
    second = train_stage2(lake.uri, "stage2", first.checkpoint, stage2)
    clock.step("evaluate", "teachers and students on test pictures nobody trained on -> scores/")
    settings = EvaluateConfig(templates=templates)
    models = [*teachers, f"stage-1={first.checkpoint}", f"distilled={second.checkpoint}"]
    evaluation = evaluate_all(lake, models, catalog, settings)
    clock.step("export", "the student as a folder stock open_clip loads, and a page to look at")
    export_and_report(lake, home, second.checkpoint, evaluation, settings, origin)
