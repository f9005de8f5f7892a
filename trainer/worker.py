"""One training worker under Ray Train: build or resume, run the loop, save, report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import get_device
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from common.errors import MmkdError, TrainError, to_row
from common.logs import configure_logs, logger
from common.seeding import seed_of
from common.storage import Storage
from trainer.batch_norm import describe_parts, synchronise
from trainer.checkpoint import newest_checkpoint, open_step
from trainer.data import TrainData, digest_rows
from trainer.feed import quiet_libraries, ray_batches, started
from trainer.loop import LoopPlan, train
from trainer.losses import gather_constant
from trainer.optim import build_optimizer
from trainer.record import ERROR, Job, Parts, Recorder, restore
from trainer.student import Student
from trainer.wishes import Agreement, Wisher, Wishes


def train_worker(settings: dict[str, Any]) -> None:
    """Ray Train's entry point on every worker.

    A mistake the user can mend is left in the run's folder for the driver, which raises it there: Ray Train would
    only retry it and then bury it under exceptions of its own.
    """
    configure_logs()
    quiet_libraries()
    job: Job = ray.get(settings["job"])
    run = Storage(job.run_uri)
    if run.exists(ERROR):
        return  # this group was restarted after another worker's error; the driver will raise it
    try:
        run_job(job, settings["data"], run)
    except MmkdError as error:
        run.write_json(ERROR, to_row(error))
        # Errors of the training itself happen on all workers at once; another's would leave the rest waiting.
        if ray.train.get_context().get_world_size() > 1 and not isinstance(error, TrainError):
            raise


def run_job(job: Job, data_ref: ray.ObjectRef, run: Storage) -> None:
    """Train from the newest whole checkpoint, or from the start, to the end."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    data: TrainData = ray.get(data_ref)
    device = get_device() if job.gpu else torch.device("cpu")
    if job.threads and device.type == "cpu":
        torch.set_num_threads(job.threads)
    first_step = agree_on_start(run, rank, device)
    # An elastic group takes all the CPUs it can get.
    cpus = 1 if job.scale.max_workers is None else 0
    batches = started(ray_batches(data_ref, first_step, job.total_steps, rank, workers, job.tasks, cpus))
    parts = together(lambda: prepare(job, data, run, first_step, device), device)
    if parts is None:
        batches.close()
        return
    if job.scale.compile:
        parts.student.compile()  # in place, so that checkpoints know nothing of it
    doubt = describe_parts(parts.student, data.order.batch_size, workers, job.scale.accumulate, device.type == "cuda")
    if rank == 0 and doubt is not None:
        logger.warning("%s: %s", job.stage, doubt)
    model, no_sync = wrap(parts.student, workers, device)
    plan = LoopPlan(
        total_steps=job.total_steps,
        steps_per_epoch=data.order.steps_per_epoch,
        optim=job.optim,
        accumulate=job.scale.accumulate,
        seed=data.order.seed,
        rank=rank,
        bfloat16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        max_bad_steps=job.scale.max_bad_steps,
    )
    agreement = Agreement(workers, device)
    with contextlib.ExitStack() as stack:
        recorder = wisher = None
        if rank == 0:
            recorder = stack.enter_context(Recorder(run, job, data, parts, first_step))
            wisher = stack.enter_context(Wisher(run, 60 * job.scale.checkpoint_minutes))
        for report in train(batches, model, parts.objective, parts.optimizer, plan, first_step, no_sync):
            all_wish = agreement.decide(Wishes() if wisher is None else wisher.wishes())
            is_last = report.step == job.total_steps
            validates = is_last or report.step % job.scale.checkpoint_every == 0
            saves = validates or all_wish.stop or all_wish.save
            logs = saves or report.step % job.scale.log_every == 0
            # A collective: all workers take part, the first one writes.
            seen = None
            if logs:
                report.settle()
                digests = np.stack([report.batch.place_B, digest_rows(report.batch)], axis=1)
                seen = gather_constant(torch.from_numpy(digests).to(device)).cpu().numpy()
            if recorder is not None and wisher is not None:
                recorder.add(report, seen, saves, validates)
                if saves:
                    wisher.saved()
            if saves:
                ray.train.report({"step": report.step, **report.terms})
            if all_wish.stop and not is_last:
                batches.close()
                return
        if recorder is not None:
            recorder.finish()


def agree_on_start(run: Storage, rank: int, device: torch.device) -> int:
    """The step of the newest whole checkpoint, as the first worker sees it; 0 without any."""
    found = newest_checkpoint(run) if rank == 0 else None
    step = torch.tensor(0 if found is None else found.step, device=device)
    if distributed.is_initialized():
        distributed.broadcast(step, src=0)
    return int(step)


def together(build: Callable[[], Parts], device: torch.device) -> Parts | None:
    """What each worker builds by itself, if all of them can; None where another one cannot, and says why.

    Otherwise the others would wait for it in the next collective, until that gives up after half an hour.

    Raises:
        MmkdError: This worker cannot.
    """
    built, failure = None, None
    try:
        built = build()
    except MmkdError as error:
        failure = error
    failures = torch.tensor(int(failure is not None), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(failures)
    if failure is not None:
        raise failure
    return None if failures else built


def prepare(job: Job, data: TrainData, run: Storage, first_step: int, device: torch.device) -> Parts:
    """Build what learns, the same on every worker, and restore it if the run goes on.

    Raises:
        TrainError: The checkpoint vanished or does not fit.
    """
    torch.manual_seed(seed_of(data.order.seed, "weights") % 2**63)
    student = Student(data.architecture).to(device)
    objective = job.objective().to(device)
    optimizer = build_optimizer({"student": student, "objective": objective}, job.optim)
    parts = Parts(student, objective, optimizer)
    if first_step == 0:
        job.start(student)
        return parts
    checkpoint = open_step(run, first_step)
    if checkpoint is None:
        raise TrainError(f"Checkpoint {first_step} of {run.uri} cannot be read by every worker. Is the lake shared?")
    restore(parts, checkpoint)
    logger.info("%s: going on from step %d of %d", job.stage, first_step, job.total_steps)
    return parts


def wrap(
    student: Student, workers: int, device: torch.device
) -> tuple[torch.nn.Module, Callable[[], AbstractContextManager[Any]]]:
    """DistributedDataParallel around the student when there is more than one worker."""
    if workers == 1:
        return student, contextlib.nullcontext
    if device.type == "cuda":
        synchronise(student)
    model = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)
    return model, model.no_sync
