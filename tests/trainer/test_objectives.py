"""Objectives: terms are named, weights are in plain sight, masks and scales do what they say."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from trainer.config import DistillConfig
from trainer.losses import clip_loss
from trainer.objectives import ContrastiveObjective, DistillObjective, LearnedScale, TeacherBatch
from trainer.student import StudentOutput


def unit(rows, width, seed):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def student(rows=6):
    return StudentOutput(unit(rows, 8, 0).requires_grad_(), unit(rows, 8, 1).requires_grad_())


def teacher(seed, rows=6, mask=None):
    mask = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    return TeacherBatch(unit(rows, 5, seed), unit(rows, 5, seed + 1), mask, mask)


def test_stage_1_is_the_clip_loss_at_the_starting_temperature():
    objective, output = ContrastiveObjective(init_temperature=0.1), student()
    terms = objective(output, {})
    assert terms.total.item() == pytest.approx(clip_loss(*output, torch.tensor(10.0)).item(), rel=1e-5)
    assert terms.contrastive is terms.total


def test_the_total_is_the_weighted_sum_of_the_named_terms():
    weights = DistillConfig(contrastive=0.5, image_text=2.0, image_image=3.0, text_text=4.0)
    terms = DistillObjective(weights, {"t": 10.0}, 10.0)(student(), {"t": teacher(2)})
    expected = 0.5 * terms.contrastive + 2 * terms.image_text + 3 * terms.image_image + 4 * terms.text_text
    assert terms.total.item() == pytest.approx(expected.item())
    assert all(value > 0 for value in terms)


def test_every_scale_learns():
    objective = DistillObjective(DistillConfig(), {"t": 10.0}, 10.0)
    objective(student(), {"t": teacher(2)}).total.backward()
    assert {name for name, p in objective.named_parameters() if p.grad is not None and p.grad != 0} == {
        "scale.log",
        "distill_scale.log",
    }


def test_a_student_that_copies_its_teacher_has_nothing_left_to_distil():
    image, text = unit(6, 5, 2), unit(6, 5, 3)
    mask = torch.ones(6, dtype=torch.bool)
    objective = DistillObjective(DistillConfig(text_text=1.0), {"t": 12.0}, init_scale=12.0)
    terms = objective(StudentOutput(image, text), {"t": TeacherBatch(image, text, mask, mask)})
    assert [terms.image_text.item(), terms.image_image.item(), terms.text_text.item()] == pytest.approx(
        [0] * 3, abs=1e-6
    )


def test_a_teacher_speaks_only_where_it_is_admitted():
    mask = torch.tensor([True, True, True, True, False, False])
    one, other = teacher(2, mask=mask), teacher(2, mask=mask)
    other.image_NT[4:], other.text_NT[4:] = unit(2, 5, 77), unit(2, 5, 78)
    objective = DistillObjective(DistillConfig(text_text=1.0), {"t": 10.0}, 10.0)
    left, right = objective(student(), {"t": one}), objective(student(), {"t": other})
    assert left.total.item() == right.total.item()


def test_an_image_only_teacher_speaks_for_images_only():
    everywhere, nowhere = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    image_only = TeacherBatch(unit(6, 5, 2), torch.zeros(6, 1), everywhere, nowhere)
    objective = DistillObjective(DistillConfig(text_text=1.0), {"t": 10.0}, 10.0)
    terms = objective(student(), {"t": image_only})
    assert terms.image_image > 0
    assert terms.image_text == terms.text_text == 0


def test_a_scale_stays_below_one_hundred():
    scale = LearnedScale(1000.0)
    assert scale().item() == pytest.approx(100)
    with torch.no_grad():
        scale.log.add_(1)
    scale.clamp()
    assert scale.log.item() == pytest.approx(math.log(100))
