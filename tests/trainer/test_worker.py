"""What all workers must have before they train: where one has not, none waits for it."""

from multiprocessing import get_context

import pytest
import torch
from torch import distributed

from common.errors import TrainError
from trainer.worker import together

CPU = torch.device("cpu")


def fail():
    raise TrainError("the checkpoint is torn")


def test_alone_a_worker_has_it_or_says_why():
    assert together(lambda: "parts", CPU) == "parts"
    with pytest.raises(TrainError, match="torn"):
        together(fail, CPU)


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_where_one_of_two_cannot_the_other_does_not_wait(tmp_path, failing):
    context = get_context("spawn")
    answers = context.Queue()
    address = f"file://{tmp_path}/meet"
    workers = [context.Process(target=_one_of_two, args=(rank, address, failing, answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict(answers.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert found == {
        rank: "parts" if failing is None else ("the checkpoint is torn" if rank == failing else None)
        for rank in range(2)
    }


def _one_of_two(rank, address, failing, answers):
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        answers.put((rank, together(fail if rank == failing else lambda: "parts", CPU)))
    except TrainError as error:
        answers.put((rank, str(error)))
    distributed.barrier()
    distributed.destroy_process_group()
