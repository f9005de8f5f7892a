"""The loop on plain lists: learns, accumulates exactly, skips what is not finite, and knows when to stop."""

import dataclasses
import itertools
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import distributed

from common.errors import TrainError
from common.lake import open_lake
from common.storage import Storage
from trainer.architecture import read_architecture
from trainer.config import DataConfig, DistillConfig, OptimConfig
from trainer.data import Batch, TeacherRows, TrainData
from trainer.feed import local_batches
from trainer.launch import build_order, find_rows
from trainer.loop import BadSteps, LoopPlan, StepNumbers, StepReport, forward_backward, train, validation_loss
from trainer.objectives import ContrastiveObjective, DistillObjective
from trainer.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from trainer.student import Student, StudentOutput
from trainer.transfer import Sender

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


def sent(batch: Batch):
    return Sender(torch.device("cpu")).send(batch)


def gradients(student, objective, batch, plan):
    for parameter in [*student.parameters(), *objective.parameters()]:
        parameter.grad = None
    terms = forward_backward(sent(batch), student, objective, plan, 0, None)
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
    terms = forward_backward(sent(batch), student, objective, plan, 0, contextlib.nullcontext)
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
    forward_backward(sent(make_batch()), noisy, ContrastiveObjective(0.07), plan, 3, contextlib.nullcontext)
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


def test_a_skipped_step_leaves_moments_and_step_counts_alone(student):
    objective = DistillObjective(DistillConfig(queue=16), {"t": 10.0}, 10.0, 16, {"t": (5, 5)})
    optimizer = build_optimizer({"student": student, "objective": objective}, PLAN.optim)
    reports = train([make_batch(), broken(make_batch())], student, objective, optimizer, PLAN, first_step=0)
    next(reports)
    before, queue = optimizer_tensors(optimizer), {k: v.clone() for k, v in objective.state_dict().items()}
    assert next(reports).skipped
    after = optimizer_tensors(optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(queue[name], value) for name, value in objective.state_dict().items())


def test_what_is_looked_at_later_is_named_with_its_own_step_and_stops_the_run_too(caplog):
    logging.getLogger("mmkd").propagate = True
    watch, bad = BadSteps(most=2, look_back=3), {2, 5, 6}

    def report(step):
        loss = torch.tensor(float("nan") if step in bad else 1.0)
        numbers = StepNumbers(["total", "grad_norm"], [loss, torch.tensor(1.0)])
        return StepReport(step + 1, 0, numbers, 0.1, make_batch(), 0.0, 1.0)

    with caplog.at_level(logging.WARNING, "mmkd"):
        for step in range(8):
            watch.add(report(step))
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["step 2"]
        with pytest.raises(TrainError, match="2 steps in a row, up to step 6"):
            watch.finish()


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


class Dropping(torch.nn.Module):
    """A student with dropout, whose masks must follow from the step."""

    def __init__(self, student):
        super().__init__()
        self.inner = student

    def forward(self, pixels, tokens):
        return StudentOutput(*(F.normalize(F.dropout(side, 0.2), dim=-1) for side in self.inner(pixels, tokens)))


def test_going_on_from_a_state_is_the_same_as_never_having_stopped(tiny_lake, student_folder):
    lake, teachers = open_lake(tiny_lake), ("alpha", "beta")
    config = DataConfig(batch_size=16, lanes=4)
    order = build_order(find_rows(lake, teachers, "sel", 0), config, lake)
    architecture = read_architecture(Storage(str(student_folder)))
    data = TrainData(lake.uri, order, architecture, config.crop_scale, teachers, "sel")
    plan = dataclasses.replace(PLAN, steps_per_epoch=order.steps_per_epoch)
    assert 3 % plan.steps_per_epoch, "the stop should be within an epoch"

    def parts(seed):
        torch.manual_seed(seed)
        weights = DistillConfig(heads=1.0, drop_teachers=0.5, queue=24)
        student, dims = Student(architecture), {"alpha": (8, 8), "beta": (12, 12)}
        objective = DistillObjective(weights, dict.fromkeys(teachers, 20.0), 10.0, 16, dims)
        return student, objective, build_optimizer({"student": student, "objective": objective}, plan.optim)

    def steps(student, objective, optimizer, first, stop):
        batches = local_batches(data, first, plan.total_steps)
        reports = train(batches, Dropping(student), objective, optimizer, plan, first_step=first)
        return list(itertools.islice(reports, stop - first))

    whole = steps(*parts(0), 0, 6)
    student, objective, optimizer = parts(0)
    start = steps(student, objective, optimizer, 0, 3)
    saved = student.tensors(0.0), objective.state_dict(), optimizer_tensors(optimizer)
    student, objective, optimizer = parts(1)
    student.load_tensors(saved[0], "memory")
    objective.load_state_dict(saved[1])
    load_optimizer_tensors(optimizer, saved[2])
    rest = steps(student, objective, optimizer, 3, 6)
    assert [report.step for report in rest] == [4, 5, 6]
    for ours, theirs in zip([*start, *rest], whole, strict=True):
        assert ours.batch.sample_ids == theirs.batch.sample_ids
        assert (ours.step, ours.epoch, ours.lr) == (theirs.step, theirs.epoch, theirs.lr)
        assert ours.terms == pytest.approx(theirs.terms, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)


def test_two_ranks_skip_the_step_in_which_one_of_them_is_not_finite(student_folder, tmp_path):
    address = f"file://{tmp_path}/meeting"
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), address, str(student_folder), str(tmp_path)])
        for rank in range(2)
    ]
    assert [process.wait(120) for process in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"rank-{rank}") for rank in range(2)]
    for rank, (skipped, parameters, log) in enumerate(found):
        # One rank's teacher in the second step, one rank's gradient in the fourth.
        assert skipped == [False, True, False, True, False]
        for step in range(1, 5):
            assert torch.equal(parameters[step], parameters[step - 1]) == skipped[step], step
        assert torch.isfinite(parameters[-1]).all()
        # Each names its own share, so that the log of all names the sample.
        assert [line.partition(": ")[0] for line in log] == ["step 1", "step 3"]
        assert all(line.endswith(", ".join(f"{rank}-{i}" for i in range(8))) for line in log)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(ours, theirs)


def _one_of_two(rank, address, student_folder, folder):
    torch.set_num_threads(1)  # two processes on two cores
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("mmkd").addHandler(handler)
    torch.manual_seed(0)
    student = Student(read_architecture(Storage(student_folder)))
    objective = DistillObjective(DistillConfig(), {"t": 10.0}, 10.0)
    optimizer = build_optimizer({"student": student, "objective": objective}, PLAN.optim)
    learns = [*student.parameters(), *objective.parameters()]
    batches = [
        dataclasses.replace(make_batch(2 * step + rank), sample_ids=[f"{rank}-{i}" for i in range(8)])
        for step in range(5)
    ]
    if rank == 1:
        batches[1] = broken(batches[1])
        backward_passes = iter(range(5))
        first = next(p for p in student.parameters() if p.requires_grad)
        first.register_hook(lambda gradient: gradient * float("inf") if next(backward_passes) == 3 else gradient)
    model = torch.nn.parallel.DistributedDataParallel(student)
    skipped, parameters = [], []
    for report in train(batches, model, objective, optimizer, PLAN, 0, model.no_sync):
        skipped.append(report.skipped)
        parameters.append(torch.cat([parameter.detach().flatten() for parameter in learns]))
    torch.save((skipped, parameters, log), f"{folder}/rank-{rank}")
    distributed.barrier()
    os._exit(0)  # gloo's threads, if still running, would abort an ordinary interpreter exit


if __name__ == "__main__":  # one of the two processes of the test above
    _one_of_two(int(sys.argv[1]), *sys.argv[2:])
