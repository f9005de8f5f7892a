"""The optimizer holds all that learns, decays matrices only, and survives a round trip."""

import pytest
import torch

from common.storage import Storage
from trainer.architecture import read_architecture
from trainer.config import DistillConfig, OptimConfig
from trainer.objectives import DistillObjective
from trainer.optim import build_optimizer, learning_rate, load_optimizer_tensors, optimized, optimizer_tensors
from trainer.student import Student


@pytest.fixture
def modules(student_folder):
    student = Student(read_architecture(Storage(str(student_folder))))
    return {"student": student, "objective": DistillObjective(DistillConfig(), {"t": 10.0}, 10.0)}


def take_step(modules, optimizer, seed=0):
    torch.manual_seed(seed)
    for _, parameter in optimized(optimizer):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_every_parameter_with_a_gradient_is_optimized(modules):
    learning = {id(p) for module in modules.values() for p in module.parameters() if p.requires_grad}
    optimizer = build_optimizer(modules, OptimConfig())
    assert {id(p) for _, p in optimized(optimizer)} == learning
    names = {name for name, _ in optimized(optimizer)}
    assert {"objective.scale.log", "objective.distill_scale.log"} <= names
    assert not any(name.endswith("logit_scale") for name in names)


def test_only_matrices_decay(modules):
    optimizer = build_optimizer(modules, OptimConfig(weight_decay=0.3))
    for group in optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}


def test_restored_state_continues_exactly(modules):
    optimizer = build_optimizer(modules, OptimConfig())
    take_step(modules, optimizer)
    saved = optimizer_tensors(optimizer)
    weights = {name: p.detach().clone() for name, p in optimized(optimizer)}
    take_step(modules, optimizer, seed=1)
    expected = {name: p.detach().clone() for name, p in optimized(optimizer)}
    fresh = build_optimizer(modules, OptimConfig())
    with torch.no_grad():
        for name, parameter in optimized(fresh):
            parameter.copy_(weights[name])
    load_optimizer_tensors(fresh, saved)
    take_step(modules, fresh, seed=1)
    for name, parameter in optimized(fresh):
        assert torch.equal(parameter, expected[name]), name


def test_warm_up_then_cosine():
    config = OptimConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(step, 12, config) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(12, 12, config) == pytest.approx(0)
    assert learning_rate(2, 3, config) == 1.0  # a warm-up longer than the run ends with it
