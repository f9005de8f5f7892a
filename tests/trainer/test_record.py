"""What the progress line says of a step."""

import time

import numpy as np
import pytest
import torch

from common.errors import StorageError
from common.storage import Storage
from trainer.late_writes import LateWrites
from trainer.loop import StepNumbers, StepReport
from trainer.record import Pace, describe_terms


def report(seconds, waited) -> StepReport:
    numbers = StepNumbers(["total", "grad_norm"], [torch.tensor(1.0), torch.tensor(1.0)])
    return StepReport(1, 0, numbers, 0.1, np.zeros(1), waited, seconds)


def test_a_loss_is_shown_with_the_terms_it_has():
    assert describe_terms({"contrastive": 2.5, "total": 2.5}) == "loss 2.500"
    terms = {"contrastive": 2.0, "image_text": 0.5, "cross": 0.0, "total": 3.5}
    assert describe_terms(terms) == "loss 3.500 (contrastive 2.000, image_text 0.500)"


def test_the_pace_is_of_all_steps_so_far():
    pace = Pace()
    assert pace.describe() == ""
    pace.add(report(1.0, 0.1), 64)
    pace.add(report(3.0, 0.3), 64)
    assert pace.describe() == "; 32 samples/s, 10% of the time waiting for data"


def test_what_is_waited_for_a_step_at_a_row_of_the_log_is_its_time():
    class Late(StepNumbers):
        def fetch(self):
            time.sleep(0.05)
            return super().fetch()

    late = StepReport(1, 0, Late(["total", "grad_norm"], [torch.tensor(1.0)] * 2), 0.1, np.zeros(1), 0.0, 1.0)
    late.settle()
    once = late.seconds
    assert once >= 1.05
    late.settle()
    assert late.seconds - once < 0.05


class Slow(Storage):
    """A storage that is far away."""

    def write_bytes(self, relative, data):
        time.sleep(0.1)
        super().write_bytes(relative, data)


def test_a_file_is_stored_beside_the_training_and_the_newest_version_stays(tmp_path):
    run = Slow(str(tmp_path))
    late, begun = LateWrites(run), time.monotonic()
    for version in (b"1\n", b"1\n2\n"):
        late.write("metrics.jsonl", version)
    assert time.monotonic() - begun < 0.1
    late.wait()
    assert run.read_bytes("metrics.jsonl") == b"1\n2\n"


def test_what_cannot_be_stored_is_told_to_whoever_waits(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    late = LateWrites(Storage(str(tmp_path / "runs" / "r")))
    late.write("metrics.jsonl", b"1\n")
    with pytest.raises(StorageError, match="metrics.jsonl"):
        late.wait()
    late.wait()  # once
