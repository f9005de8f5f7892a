"""Stage 1: contrastive pre-training of the student on the pairs."""

from __future__ import annotations

import contextlib
import functools

from common.lake import open_lake
from common.storage import address_within
from trainer.architecture import resolve_architecture
from trainer.config import ModelConfig, Stage1Config
from trainer.data import TrainData
from trainer.launch import Session, TrainResult, build_order, check_settings, find_rows, launch, run_identity
from trainer.objectives import ContrastiveObjective
from trainer.record import Job
from trainer.starting_weights import licences, load_start
from trainer.student import Student


def train_stage1(
    lake_uri: str,
    run: str,
    config: Stage1Config,
    *,
    extend: bool = False,
    session: Session = contextlib.nullcontext,
) -> TrainResult:
    """Train a student on a lake's train split, or go on where the run of this name stopped.

    Args:
        lake_uri: A lake with pairs.
        run: Name of the folder under ``runs/``.
        config: Everything else. Only ``scale`` and ``data.tasks`` may differ when a run goes on.
        extend: Whether a run that was begun with fewer epochs may go on to those of ``config``.
        session: Context in which Ray is initialised, entered when there is something to train; by default it must be
            already.

    Raises:
        LakeError: No lake, or the run's name belongs to another configuration or other data.
        TrainError: The student cannot be built, there is too little data, or the loss diverges.
        ClusterError: The cluster is too small.
    """
    lake = open_lake(lake_uri)
    check_settings(config.scale, config.data)
    architecture = resolve_architecture(config.model.architecture, config.model.tokenizer)
    rows = find_rows(lake, (), None, config.data.seed)
    order = build_order(rows, config.data, lake)
    job = Job(
        stage="stage 1",
        run_uri=lake.storage.child(f"runs/{run}").uri,
        optim=config.optim,
        scale=config.scale,
        tasks=config.data.tasks,
        total_steps=order.steps_per_epoch * config.epochs,
        objective=functools.partial(ContrastiveObjective, config.init_temperature, config.loss),
        start=functools.partial(_start, config.model),
        validation_places=rows.validation,
        identity=run_identity("stage1", config, rows, architecture),
        asked={name: address_within(given, lake.uri) for name, given in config.model if given is not None},
        first_weights=licences(config.model),
    )
    return launch(lake, run, job, TrainData(lake.uri, order, architecture, config.data.crop_scale), extend, session)


def _start(model: ModelConfig, student: Student) -> None:
    load_start(student, model)
