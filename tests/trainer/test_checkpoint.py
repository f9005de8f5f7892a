"""Checkpoints: whole or not there, newest whole one first, pruned but never the best, on disk and on S3."""

import pytest
import torch

from common.errors import TrainError
from common.storage import Storage
from trainer.architecture import read_architecture
from trainer.checkpoint import (
    BEST,
    MODEL,
    STATE,
    checkpoint_steps,
    load_checkpoint,
    newest_checkpoint,
    prune,
    record_best,
    save_checkpoint,
)


@pytest.fixture
def run(tmp_path) -> Storage:
    return Storage(str(tmp_path / "lake" / "runs" / "r"))


@pytest.fixture
def save(student_folder):
    architecture = read_architecture(Storage(str(student_folder)))

    def save_step(run, step):
        tensors = {name: {"x": torch.full((3,), float(step))} for name in (MODEL, "objective.safetensors")}
        return save_checkpoint(run, step, tensors, {"step": step}, architecture)

    return save_step


def test_a_checkpoint_gives_back_what_was_saved(run, save):
    saved = save(run, 7)
    found = load_checkpoint(saved.uri)
    assert found.step == 7
    assert found.state() == {"step": 7}
    assert found.tensors(MODEL)["x"].tolist() == [7, 7, 7]
    assert found.architecture().identity["config"]["model_cfg"]["embed_dim"] == 16
    assert set(found.architecture().tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}


def test_no_file_of_a_checkpoint_is_a_pickle(run, save):
    names = set(save(run, 1).folder.list_files())
    assert {name.rpartition(".")[2] for name in names} == {"safetensors", "json"}


@pytest.mark.parametrize("damage", ["manifest", "missing", "short", "changed"])
def test_a_torn_checkpoint_is_passed_over(run, save, damage):
    save(run, 1)
    folder = save(run, 2).folder
    if damage == "manifest":
        folder.remove("checkpoint.json")
    elif damage == "missing":
        folder.remove(MODEL)
    else:
        data = folder.read_bytes(MODEL)
        folder.write_bytes(MODEL, data[:-4] if damage == "short" else data[:-1] + b"?")
    assert newest_checkpoint(run).step == 1
    assert load_checkpoint(run.uri).step == 1
    if damage != "manifest":
        with pytest.raises(TrainError, match="torn"):
            load_checkpoint(folder.uri)


def test_writing_a_step_again_replaces_it(run, save):
    save(run, 2)
    save(run, 2)
    assert newest_checkpoint(run).step == 2


def test_a_run_folder_opens_its_best_checkpoint(run, save):
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save(run, step)
        assert record_best(run, step, value) == (step < 3)
    assert load_checkpoint(run.uri).step == 2
    run.remove(BEST)
    assert load_checkpoint(run.uri).step == 3


def test_a_loss_that_is_no_number_is_never_the_best(run, save):
    save(run, 1)
    assert not record_best(run, 1, float("nan"))
    assert load_checkpoint(run.uri).step == 1, "without a best one the newest counts"
    for step, value in ((2, 0.5), (3, float("nan")), (4, float("inf")), (5, 0.6)):
        save(run, step)
        assert record_best(run, step, value) == (step == 2)
    assert load_checkpoint(run.uri).step == 2
    prune(run, keep=1)
    assert checkpoint_steps(run) == [2, 5]


def test_pruning_keeps_the_newest_and_the_best(run, save):
    for step in range(1, 6):
        save(run, step)
    record_best(run, 2, 0.5)
    prune(run, keep=2)
    assert checkpoint_steps(run) == [2, 4, 5]


def test_nothing_there_is_a_helpful_error(run):
    assert newest_checkpoint(run) is None
    with pytest.raises(TrainError, match="no checkpoint at .*mmkd train stage1"):
        load_checkpoint(run.uri)


def test_a_changed_state_is_noticed(run, save):
    found = save(run, 1)
    found.folder.write_json(STATE, {"step": 9})
    with pytest.raises(TrainError, match="not what was written"):
        found.state()


def test_checkpoints_on_object_storage(s3, save):
    run = Storage(f"{s3}/lake/runs/r")
    for step in (1, 2, 3):
        save(run, step)
    record_best(run, 1, 0.1)
    prune(run, keep=1)
    assert checkpoint_steps(run) == [1, 3]
    assert newest_checkpoint(run).tensors(MODEL)["x"].tolist() == [3, 3, 3]
    run.child("checkpoints/step-00000003").remove("checkpoint.json")
    assert newest_checkpoint(run).step == 1
