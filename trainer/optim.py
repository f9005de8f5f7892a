"""AdamW over everything that learns, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from trainer.config import OptimConfig


def build_optimizer(modules: dict[str, nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """Optimise every parameter of the modules that takes a gradient.

    Args:
        modules: Name -> module; the names prefix the parameters' names in the optimizer's state.
        config: Rates and decay; decay applies to parameters of two or more dimensions only.
    """
    named = [
        (f"{prefix}.{name}", parameter)
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    groups = [
        {"params": [item for item in named if item[1].ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [item for item in named if item[1].ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Linear warm-up to ``config.lr``, then half a cosine down to 0 at the end; steps count from 0."""
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return config.lr * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use a rate for the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimized(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, torch.Tensor]]:
    """Name and tensor of everything the optimizer changes."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors: ``<parameter>/<entry>`` -> value, on the CPU."""
    return {
        f"{name}/{entry}": value.detach().cpu().clone()
        for name, parameter in optimized(optimizer)
        for entry, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore what :func:`optimizer_tensors` gave; parameters that never had a gradient have no state."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(name, {})[entry] = value
    for name, parameter in optimized(optimizer):
        if name in state:
            optimizer.state[parameter] = {
                entry: value.to(parameter.device).clone() for entry, value in state[name].items()
            }
