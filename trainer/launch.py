"""From a lake and a configuration to a finished run: check, record, hand over to Ray Train, collect the result."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.fs
import ray

from common.captions import captioned
from common.config import fingerprint
from common.errors import ClusterError, StoppedError, TrainError, from_row
from common.lake import Lake
from common.logs import logger
from common.seeding import rng
from common.stopping import StopSignals
from common.storage import Storage
from trainer.architecture import Architecture
from trainer.checkpoint import newest_checkpoint
from trainer.claim import check_run, claim_run
from trainer.config import DataConfig, ScaleConfig, Stage1Config, Stage2Config
from trainer.data import TrainData, read_selection
from trainer.order import Order
from trainer.record import ERROR, RESULT, Job
from trainer.starting_weights import identify
from trainer.trackers import check_trackers
from trainer.wishes import STOP

VALIDATION_ROWS = 512
LISTEN_SECONDS = 0.2


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left."""

    run: str
    checkpoint: str
    """Address of the best checkpoint (the newest where the lake has no val rows)."""
    last: str
    """Address of the last checkpoint."""
    steps: int
    metrics: dict[str, Any]
    """The last metric row."""


@dataclass(frozen=True)
class LakeRows:
    """Which rows of a lake a run uses."""

    shards: tuple[int, ...]
    train: tuple[np.ndarray, ...]
    """For each shard, the rows to train on."""
    validation: np.ndarray
    """Places of the rows to validate on."""
    identity: str
    """Depends on every sample id and on which rows are trained on."""
    without_caption: int = 0
    """Rows of the train split that are left out for want of a text."""


def find_rows(lake: Lake, teachers: tuple[str, ...], selection: str | None, seed: int) -> LakeRows:
    """Read the small columns of all shards: train rows (with teachers, those any may speak for) and val rows.

    Rows without a caption are neither, since every loss needs a text; the log says how many they are.
    """

    def scan(shard: int) -> tuple[np.ndarray, np.ndarray, str, np.ndarray]:
        texts = [] if shard in complete else ["captions"]
        pairs = lake.read_pairs(shard, ["sample_id", *texts, "split"])
        split = pairs["split"].to_numpy()
        has_caption = captioned(pairs["captions"]) if texts else np.ones(len(split), bool)
        left_out = np.array([((split == name) & ~has_caption).sum() for name in ("train", "val")])
        wanted = (split == "train") & has_caption
        if teachers:
            said = [read_selection(lake, str(selection), name, shard, pairs)["admitted"] for name in teachers]
            wanted &= np.any([admitted.to_numpy() for admitted in said], axis=0)
        rows = np.flatnonzero(wanted).astype(np.int32)
        identity = fingerprint([pairs["sample_id"].to_pylist(), rows.tolist()])
        return rows, np.flatnonzero((split == "val") & has_caption), identity, left_out

    shards, complete = lake.shards(), lake.captioned_shards()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(scan, shards))
    validation = [(shard << 32) + rows for shard, (_, rows, _, _) in zip(shards, found, strict=True)]
    no_train, no_val = (sum(int(left_out[place]) for *_, left_out in found) for place in (0, 1))
    if no_train or no_val:
        logger.info(
            "train: rows without a caption are left out: %d of the train split, %d of the val split", no_train, no_val
        )
    return LakeRows(
        shards=tuple(shards),
        train=tuple(rows for rows, *_ in found),
        validation=_validation_sample(validation, seed),
        identity=fingerprint([digest for _, _, digest, _ in found]),
        without_caption=no_train,
    )


def _validation_sample(places_by_shard: list[np.ndarray], seed: int) -> np.ndarray:
    """A fixed few hundred val rows from as few shards as hold them: each shard costs a read."""
    chosen: list[np.ndarray] = []
    for index in rng(seed, "validation").permutation(len(places_by_shard)):
        chosen.append(places_by_shard[index])
        if sum(map(len, chosen)) >= VALIDATION_ROWS:
            break
    return np.concatenate(chosen)[:VALIDATION_ROWS]


def build_order(rows: LakeRows, config: DataConfig, lake: Lake) -> Order:
    """The sample order of a run.

    Raises:
        TrainError: There are fewer samples than one batch, or none has a caption.
    """
    order = Order(rows.shards, rows.train, config.batch_size, config.lanes, config.shuffle_shards, config.seed)
    if not order.eligible and rows.without_caption:
        raise TrainError(
            f"{lake.uri} has no sample to train on: {rows.without_caption} rows of its train split have no caption, "
            "and training compares pictures with texts. Ingest pairs with captions; pictures without any serve "
            "`mmkd evaluate` alone."
        )
    if order.steps_per_epoch == 0:
        raise TrainError(
            f"{lake.uri} has {order.eligible} samples to train on, fewer than one batch of {config.batch_size}. "
            f"Lower data.batch_size (--set data.batch_size=N, a multiple of data.lanes={config.lanes}), ingest more, "
            "or, in stage 2, loosen the selection."
            + (f" {rows.without_caption} rows were left out for want of a caption." if rows.without_caption else "")
        )
    return order


@dataclass(frozen=True)
class Placement:
    """Where the workers of a run go."""

    gpu: bool
    in_process: bool
    """Train inside this process, which saves the fifteen seconds that Ray Train's own processes take to start."""
    threads: int
    """Of torch in each worker on a CPU; 0 leaves Ray's choice, one for each CPU reserved."""


def check_settings(scale: ScaleConfig, data: DataConfig) -> None:
    """What can be known of a run's workers before there is a cluster.

    Raises:
        TrainError: The lanes cannot be dealt to the workers evenly, or a tracker's package is missing.
    """
    check_trackers(scale.track)
    most = scale.max_workers or scale.workers
    if most < scale.workers:
        raise TrainError(
            f"scale.max_workers={most} is less than scale.workers={scale.workers}, which is the least number of "
            "workers of an elastic run. Raise the one or lower the other."
        )
    for workers in range(scale.workers, most + 1):
        if data.lanes % workers:
            raise TrainError(
                f"data.lanes={data.lanes} is not a multiple of {workers} workers (scale.workers={scale.workers}"
                f"{f', scale.max_workers={most}' if scale.max_workers else ''}), so the lanes cannot be dealt evenly. "
                "Choose lanes once, as a multiple of every number of workers you may use."
            )


def check_cluster(scale: ScaleConfig, tasks: int) -> Placement:
    """Decide where to train, and insist that the cluster can hold the workers beside one decode task.

    Raises:
        ClusterError: It cannot; says what is there and what is needed.
    """
    most = scale.max_workers or scale.workers
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    gpu = scale.use_gpu if scale.use_gpu is not None else gpus >= scale.workers
    # On several machines this process may sit on a small head node, so there a worker is always an actor.
    in_process = not gpu and most == 1 and sum(node["Alive"] for node in ray.nodes()) == 1
    needed = 1 if in_process else scale.workers * scale.cpus_per_worker + 1
    if needed > cpus:
        raise ClusterError(
            f"{scale.workers} workers with {scale.cpus_per_worker:g} CPUs each and one decode task need {needed:g} "
            f"CPUs, and the cluster has {cpus:g}. Lower scale.workers or scale.cpus_per_worker, or start Ray with more."
        )
    if gpu and scale.workers > gpus:
        raise ClusterError(
            f"{scale.workers} workers need a GPU each and the cluster has {gpus:g}. Lower scale.workers or set "
            "scale.use_gpu=false."
        )
    threads = scale.threads
    if in_process and not threads:
        # Decoding needs its cores: two torch threads that wait for a third party's core ran at a tenth of one's speed.
        threads = max(1, min(int(cpus), os.cpu_count() or 1) - tasks)
    return Placement(gpu, in_process, threads)


def run_identity(
    stage: str, config: Stage1Config | Stage2Config, rows: LakeRows, architecture: Architecture, **facts: Any
) -> dict[str, Any]:
    """Everything that determines what a run computes; how it is spread over machines is left out.

    So is where things lie, since lakes are moved: the student and its first weights go by their content.
    """
    settings = config.model_dump(mode="json", exclude={"scale": True, "data": {"tasks"}, "model": True})
    if isinstance(config, Stage1Config):
        settings["model"] = identify(config.model)
    student = fingerprint(architecture.identity)
    return {"stage": stage, "config": settings, "data": rows.identity, "student": student, **facts}


Session = Callable[[], AbstractContextManager[Any]]
"""Gives a context in which Ray is initialised."""


def launch(
    lake: Lake, run: str, job: Job, data: TrainData, extend: bool = False, session: Session = contextlib.nullcontext
) -> TrainResult:
    """Run a job to its end, or go on with it; a finished one is only reported, and needs no cluster.

    Args:
        lake: Where the run's folder is.
        run: Its name.
        job: What the run is; where its workers go is decided here.
        data: What the workers read.
        extend: Whether a run that was begun with fewer epochs may go on to those of ``job``.
        session: Entered when there is something to train; by default, Ray must be initialised already.

    Raises:
        FingerprintError: The name belongs to a run of another configuration or on other data.
        TrainError: There is no run to extend.
        ClusterError: The cluster is too small.
        StoppedError: SIGTERM or SIGINT came; the workers saved a checkpoint first.
        MmkdError: What the workers found wrong.
    """
    storage = Storage(job.run_uri)
    if not check_run(storage, run, job, extend) and storage.exists(RESULT):
        logger.info("%s: run %s is finished; nothing to do", job.stage, run)
        return read_result(storage, run)
    with session():
        placement = check_cluster(job.scale, job.tasks)
        claimed = claim_run(storage, run, job, extend)
        job = replace(
            job,
            gpu=placement.gpu,
            threads=placement.threads,
            key=claimed["id"],
            extended=tuple(claimed.get("extended", ())),
        )
        _train(lake, run, job, data, placement)
    return read_result(storage, run)


def _train(lake: Lake, run: str, job: Job, data: TrainData, placement: Placement) -> None:
    storage = Storage(job.run_uri)
    storage.remove(ERROR)
    storage.remove(STOP)
    logger.info(
        "%s: run %s, %d samples, %d steps in %d epochs, %d worker(s) on %s",
        job.stage,
        run,
        data.order.eligible,
        job.total_steps,
        job.total_steps // data.order.steps_per_epoch,
        job.scale.workers,
        "GPU" if placement.gpu else "CPU",
    )
    with StopSignals() as stop:
        _fit_or_stop(functools.partial(fit, lake, run, job, data, placement), stop, storage)
    if storage.exists(ERROR):
        raise from_row(storage.read_json(ERROR))
    if not storage.exists(RESULT) and stop.asked:
        saved = newest_checkpoint(storage)
        raise StoppedError(
            f"Run {run} was stopped by {stop.asked} after step {saved.step if saved else 0} of {job.total_steps}. "
            "Start the same command again to go on from there."
        )


def _fit_or_stop(fit_all: Callable[[], None], stop: StopSignals, run: Storage) -> None:
    """Train in a thread, and pass a signal on to the workers: the thread that waits for Ray would not hear of it."""
    failures: list[BaseException] = []

    def target() -> None:
        try:
            fit_all()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    thread = threading.Thread(target=target, name="mmkd-train", daemon=True)
    thread.start()
    told = False
    while thread.is_alive():
        thread.join(LISTEN_SECONDS)
        if stop.asked and not told:
            run.write_json(STOP, {"signal": stop.asked})
            told = True
    if told:
        run.remove(STOP)
    if failures:
        raise failures[0]


def fit(lake: Lake, run: str, job: Job, data: TrainData, placement: Placement) -> None:
    """Hand the job to Ray Train.

    Raises:
        TrainError: Workers were lost more often than allowed.
    """
    # How often Ray Train looks after its workers, which paces both start-up and reports; its own default is 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from trainer.worker import train_worker

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    resources = {"CPU": job.scale.cpus_per_worker, **({"GPU": 1.0} if placement.gpu else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": ray.put(job), "data": ray.put(data)},
        torch_config=TorchConfig(backend="nccl" if placement.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=0 if placement.in_process else _workers(job.scale),  # type: ignore[arg-type] # the older class
            use_gpu=placement.gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(  # type: ignore[call-arg] # ray.train's stub names the older class of this name
            # A fresh name each time: resuming is by our own checkpoints, and Ray Train resumes equal names by its own.
            name=f"{run}-{uuid.uuid4().hex[:8]}",
            storage_path=lake.storage.path(f"runs/{run}/ray"),
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(lake.storage.fs)),
            failure_config=FailureConfig(max_failures=job.scale.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if not Storage(job.run_uri).exists(ERROR):
            raise TrainError(
                f"Run {run} lost its workers more than {job.scale.max_failures} times: {str(error)[-800:]} "
                "Start the same command again to go on from the last checkpoint."
            ) from error


def _workers(scale: ScaleConfig) -> int | tuple[int, int]:
    """How many, or from how many to how many: Ray Train then restarts the group when the cluster has changed."""
    return scale.workers if scale.max_workers is None else (scale.workers, scale.max_workers)


def read_result(storage: Storage, run: str) -> TrainResult:
    """The result of a finished run."""
    found = storage.read_json(RESULT)
    return TrainResult(
        run=run,
        checkpoint=storage.child(found["checkpoint"]).uri,
        last=storage.child(found["last"]).uri,
        steps=found["steps"],
        metrics=found["metrics"],
    )
