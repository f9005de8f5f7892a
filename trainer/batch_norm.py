"""BatchNorm depends on which samples go through it together: all of a step's among GPUs, and said where not all."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(student: nn.Module) -> None:
    """Let all workers' GPUs normalise together; layers are replaced in place, their parameters stay the same objects.

    torch's own function would lose the activations that timm keeps inside such layers (EfficientNet, RegNet, ...).
    """
    from timm.layers.norm_act import convert_sync_batchnorm

    convert_sync_batchnorm(student)


def describe_parts(student: nn.Module, batch_size: int, workers: int, accumulate: int, gpu: bool) -> str | None:
    """A sentence on what the student's BatchNorm layers normalise by; None where it is the whole batch.

    Args:
        student: The model.
        batch_size: Global.
        workers: Among which it is dealt.
        accumulate: Micro-batches of each worker.
        gpu: Whether the workers normalise together.
    """
    layers = sum(isinstance(module, _BatchNorm) for module in student.modules())
    parts = accumulate if gpu else workers * accumulate
    if not layers or parts == 1:
        return None
    who = [f"{accumulate} micro-batches"] if accumulate > 1 else []
    who += [f"{workers} workers on a CPU"] if workers > 1 and not gpu else []
    return (
        f"the student has {layers} BatchNorm layers, and each of {' of '.join(who)} normalises by its own samples "
        f"(about {batch_size // parts} of the {batch_size}), so losses are not those of one worker in one pass. "
        f"{'GPUs normalise together; ' if workers > 1 and not gpu else ''}a student without BatchNorm trains alike."
    )
