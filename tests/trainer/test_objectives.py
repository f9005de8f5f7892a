"""Objectives: terms are named, weights are in plain sight, masks and scales do what they say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from common.config import load_config
from trainer.alignment.maps import AffineMap
from trainer.config import DistillConfig, Stage2Config
from trainer.losses import clip_loss
from trainer.objectives import (
    PAPER_CROSS_SCALE,
    ContrastiveObjective,
    DistillObjective,
    LearnedScale,
)
from trainer.student import StudentOutput
from trainer.teacher_vectors import TeacherBatch, draw_teacher, stored_dims

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


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
    weights = DistillConfig(contrastive=0.5, image_text=2.0, image_image=3.0, text_text=4.0, heads=0.0)
    terms = DistillObjective(weights, {"t": 10.0}, 10.0)(student(), {"t": teacher(2)})
    expected = 0.5 * terms.contrastive + 2 * terms.image_text + 3 * terms.image_image + 4 * terms.text_text
    assert terms.total.item() == pytest.approx(expected.item())
    assert all(value > 0 for name, value in terms._asdict().items() if getattr(weights, name, 1))
    assert terms.graph == terms.heads == terms.feature == terms.cross == 0


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


# --- One teacher drawn for each sample.


def test_the_drawn_teacher_is_one_that_may_speak_and_all_are_alike_probable():
    rows = 3000
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(rows, generator=generator) < 0.7 for name in "abc"}
    teachers = {
        name: TeacherBatch(torch.full((rows, 2), float(k)), torch.full((rows, 2), float(k)), mask, mask)
        for k, (name, mask) in enumerate(masks.items(), start=1)
    }
    image, text, spoken = draw_teacher(teachers, torch.rand(rows, generator=generator))
    which = image[:, 0].long()
    torch.testing.assert_close(image, text)
    assert (which == 0).equal(~spoken)
    everywhere = torch.stack(list(masks.values())).all(dim=0)
    for k, mask in enumerate(masks.values(), start=1):
        assert not ((which == k) & ~mask).any()
        assert (which[everywhere] == k).float().mean().item() == pytest.approx(1 / 3, abs=0.06)


def test_the_greatest_draw_still_finds_a_teacher():
    teachers = {name: teacher(seed) for name, seed in (("a", 2), ("b", 4))}
    image, _, spoken = draw_teacher(teachers, torch.full((6,), np.nextafter(np.float32(1), np.float32(0)).item()))
    assert spoken.all()
    torch.testing.assert_close(image, teachers["b"].image_NT)


def published_losses(image, text, scale, teacher_image, teacher_text):
    """The published code's three numbers (open_clip/loss.py, KDClipLoss on one rank), written out in float64."""
    image, text, teacher_image, teacher_text = (
        one.detach().double().numpy() for one in (image, text, teacher_image, teacher_text)
    )

    def cross_entropy(logits):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return -(np.diag(shifted) - np.log(np.exp(shifted).sum(axis=1))).mean()

    task = (cross_entropy(scale * image @ text.T) + cross_entropy(scale * text @ image.T)) / 2
    regression = ((image - teacher_image) ** 2).mean() + ((text - teacher_text) ** 2).mean()
    factor = np.log(1 / 0.07)
    crosswise = cross_entropy(factor * image @ teacher_text.T) + cross_entropy(factor * text @ teacher_image.T)
    return task, regression, crosswise / 2


PAPER = load_config(Stage2Config, str(RECIPES / "paper-stage2.yaml"), ()).distill


def test_the_papers_recipe_gives_the_numbers_of_the_published_code_on_its_own_samples(shared_data):
    """All teachers of each sample, one of them drawn; the reference sees only those that the draws mean."""
    folder = shared_data / "mmkd-demo"
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    names = sorted({name for row in rows for name in row["available_clips"]})
    assert len(names) > 2
    stored = {(name, side): torch.zeros(len(rows), 512) for name in names for side in ("img", "txt")}
    mask_KN = torch.tensor([[name in row["available_clips"] for row in rows] for name in names])
    draws_NK = torch.rand(len(rows), 1 + len(names), generator=torch.Generator().manual_seed(0))
    drawn: dict[str, list[torch.Tensor]] = {"img": [], "txt": []}
    chosen = []
    for number, row in enumerate(rows):
        file = folder / "features" / row["folderid"] / row["id"] / "clips_project_output.pt"
        found = torch.load(file, weights_only=True)
        there = sorted(row["available_clips"])
        chosen.append(there[int(draws_NK[number, 0] * len(there))])
        for side, vectors in drawn.items():
            vectors.append(found[f"{chosen[-1]}_{side}"])
            for name in there:
                stored[name, side][number] = found[f"{name}_{side}"]
    assert len(set(chosen)) > 1
    teachers = {
        name: TeacherBatch(stored[name, "img"], stored[name, "txt"], mask_N, mask_N)
        for name, mask_N in zip(names, mask_KN, strict=True)
    }
    output = StudentOutput(unit(len(rows), 512, 0), unit(len(rows), 512, 1))
    terms = DistillObjective(PAPER, dict.fromkeys(names, 1.0), 20.0)(output, teachers, draws_NK)
    task, regression, crosswise = published_losses(*output, 20.0, *(torch.stack(side) for side in drawn.values()))
    assert terms.contrastive.item() == pytest.approx(task, abs=1e-6)
    assert terms.feature.item() == pytest.approx(regression, abs=1e-6)
    assert terms.cross.item() == pytest.approx(crosswise, abs=1e-6)
    assert terms.total.item() == pytest.approx(task + 50 * regression + crosswise, abs=1e-5)


def test_the_papers_factor_is_never_trained_and_the_corrected_one_is():
    one = teacher(2)._replace(image_NT=unit(6, 8, 2), text_NT=unit(6, 8, 3))
    paper = DistillObjective(PAPER, {"t": 1.0}, 10.0)
    assert "cross_scale.log" not in dict(paper.named_parameters())
    corrected = DistillObjective(PAPER.model_copy(update={"cross_scale": "learned"}), {"t": 1.0}, 10.0)
    assert corrected.cross_scale().item() == pytest.approx(1 / 0.07)
    assert pytest.approx(math.log(1 / 0.07)) == PAPER_CROSS_SCALE
    corrected(student(), {"t": one}).total.backward()
    assert corrected.cross_scale.log.grad != 0


# --- Heads.


def heads(**settings):
    weights = DistillConfig(contrastive=0, image_text=0, image_image=0, text_text=0, heads=1, **settings)
    torch.manual_seed(0)
    return DistillObjective(weights, {"t.v2": 1.0, "u": 1.0}, 10.0, 8, {"t.v2": (5, 5), "u": (5, None)})


def test_heads_learn_to_predict_their_teachers_whatever_their_widths():
    objective, output = heads(), student()
    alone = torch.zeros(6, dtype=torch.bool)
    teachers = {"t.v2": teacher(2), "u": teacher(4)._replace(text_NT=torch.zeros(6, 1), text_mask_N=alone)}
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    first = objective(output, teachers).heads.item()
    for _ in range(300):
        optimizer.zero_grad()
        objective(output, teachers).total.backward()
        optimizer.step()
    assert objective(output, teachers).heads.item() < 0.05 * first
    assert set(objective.state_dict()) >= {"heads.image.0.weight", "heads.image.1.bias", "heads.text.0.weight"}
    assert not any(name.startswith("heads.text.1") for name in objective.state_dict())


def test_a_masked_row_and_an_absent_teacher_say_nothing_to_the_heads():
    objective = heads()
    mask = torch.tensor([True, True, True, True, False, False])
    one, other = teacher(2, mask=mask), teacher(2, mask=mask)
    other.image_NT[4:], other.text_NT[4:] = unit(2, 5, 77), unit(2, 5, 78)
    assert objective(student(), {"t.v2": one}).heads.item() == objective(student(), {"t.v2": other}).heads.item()
    assert objective(student(), {}).heads == 0


def test_dropping_follows_the_draws_and_keeps_the_worst():
    objective = heads(drop_teachers=0.5)
    alone = torch.zeros(6, dtype=torch.bool)
    teachers = {"t.v2": teacher(2), "u": teacher(4)._replace(text_NT=torch.zeros(6, 1), text_mask_N=alone)}
    keep, drop = torch.ones(6, 3), torch.zeros(6, 3)
    all_kept, only_worst = (objective(student(), teachers, draws).heads.item() for draws in (keep, drop))
    assert all_kept == objective(student(), teachers).heads.item()
    assert only_worst > all_kept


def test_siglip_learns_its_bias_too():
    objective = ContrastiveObjective(0.07, "siglip")
    objective(student(), {}).total.backward()
    assert {name for name, p in objective.named_parameters() if p.grad is not None and p.grad != 0} == {
        "scale.log",
        "bias",
    }


# --- More columns than the batch has rows.


def queued(length, **settings):
    weights = DistillConfig(queue=length, heads=0.0, **settings)
    return DistillObjective(weights, {"t.v2": 10.0, "u": 5.0}, 10.0, 8, {"t.v2": (5, 5), "u": (5, None)})


TAKEN = torch.tensor(True)


def two_teachers(seed, rows=6):
    everywhere, nowhere = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)
    return {
        "t.v2": teacher(seed, rows),
        "u": TeacherBatch(unit(rows, 5, seed + 7), torch.zeros(rows, 1), everywhere, nowhere),
    }


def test_an_empty_queue_changes_nothing_and_a_filled_one_adds_columns():
    plain, objective = queued(0), queued(12)
    first, second = two_teachers(2), two_teachers(20)
    assert objective(student(), first).total.item() == pytest.approx(plain(student(), first).total.item())
    objective.after_step(TAKEN)
    assert objective.queue.filled == 6
    assert objective(student(), second).image_image != plain(student(), second).image_image
    keys, said, itself = objective.queue.behind(student(), second, torch.arange(6))
    assert torch.equal(itself, torch.eye(6, 12, dtype=torch.bool))
    assert len(keys.image_BD) == len(said["t.v2"].text_mask_N) == 12
    assert torch.equal(keys.text_BD[6:], student().text_BD)
    assert torch.equal(said["u"].image_NT[6:], first["u"].image_NT)


def test_a_row_is_not_compared_with_its_own_sample_of_an_earlier_step():
    objective, places = queued(12), torch.arange(6)
    objective(student(), two_teachers(2), None, places)
    objective.after_step(TAKEN)
    *_, itself = objective.queue.behind(student(), two_teachers(2), places.flip(0))
    assert torch.equal(itself[:, 6:], torch.eye(6, dtype=torch.bool).flip(0))
    # The same batch again, each row beside its copy: with the copies left out, what is asked is asked twice over.
    again = objective(student(), two_teachers(2), None, places)
    first = queued(12)(student(), two_teachers(2), None, places)
    assert again.text_text.item() == pytest.approx(first.text_text.item(), rel=0.05)
    careless = objective(student(), two_teachers(2), None, places + 100)
    assert abs(careless.text_text - first.text_text) > abs(again.text_text - first.text_text)


def test_stored_lengths_matter_to_the_papers_terms_only():
    weights = DistillConfig(feature=1.0, cross=1.0, graph=1.0, target_length="stored")
    objective = DistillObjective(weights, {"t": 10.0}, 10.0, 8, {"t": (8, 8)})
    mask = torch.ones(6, dtype=torch.bool)
    image, text = unit(6, 8, 5), unit(6, 8, 6)
    one, longer = (objective(student(), {"t": TeacherBatch(by * image, by * text, mask, mask)}) for by in (1.0, 3.0))
    for term in ("image_text", "image_image", "text_text", "graph", "heads"):
        torch.testing.assert_close(getattr(one, term), getattr(longer, term))
    assert one.feature != longer.feature
    assert one.cross != longer.cross


def test_a_queue_without_use_is_refused():
    with pytest.raises(ValueError, match="changes nothing"):
        DistillConfig(queue=5, image_text=0.0, image_image=0.0, text_text=0.0)


def test_the_queue_forgets_the_oldest_and_only_steps_that_were_taken_enter():
    objective = queued(8)
    for seed in (2, 40):
        objective(student(), two_teachers(seed))
        objective.after_step(TAKEN)
    objective(student(), two_teachers(60))
    objective.after_step(~TAKEN)  # its loss was not finite
    kept = objective.queue.get_buffer("image_0")
    assert torch.equal(kept, torch.cat([two_teachers(40)["t.v2"].image_NT, two_teachers(2)["t.v2"].image_NT])[:8])
    assert objective.queue.filled == 8


def test_a_batch_longer_than_the_queue_fills_it():
    objective = queued(4)
    objective(student(), two_teachers(2))
    objective.after_step(TAKEN)
    assert objective.queue.filled == 4
    assert torch.equal(objective.queue.get_buffer("text"), student().text_BD[:4])


def test_a_restored_queue_gives_the_same_loss():
    objective, restored = queued(12), queued(12)
    objective(student(), two_teachers(2))
    objective.after_step(TAKEN)
    restored.load_state_dict(objective.state_dict(), strict=True)
    assert restored(student(), two_teachers(9)).total == objective(student(), two_teachers(9)).total


def test_a_queue_keeps_what_was_stored_where_an_alignment_changes_widths():
    maps = {"t.v2": {"image": AffineMap(np.eye(5, 3, dtype=np.float32), np.zeros(3, np.float32))}}
    assert stored_dims({"t.v2": (3, 5), "u": (5, None)}, maps) == {"t.v2": (5, 5), "u": (5, None)}


def test_the_graph_term_learns_its_scale_and_hears_every_teacher():
    objective = DistillObjective(DistillConfig(graph=1.0), {"t.v2": 10.0, "u": 5.0}, 10.0)
    both = objective(student(), two_teachers(2))
    both.total.backward()
    assert objective.graph_scale.log.grad != 0
    one = objective(student(), {"t.v2": two_teachers(2)["t.v2"]})
    assert both.graph > 0
    assert both.graph != one.graph
