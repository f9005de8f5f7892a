"""Losses against values worked out by hand, against finite differences, and across ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import distributed

from trainer.losses import (
    Affinity,
    clip_loss,
    cross_contrastive,
    feature_regression,
    gather_constant,
    gather_features,
    graph_matching,
    head_errors,
    mean_affinity,
    mean_over_teachers,
    siglip_loss,
    similarity_distillation,
)

ALL = torch.ones(3, dtype=torch.bool)


def unit_rows(rows, width, seed, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)
    return x.requires_grad_(requires_grad)


def test_clip_loss_by_hand():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # logits [[2, 2], [0, 0]]: by row ln 2 each; by column the right rows have 2 against 0, and 0 against 2.
    by_column = (-math.log(math.exp(2) / (math.exp(2) + 1)) - math.log(1 / (math.exp(2) + 1))) / 2
    assert clip_loss(image, text, torch.tensor(2.0)).item() == pytest.approx((math.log(2) + by_column) / 2)


def test_one_teacher_is_its_own_softmax():
    teacher = Affinity(torch.eye(3), torch.eye(3), ALL, scale=2.0)
    target, rows = mean_affinity([teacher], exclude_self=False)
    e = math.exp(2)
    assert target[0].tolist() == pytest.approx([e / (e + 2), 1 / (e + 2), 1 / (e + 2)])
    assert rows.all()


def test_teachers_are_averaged_after_softmax_over_those_that_may_speak():
    sharp = Affinity(torch.eye(3), torch.eye(3), ALL, scale=2.0)
    flat = Affinity(torch.eye(3), torch.eye(3), torch.tensor([True, True, False]), scale=math.log(3))
    target, rows = mean_affinity([sharp, flat], exclude_self=False)
    e = math.exp(2)
    # The second teacher knows rows 0 and 1 only: softmax([ln 3, 0]) = [3/4, 1/4], and nothing for column 2.
    assert target[0].tolist() == pytest.approx([(e / (e + 2) + 3 / 4) / 2, (1 / (e + 2) + 1 / 4) / 2, 0.5 / (e + 2)])
    assert target[2].tolist() == pytest.approx([1 / (e + 2), 1 / (e + 2), e / (e + 2)])
    assert rows.tolist() == [True, True, True]
    assert target.sum(dim=1).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_a_row_without_teacher_counts_for_nothing():
    teacher = Affinity(torch.eye(3), torch.eye(3), torch.tensor([True, True, False]), scale=1.0)
    target, rows = mean_affinity([teacher], exclude_self=False)
    assert rows.tolist() == [True, True, False]
    assert not target[2].any()
    features = F.normalize(torch.randn(3, 4), dim=-1).requires_grad_()
    loss = similarity_distillation(features, torch.eye(3, 4), torch.tensor(1.0), target, rows, exclude_self=False)
    loss.backward()
    assert not features.grad[2].any()
    assert features.grad[:2].abs().sum() > 0


def test_the_diagonal_is_left_out_and_a_lone_row_has_nobody_to_resemble():
    pair = Affinity(torch.eye(3), torch.eye(3), torch.tensor([True, False, True]), scale=1.0)
    target, rows = mean_affinity([pair], exclude_self=True)
    assert target.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert rows.tolist() == [True, False, True]
    alone = Affinity(torch.eye(3), torch.eye(3), torch.tensor([True, False, False]), scale=1.0)
    target, rows = mean_affinity([alone], exclude_self=True)
    assert not rows.any()
    loss = similarity_distillation(torch.eye(3), torch.eye(3), torch.tensor(1.0), target, rows, exclude_self=True)
    assert loss.item() == 0


def test_distillation_by_hand():
    target = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    loss = similarity_distillation(
        torch.eye(2), torch.eye(2), torch.tensor(math.log(3)), target, torch.tensor([True, True]), exclude_self=False
    )
    # The student's rows are [3/4, 1/4] and [1/4, 3/4].
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert loss.item() == pytest.approx((first + math.log(4)) / 2)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_perfect_agreement_is_zero_and_has_no_gradient(exclude_self):
    query = unit_rows(5, 4, 0, requires_grad=True)
    key = query if exclude_self else unit_rows(5, 4, 1)
    mask = torch.ones(5, dtype=torch.bool)
    target, rows = mean_affinity([Affinity(query.detach(), key.detach(), mask, 7.0)], exclude_self)
    loss = similarity_distillation(query, key, torch.tensor(7.0, dtype=torch.float64), target, rows, exclude_self)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert query.grad.abs().max() < 1e-12


def test_gradients_by_finite_differences():
    image, text = unit_rows(4, 3, 0, True), unit_rows(4, 3, 1, True)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clip_loss, (image, text, scale))
    mask = torch.tensor([True, True, False, True])
    teachers = [Affinity(unit_rows(4, 6, 2), unit_rows(4, 6, 3), mask, 3.0)]
    for exclude_self in (False, True):
        target, rows = mean_affinity(teachers, exclude_self)

        def distil(query, key, scale, target=target, rows=rows, exclude_self=exclude_self):
            return similarity_distillation(query, key, scale, target, rows, exclude_self)

        assert torch.autograd.gradcheck(distil, (image, text, scale))


def test_siglip_judges_each_pairing_by_itself():
    image, text = unit_rows(3, 4, 1), unit_rows(3, 4, 2)
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    expected = 0.0
    for i in range(3):
        for j in range(3):
            logit = 5 * float(image[i] @ text[j]) - 3
            expected += math.log1p(math.exp(-logit if i == j else logit))
    assert siglip_loss(image, text, scale, bias).item() == pytest.approx(expected / 3)


def test_feature_regression_counts_its_rows_only():
    student, target = unit_rows(4, 5, 1), unit_rows(4, 5, 2)
    rows = torch.tensor([True, False, True, False])
    expected = F.mse_loss(student[rows], target[rows])
    torch.testing.assert_close(feature_regression(student, target, rows), expected)
    assert feature_regression(student, target, ~rows & rows) == 0


def test_cross_contrastive_asks_among_its_rows_only():
    image, text, teacher_image, teacher_text = (unit_rows(4, 5, seed) for seed in range(4))
    rows = torch.tensor([True, False, True, True])
    logits = [2 * image[rows] @ teacher_text[rows].T, 2 * text[rows] @ teacher_image[rows].T]
    expected = sum(F.cross_entropy(one, torch.arange(3)) for one in logits) / 2
    scale = torch.tensor(2.0, dtype=torch.float64)
    found = cross_contrastive(image, text, teacher_image, teacher_text, rows, scale)
    torch.testing.assert_close(found, expected)
    assert cross_contrastive(image, text, teacher_image, teacher_text, ~rows & rows, scale) == 0


def test_a_head_that_predicts_its_teacher_has_no_error():
    target = unit_rows(3, 4, 1)
    torch.testing.assert_close(head_errors(target, target, 0.4), torch.zeros(3, dtype=torch.float64))
    doubled = head_errors(2 * target, target, 0.4)  # the direction is right, the length is not
    torch.testing.assert_close(doubled, 0.4 * (0.5 * target.square()).sum(dim=1))
    torch.testing.assert_close(head_errors(-target, target, 0.0), torch.full((3,), 2.0, dtype=torch.float64))


def test_errors_are_averaged_over_the_teachers_that_may_speak():
    errors = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 8.0, 9.0])]
    masks = [torch.tensor([True, True, False]), torch.tensor([True, False, False])]
    assert mean_over_teachers(errors, masks, None, 0.0) == pytest.approx(((1 + 3) / 2 + 2) / 2)
    assert mean_over_teachers(errors, [~ALL, ~ALL], None, 0.0) == 0


def test_the_worst_teacher_is_never_dropped():
    errors = [torch.tensor([1.0, 5.0, 1.0]), torch.tensor([3.0, 2.0, 4.0])]
    never, always = torch.zeros(2, 3), torch.ones(2, 3)
    assert mean_over_teachers(errors, [ALL, ALL], never, 0.5) == pytest.approx((3 + 5 + 4) / 3)
    assert mean_over_teachers(errors, [ALL, ALL], always, 0.5) == mean_over_teachers(errors, [ALL, ALL], None, 0.0)
    # A masked teacher is not the worst, however bad.
    assert mean_over_teachers(errors, [ALL, ~ALL], never, 0.5) == pytest.approx((1 + 5 + 1) / 3)


def test_keys_beyond_the_batch_are_columns_more():
    query, queued = unit_rows(3, 6, 0), unit_rows(2, 6, 1)
    keys, key_mask = torch.cat([query, queued]), torch.tensor([True, True, False, True, False])
    teacher = Affinity(query, keys, torch.tensor([True, True, False]), 4.0, key_mask)
    target, rows = mean_affinity([teacher], exclude_self=True)
    assert target.shape == (3, 5)
    assert rows.tolist() == [True, True, False]
    # Row 0 may be compared with row 1 and the first queued one only.
    assert (target[0] > 0).tolist() == [False, True, False, True, False]
    assert target[0].sum().item() == pytest.approx(1)
    loss = similarity_distillation(query, keys, torch.tensor(4.0, dtype=query.dtype), target, rows, exclude_self=True)
    # The student has the same cosines, but its softmax goes over the columns that the teacher left out, too.
    assert loss > 0


def test_vertices_find_themselves_by_their_edges():
    features, rows = unit_rows(6, 5, 3), torch.tensor([True] * 5 + [False])
    turned = features @ torch.linalg.qr(unit_rows(5, 5, 4))[0]
    scale = torch.tensor(50.0, dtype=features.dtype)
    same = graph_matching(features, turned, rows, scale)
    assert same.item() < 0.5  # a rotation keeps every edge
    assert graph_matching(features, unit_rows(6, 5, 9), rows, scale) > same + 1
    assert graph_matching(features, turned, torch.tensor([True, True] + [False] * 4), scale) == 0


def test_a_graph_ignores_the_rows_that_do_not_count():
    features, teacher, rows = unit_rows(6, 5, 3), unit_rows(6, 5, 4), torch.tensor([True] * 4 + [False] * 2)
    scale, other = torch.tensor(10.0, dtype=features.dtype), teacher.clone()
    other[4:] = unit_rows(2, 5, 8)
    assert graph_matching(features, teacher, rows, scale) == graph_matching(features, other, rows, scale)


def test_gathering_is_the_identity_on_one_rank():
    features = torch.randn(3, 2, requires_grad=True)
    assert gather_features(features) is features
    assert gather_constant(features) is features


def _loss_of(model, inputs, gather):
    features = F.normalize(model(inputs), dim=-1)
    image, text = gather(features[:, 0]), gather(features[:, 1])
    mask = torch.tensor([True, True, False, True, True, True])
    teacher = Affinity(unit_rows(6, 5, 8), unit_rows(6, 5, 9), mask, 4.0)
    scale = torch.tensor(3.0, dtype=torch.float64)
    target, rows = mean_affinity([teacher], exclude_self=False)
    targets = unit_rows(6, 3, 10), unit_rows(6, 3, 11)
    errors = [head_errors(image, target, 0.3) for target in targets]
    draws = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    return (
        clip_loss(image, text, scale)
        + similarity_distillation(image, text, scale, target, rows, exclude_self=False)
        + siglip_loss(image, text, scale, torch.tensor(-2.0, dtype=torch.float64))
        + feature_regression(image, targets[0], mask)
        + cross_contrastive(image, text, *targets, mask, scale)
        + mean_over_teachers(errors, [mask, ~mask], draws, 0.5)
    )


def _model_and_inputs():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3, dtype=torch.float64), torch.randn(6, 2, 4, dtype=torch.float64)


def test_two_ranks_have_the_gradient_of_one_rank(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), f"file://{tmp_path}/meeting", str(tmp_path / "result")])
        for rank in range(2)
    ]
    assert [process.wait(120) for process in ranks] == [0, 0]
    loss, gradients = json.loads((tmp_path / "result").read_text())
    model, inputs = _model_and_inputs()
    alone = _loss_of(model, inputs, lambda x: x)
    alone.backward()
    assert loss == pytest.approx(alone.item(), rel=1e-12)
    for ours, theirs in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours.grad, torch.tensor(theirs, dtype=torch.float64))


def _one_of_two(rank, address, result):
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model, inputs = _model_and_inputs()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    loss = _loss_of(parallel, inputs.chunk(2)[rank], gather_features)
    loss.backward()
    if rank == 0:
        Path(result).write_text(json.dumps([loss.item(), [p.grad.tolist() for p in model.parameters()]]))
    distributed.barrier()
    os._exit(0)  # gloo's threads, if still running, would abort an ordinary interpreter exit


if __name__ == "__main__":  # one of the two processes of the test above
    _one_of_two(int(sys.argv[1]), sys.argv[2], sys.argv[3])
