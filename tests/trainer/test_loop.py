"""The loop on plain lists: learns, accumulates exactly, skips what is not finite, and knows when to stop."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

from common.errors import TrainError
from common.storage import Storage
from trainer.architecture import read_architecture
from trainer.config import DistillConfig, OptimConfig
from trainer.data import Batch, TeacherRows
from trainer.loop import LoopPlan, forward_backward, train, validation_loss
from trainer.objectives import ContrastiveObjective, DistillObjective
from trainer.optim import build_optimizer
from trainer.student import Student

PLAN = LoopPlan(total_steps=6, steps_per_epoch=2, optim=OptimConfig(lr=1e-3, warmup_steps=1), accumulate=1, seed=0)


@pytest.fixture
def student(student_folder):
    torch.manual_seed(0)
    return Student(read_architecture(Storage(str(student_folder))))


def make_batch(seed=0, rows=8) -> Batch:
    draw = np.random.default_rng(seed)

    def unit(width):
        x = draw.normal(size=(rows, width)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    mask = draw.random(rows) < 0.8
    return Batch(
        place_B=np.arange(rows),
        sample_ids=[f"sample-{i}" for i in range(rows)],
        pixels_BHWC=draw.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8),
        tokens_BL=draw.integers(2, 16, (rows, 12), dtype=np.int32),
        teachers={"t": TeacherRows(unit(5), unit(5), mask, mask)},
        draws_BK=draw.random((rows, 2), dtype=np.float32),
    )


def gradients(student, objective, batch, plan):
    for parameter in [*student.parameters(), *objective.parameters()]:
        parameter.grad = None
    terms = forward_backward(batch, student, objective, plan, 0, torch.device("cpu"), None)
    named = [*student.named_parameters(), *objective.named_parameters()]
    return terms.total.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def run(student, batches, plan=PLAN):
    objective = ContrastiveObjective(0.07)
    optimizer = build_optimizer({"student": student, "objective": objective}, plan.optim)
    return list(train(batches, student, objective, optimizer, plan, first_step=0))


def test_training_on_one_batch_learns_it(student):
    plan = dataclasses.replace(PLAN, total_steps=40)
    reports = run(student, [make_batch()] * 40, plan)
    assert [report.step for report in reports] == list(range(1, 41))
    assert reports[-1].epoch == 19
    assert reports[-1].terms["total"] < reports[0].terms["total"] / 4


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(student, accumulate):
    import contextlib

    objective = DistillObjective(DistillConfig(text_text=0.5), {"t": 10.0}, 10.0)
    batch = make_batch()
    whole_loss, whole = gradients(student, objective, batch, PLAN)
    plan = dataclasses.replace(PLAN, accumulate=accumulate)
    terms = None
    for parameter in [*student.parameters(), *objective.parameters()]:
        parameter.grad = None
    terms = forward_backward(batch, student, objective, plan, 0, torch.device("cpu"), contextlib.nullcontext)
    assert terms.total.item() == pytest.approx(whole_loss, rel=1e-5)
    for name, parameter in [*student.named_parameters(), *objective.named_parameters()]:
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-3, atol=1e-5)


def test_accumulation_repeats_dropout(student):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = student, []

        def forward(self, pixels, tokens):
            mask = torch.rand(2)
            self.calls.append(mask.tolist())
            return self.inner(pixels, tokens)

    import contextlib

    noisy = Noisy()
    plan = dataclasses.replace(PLAN, accumulate=2)
    forward_backward(
        make_batch(), noisy, ContrastiveObjective(0.07), plan, 3, torch.device("cpu"), contextlib.nullcontext
    )
    assert noisy.calls[:2] == noisy.calls[2:]
    assert noisy.calls[0] != noisy.calls[1]


def broken(batch: Batch) -> Batch:
    rows = TeacherRows(
        *(np.full_like(x, np.nan) if x.dtype == np.float32 else x for x in dataclasses.astuple(batch.teachers["t"]))
    )
    return dataclasses.replace(batch, teachers={"t": rows})


def run_distillation(student, batches, plan=PLAN):
    objective = DistillObjective(DistillConfig(), {"t": 10.0}, 10.0)
    optimizer = build_optimizer({"student": student, "objective": objective}, plan.optim)
    return train(batches, student, objective, optimizer, plan, first_step=0)


def test_a_step_that_is_not_finite_is_skipped_and_named(student, caplog):
    logging.getLogger("mmkd").propagate = True
    reports = run_distillation(student, [make_batch(), broken(make_batch()), make_batch()])
    next(reports)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    with caplog.at_level(logging.WARNING, "mmkd"):
        assert next(reports).skipped
    assert "sample-0, sample-1" in caplog.text
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert not next(reports).skipped


def test_several_such_steps_in_a_row_stop_the_run(student):
    with pytest.raises(TrainError, match=r"not finite in 3 steps in a row.*optim\.lr"):
        list(run_distillation(student, [broken(make_batch())] * 5))
    patient = dataclasses.replace(PLAN, max_bad_steps=5)
    assert all(report.skipped for report in run_distillation(student, [broken(make_batch())] * 4, patient))
    with pytest.raises(TrainError, match=r"not finite in 5 steps in a row.*scale\.max_bad_steps"):
        list(run_distillation(student, [broken(make_batch())] * 5, patient))


def test_validation_leaves_the_student_in_training_mode(student):
    student.train()
    value = validation_loss([make_batch(0), make_batch(1)], student, scale=10.0)
    assert value > 0
    assert student.training
    assert value == validation_loss([make_batch(0), make_batch(1)], student, scale=10.0)


def test_the_same_start_gives_the_same_losses(student):
    start = {name: value.clone() for name, value in student.state_dict().items()}
    first = run(student, [make_batch(step) for step in range(4)])
    student.load_state_dict(start)
    again = run(student, [make_batch(step) for step in range(4)])
    assert [r.terms for r in first] == [r.terms for r in again]
