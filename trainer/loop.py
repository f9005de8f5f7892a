"""The training loop: plain iterables in, steps out; it knows nothing of Ray, of storage or of the stage.

Shapes: M = a micro-batch's rows, B = this rank's rows, N = the global batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import TrainError
from common.logs import logger
from common.seeding import seed_of
from trainer.config import OptimConfig
from trainer.data import Batch, TeacherRows
from trainer.losses import clip_loss, gather_constant, gather_features
from trainer.objectives import Objective, Stage1Terms, Stage2Terms
from trainer.optim import learning_rate, set_learning_rate
from trainer.student import StudentOutput
from trainer.teacher_vectors import TeacherBatch


@dataclass(frozen=True)
class LoopPlan:
    """How many steps, and what happens in one."""

    total_steps: int
    steps_per_epoch: int
    optim: OptimConfig
    accumulate: int
    seed: int
    rank: int = 0
    bfloat16: bool = False
    """Autocast the student's forward; losses stay in float32."""
    max_bad_steps: int = 3
    """Steps in a row whose loss is not finite, after which training stops."""


@dataclass
class StepReport:
    """What one optimiser step did."""

    step: int
    """Steps done, this one included."""
    epoch: int
    terms: dict[str, float]
    grad_norm: float
    lr: float
    batch: Batch
    """This rank's share."""
    wait_seconds: float
    """Time this step waited for its batch."""
    seconds: float
    """Time of the whole step, waiting included."""
    skipped: bool = False


def train(
    batches: Iterable[Batch],
    student: torch.nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    plan: LoopPlan,
    first_step: int,
    no_sync: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[StepReport]:
    """Train, one report per step; what to do between steps (log, validate, save) is the caller's affair.

    Args:
        batches: This rank's share of steps ``first_step`` to ``plan.total_steps``, in order.
        student: Called as ``student(pixels, tokens)``; may be wrapped in DistributedDataParallel.
        objective: Sees the global batch.
        optimizer: Over the parameters of both.
        plan: See there.
        first_step: Steps done before.
        no_sync: Context under which a backward pass does not exchange gradients.

    Raises:
        TrainError: The loss was not finite several times in a row.
    """
    device = next(student.parameters()).device
    bad = 0
    stream = timed(batches)
    for step, (batch, wait_seconds) in enumerate(stream, start=first_step):
        started = time.perf_counter()
        set_learning_rate(optimizer, rate := learning_rate(step, plan.total_steps, plan.optim))
        optimizer.zero_grad(set_to_none=True)
        terms = forward_backward(batch, student, objective, plan, step, device, no_sync)
        grad_norm = clip_gradients(optimizer, plan.optim.clip_norm)
        values = {name: float(value.detach()) for name, value in terms._asdict().items()}
        del terms  # of a skipped step it still holds the whole graph
        finite = torch.isfinite(torch.tensor([values["total"], grad_norm])).all().item()
        bad = 0 if finite else bad + 1
        if finite:
            optimizer.step()
            objective.after_step()
        else:
            complain(step, batch, values, grad_norm)
            if bad >= plan.max_bad_steps:
                raise TrainError(_given_up(step, values, bad))
        seconds = time.perf_counter() - started + wait_seconds
        yield StepReport(
            step + 1,
            step // plan.steps_per_epoch,
            values,
            grad_norm,
            rate,
            batch,
            wait_seconds,
            seconds,
            not finite,
        )


def forward_backward(
    batch: Batch,
    student: torch.nn.Module,
    objective: Objective,
    plan: LoopPlan,
    step: int,
    device: torch.device,
    no_sync: Callable[[], AbstractContextManager[Any]],
) -> Stage1Terms | Stage2Terms:
    """Leave the gradient of the global batch's loss in the parameters, in one or several micro-batches.

    A contrastive loss is not a sum over rows, so several micro-batches take two passes: features of all without
    gradient, the loss's gradient with respect to them, then each micro-batch again with its part of that gradient.
    """
    pixels_BHWC, tokens_BL = (torch.tensor(part).to(device) for part in (batch.pixels_BHWC, batch.tokens_BL))
    teachers = {name: to_device(rows, device) for name, rows in batch.teachers.items()}
    said: tuple[dict[str, TeacherBatch], torch.Tensor | None, torch.Tensor | None] = (teachers, None, None)
    if teachers:
        draws_NK, places_N = (gather_constant(torch.tensor(x).to(device)) for x in (batch.draws_BK, batch.place_B))
        said = (teachers, draws_NK, places_N)
    rows = -(-len(pixels_BHWC) // plan.accumulate)
    parts = list(zip(pixels_BHWC.split(rows), tokens_BL.split(rows), strict=True))

    def embed(micro: int) -> StudentOutput:
        # Dropout masks follow from the position, so the second pass repeats them and a resumed run does too.
        torch.manual_seed(seed_of(plan.seed, "dropout", step, plan.rank, micro) % 2**63)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.bfloat16):
            return StudentOutput(*student(*parts[micro]))

    if len(parts) == 1:
        terms = objective(gathered(embed(0)), *said)
        if torch.isfinite(terms.total):
            terms.total.backward()
        return terms
    with torch.no_grad():
        passes = [embed(micro) for micro in range(len(parts))]
    leaves = StudentOutput(*(torch.cat(side).requires_grad_() for side in zip(*passes, strict=True)))
    terms = objective(gathered(leaves), *said)
    if torch.isfinite(terms.total):
        terms.total.backward()
        for micro in range(len(parts)):
            last = micro == len(parts) - 1
            with contextlib.nullcontext() if last else no_sync():
                output = embed(micro)
                torch.autograd.backward(output, [leaf.grad.split(rows)[micro] for leaf in leaves])  # type: ignore[union-attr]
    return terms


def gathered(output: StudentOutput) -> StudentOutput:
    """All ranks' features, in rank order, with gradient."""
    return StudentOutput(gather_features(output.image_BD), gather_features(output.text_BD))


def to_device(rows: TeacherRows, device: torch.device) -> TeacherBatch:
    """One teacher's rows of the global batch on the device."""
    parts = (rows.image_BT, rows.text_BT, rows.image_mask_B, rows.text_mask_B)
    return TeacherBatch(*(gather_constant(torch.tensor(part).to(device)) for part in parts))


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None) -> float:
    """Shorten the gradient to ``limit`` if there is one and it is longer; returns its length before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))


def complain(step: int, batch: Batch, values: dict[str, float], grad_norm: float) -> None:
    """Name the samples of a batch whose loss is not finite."""
    logger.warning(
        "step %d: loss %s with gradient norm %s is not finite; the step is skipped. Its samples: %s",
        step,
        values,
        grad_norm,
        ", ".join(batch.sample_ids),
    )


def _given_up(step: int, values: dict[str, float], bad: int) -> str:
    return (
        f"The loss was not finite in {bad} steps in a row, up to step {step}: {values}. Lower optim.lr, lengthen "
        "optim.warmup_steps, or look at the samples named in the log. The last checkpoint is unharmed. "
        "scale.max_bad_steps allows more."
    )


def timed(batches: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with the seconds it kept the loop waiting."""
    iterator = iter(batches)
    while True:
        started = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch, time.perf_counter() - started


@torch.no_grad()
def validation_loss(batches: Iterable[Batch], student: torch.nn.Module, scale: float) -> float:
    """Mean contrastive loss of clean pairs, one rank on its own; the mode of the student is put back.

    Every batch has the same number of rows, since the loss depends on it.
    """
    device = next(student.parameters()).device
    was_training = student.training
    student.eval()
    losses = []
    for batch in batches:
        output = student(torch.tensor(batch.pixels_BHWC).to(device), torch.tensor(batch.tokens_BL).to(device))
        losses.append(float(clip_loss(output.image_BD, output.text_BD, torch.tensor(scale, device=device))))
    student.train(was_training)
    return sum(losses) / len(losses)
