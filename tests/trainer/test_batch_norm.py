"""What goes through BatchNorm together: what is said where it is not the whole batch, and nothing lost among GPUs."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from trainer.batch_norm import describe_parts, synchronise


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(BatchNormAct2d(4)))


@pytest.mark.parametrize(
    ("workers", "accumulate", "gpu", "said"),
    [
        (2, 1, False, "2 BatchNorm layers, and each of 2 workers on a CPU normalises by its own samples (about 8 of"),
        (1, 4, False, "each of 4 micro-batches normalises by its own samples (about 4 of the 16)"),
        (
            2,
            2,
            False,
            "each of 2 micro-batches of 2 workers on a CPU normalises by its own samples (about 4 of the 16)",
        ),
        (2, 2, True, "each of 2 micro-batches normalises by its own samples (about 8 of the 16)"),
    ],
)
def test_parts_of_a_batch_that_are_normalised_alone_are_told(workers, accumulate, gpu, said):
    assert said in describe_parts(net(), 16, workers, accumulate, gpu)


def test_nothing_is_said_where_nothing_differs():
    assert describe_parts(net(), 16, 1, 1, False) is None
    assert describe_parts(net(), 16, 2, 1, True) is None
    assert describe_parts(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 16, 2, 2, False) is None


def test_layers_that_normalise_together_keep_activations_and_parameters():
    model = net()
    model(torch.randn(8, 3, 6, 6))  # statistics of its own
    pixels, parameters = torch.randn(2, 3, 6, 6), [id(one) for one in model.parameters()]
    expected = model.eval()(pixels)
    synchronise(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == 2
    assert torch.equal(model(pixels), expected)
    assert [id(one) for one in model.parameters()] == parameters
