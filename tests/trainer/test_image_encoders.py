"""Teachers without a text tower go through every later step: they speak for pictures, and for nothing else."""

import numpy as np
import pytest
import torch

from common.lake import open_lake
from common.storage import Storage
from trainer.architecture import read_architecture
from trainer.config import DataConfig, DistillConfig, SelectConfig, Stage2Config
from trainer.data import TrainData
from trainer.feed import local_batches
from trainer.launch import build_order, find_rows
from trainer.objectives import DistillObjective
from trainer.selection.select import select
from trainer.selection.stored import choose_selection
from trainer.stage2 import IMAGE_ENCODER_SCALE, teacher_scales
from trainer.student import StudentOutput
from trainer.teacher_vectors import TeacherBatch

TEACHERS = ("alpha", "pixels")


@pytest.fixture
def selected(lake_with_image_encoder) -> tuple[str, str]:
    """The lake, and the name of a selection over a teacher of each kind."""
    return lake_with_image_encoder, select(lake_with_image_encoder, SelectConfig(teachers=TEACHERS, min_skill=0.5))


def test_selection_admits_it_wherever_it_has_a_vector(selected):
    lake = open_lake(selected[0])
    for shard in lake.shards():
        rows = lake.storage.read_table(f"selection/{selected[1]}/teacher=pixels/shard-{shard:06d}.parquet").to_pylist()
        for row in rows:
            assert row["admitted"] == (int(row["sample_id"], 16) % 11 != 0)
            assert row["cosine"] is row["rank"] is row["cosine_quantile"] is None
    summary = lake.storage.read_json(f"manifests/selection/{selected[1]}.json")["summary"]
    assert all(entry["skill"] is None and entry["kept"] > 0.8 for entry in summary["pixels"].values())
    assert all(entry["skill"] is not None for entry in summary["alpha"].values())


def test_the_summary_says_so(selected, caplog):
    from trainer.selection.summary import format_summary

    summary = open_lake(selected[0]).storage.read_json(f"manifests/selection/{selected[1]}.json")["summary"]
    (line,) = [line for line in format_summary(summary).splitlines() if line.startswith("pixels")]
    assert "images only kept" in line


def test_batches_hold_its_pictures_and_mask_its_texts(selected, student_folder):
    lake, config = open_lake(selected[0]), DataConfig(batch_size=16, lanes=4)
    order = build_order(find_rows(lake, TEACHERS, selected[1], 0), config, lake)
    architecture = read_architecture(Storage(str(student_folder)))
    data = TrainData(lake.uri, order, architecture, 1.0, TEACHERS, selected[1])
    seen = 0
    for batch in local_batches(data, 0, order.steps_per_epoch):
        teacher = batch.teachers["pixels"]
        assert not teacher.text_mask_B.any()
        for row, sample_id in enumerate(batch.sample_ids):
            assert teacher.image_mask_B[row] == (int(sample_id, 16) % 11 != 0)
        lengths = np.linalg.norm(teacher.image_BT[teacher.image_mask_B], axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-5)
        seen += int(teacher.image_mask_B.sum())
    assert seen > 0


def test_stage_2_gives_it_a_scale_of_its_own(selected):
    lake = open_lake(selected[0])
    _, teachers = choose_selection(lake, None, TEACHERS)
    own = Stage2Config(distill=DistillConfig(teacher_scale="own"))
    assert teacher_scales(lake, teachers, selected[1], own) == {"alpha": 20.0, "pixels": IMAGE_ENCODER_SCALE}
    # There are no captions to fit its temperature to.
    fitted = teacher_scales(lake, teachers, selected[1], Stage2Config())
    assert fitted["pixels"] == IMAGE_ENCODER_SCALE
    assert fitted["alpha"] != 20.0
    number = Stage2Config(distill=DistillConfig(teacher_scale=12.0))
    assert teacher_scales(lake, teachers, selected[1], number) == {"alpha": 12.0, "pixels": 12.0}


def vectors(seed: int, rows: int, dim: int) -> torch.Tensor:
    drawn = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)


def test_only_the_picture_term_hears_it():
    """Adding it changes the image-image term, and leaves image-text and text-text exactly as they were."""
    everywhere = torch.ones(12, dtype=torch.bool)
    both = TeacherBatch(vectors(0, 12, 8), vectors(1, 12, 8), everywhere, everywhere)
    alone = TeacherBatch(vectors(2, 12, 10), torch.zeros(12, 1), everywhere, ~everywhere)
    student = StudentOutput(vectors(3, 12, 6), vectors(4, 12, 6))
    weights = DistillConfig(contrastive=1, image_text=1, image_image=1, text_text=1)
    objective = DistillObjective(weights, {"alpha": 20.0, "pixels": IMAGE_ENCODER_SCALE}, 10.0)
    without, with_it = objective(student, {"alpha": both}), objective(student, {"alpha": both, "pixels": alone})
    assert with_it.image_text == without.image_text
    assert with_it.text_text == without.text_text
    assert not torch.isclose(with_it.image_image, without.image_image)
    only = objective(student, {"pixels": alone})
    assert only.image_text == 0
    assert only.text_text == 0
    assert only.image_image > 0
    assert torch.isfinite(only.total)
