"""The training loop: plain iterables in, steps out; it knows nothing of Ray, of storage or of the stage.

Shapes: M = a micro-batch's rows, B = this rank's rows, N = the global batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from common.errors import TrainError
from common.logs import logger
from common.seeding import seed_of
from trainer.config import OptimConfig
from trainer.data import Batch
from trainer.losses import clip_loss, gather_features
from trainer.objectives import Objective, Stage1Terms, Stage2Terms
from trainer.optim import learning_rate, set_learning_rate
from trainer.student import StudentOutput
from trainer.transfer import DeviceBatch, Sender

GRAD_NORM = "grad_norm"
LOOK_BACK = 4
"""Steps that a GPU may have before it; see :class:`BadSteps`."""


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


class StepReport:
    """What one optimiser step did. Its numbers stay on the device until somebody asks for them.

    Attributes:
        step: Steps done, this one included.
        epoch: Of the step.
        lr: Learning rate.
        batch: This rank's share.
        wait_seconds: Time this step waited for its batch.
        seconds: Time of the whole step, waiting included. On a GPU, until it was handed over, and what was waited for
            steps before it; together they are the device's time once a step is settled.
    """

    def __init__(
        self,
        step: int,
        epoch: int,
        numbers: StepNumbers,
        lr: float,
        batch: Batch,
        wait_seconds: float,
        seconds: float,
    ) -> None:
        self.step, self.epoch, self.lr, self.batch = step, epoch, lr, batch
        self.wait_seconds, self.seconds = wait_seconds, seconds
        self._numbers = numbers

    @cached_property
    def _values(self) -> dict[str, float]:
        return self._numbers.fetch()

    def settle(self) -> None:
        """Wait until the step is over, and count that as its time: before a row with a rate is written."""
        started = time.perf_counter()
        _ = self._values
        self.seconds += time.perf_counter() - started

    @property
    def terms(self) -> dict[str, float]:
        """The loss and its parts, by name."""
        return {name: value for name, value in self._values.items() if name != GRAD_NORM}

    @property
    def grad_norm(self) -> float:
        """Length of the gradient before it was shortened."""
        return self._values[GRAD_NORM]

    @property
    def skipped(self) -> bool:
        """Whether the loss or the gradient was not finite, and nothing was learned."""
        return not (math.isfinite(self.terms["total"]) and math.isfinite(self.grad_norm))


class StepNumbers:
    """A step's losses and its gradient's length, on their way from the device.

    Args:
        names: Of the numbers.
        values: Float32 scalars on the device, in the same order.
    """

    def __init__(self, names: Sequence[str], values: Sequence[torch.Tensor]) -> None:
        self._names = tuple(names)
        stacked = torch.stack([value.detach().float() for value in values])
        self._event = None
        if stacked.is_cuda:
            # Queued now, behind this step: asked for later, the copy would wait for the steps after it as well.
            stacked = stacked.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._values = stacked

    def fetch(self) -> dict[str, float]:
        """The numbers, waiting for the step to end if it has not."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


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
    sender, watch = Sender(device), BadSteps(plan.max_bad_steps, LOOK_BACK if device.type == "cuda" else 0)
    stream = timed(batches)
    for step, (batch, wait_seconds) in enumerate(stream, start=first_step):
        started = time.perf_counter()
        set_learning_rate(optimizer, rate := learning_rate(step, plan.total_steps, plan.optim))
        optimizer.zero_grad(set_to_none=True)
        terms = forward_backward(sender.send(batch), student, objective, plan, step, no_sync)
        grad_norm = clip_gradients(optimizer, plan.optim.clip_norm)
        is_finite = torch.isfinite(terms.total.detach()) & torch.isfinite(grad_norm)
        numbers = StepNumbers([*terms._fields, GRAD_NORM], [*terms, grad_norm])
        del terms  # it holds the whole graph
        step_if(optimizer, is_finite)
        objective.after_step(is_finite)
        report = StepReport(step + 1, step // plan.steps_per_epoch, numbers, rate, batch, wait_seconds, 0.0)
        watch.add(report)
        if step + 1 == plan.total_steps:
            watch.finish()  # before the last checkpoint is saved, by which the run counts as finished
        report.seconds = time.perf_counter() - started + wait_seconds
        yield report


def step_if(optimizer: torch.optim.Optimizer, is_finite: torch.Tensor) -> None:
    """Take a step where a flag on the device says so; elsewhere weights, moments and step counts stay as they are.

    The fused optimiser looks at the flag itself, as it does for a gradient scaler, so nobody waits for the device.
    """
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()


class BadSteps:
    """Names the steps whose loss was not finite, and ends training when too many come in a row.

    Args:
        most: In a row.
        look_back: Steps that may be on their way before the first of them is looked at; waiting for each would keep
            the device idle between any two.
    """

    def __init__(self, most: int, look_back: int) -> None:
        self.most, self.look_back = most, look_back
        self._waiting: deque[StepReport] = deque()
        self._in_a_row = 0

    def add(self, report: StepReport) -> None:
        """Look at the step ``look_back`` steps ago.

        Raises:
            TrainError: Too many in a row.
        """
        self._waiting.append(report)
        while len(self._waiting) > self.look_back:
            self._look()

    def finish(self) -> None:
        """Look at the rest.

        Raises:
            TrainError: Too many in a row.
        """
        while self._waiting:
            self._look()

    def _look(self) -> None:
        report = self._waiting.popleft()
        self._in_a_row = self._in_a_row + 1 if report.skipped else 0
        if report.skipped:
            complain(report.step - 1, report.batch, report.terms, report.grad_norm)
        if self._in_a_row >= self.most:
            raise TrainError(_given_up(report.step - 1, report.terms, self._in_a_row))


def forward_backward(
    batch: DeviceBatch,
    student: torch.nn.Module,
    objective: Objective,
    plan: LoopPlan,
    step: int,
    no_sync: Callable[[], AbstractContextManager[Any]],
) -> Stage1Terms | Stage2Terms:
    """Leave the gradient of the global batch's loss in the parameters, in one or several micro-batches.

    A contrastive loss is not a sum over rows, so several micro-batches take two passes: features of all without
    gradient, the loss's gradient with respect to them, then each micro-batch again with its part of that gradient.
    """
    pixels_BHWC, tokens_BL = batch.pixels_BHWC, batch.tokens_BL
    said = (batch.teachers, batch.draws_NK, batch.places_N)
    device = pixels_BHWC.device
    rows = -(-len(pixels_BHWC) // plan.accumulate)
    parts = list(zip(pixels_BHWC.split(rows), tokens_BL.split(rows), strict=True))

    def embed(micro: int) -> StudentOutput:
        # Dropout masks follow from the position, so the second pass repeats them and a resumed run does too.
        torch.manual_seed(seed_of(plan.seed, "dropout", step, plan.rank, micro) % 2**63)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.bfloat16):
            return StudentOutput(*student(*parts[micro]))

    if len(parts) == 1:
        terms = objective(gathered(embed(0)), *said)
        terms.total.backward()
        return terms
    with torch.no_grad():
        passes = [embed(micro) for micro in range(len(parts))]
    leaves = StudentOutput(*(torch.cat(side).requires_grad_() for side in zip(*passes, strict=True)))
    terms = objective(gathered(leaves), *said)
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


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None) -> torch.Tensor:
    """Shorten the gradient to ``limit`` if there is one and it is longer; returns its length before, on the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)


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
