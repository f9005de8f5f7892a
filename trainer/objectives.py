"""One objective per stage: it owns every learned scalar, and its terms are named, weighted in plain sight and summed.

Shapes: N = global batch, D = the student's width, T = a teacher's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

from trainer.alignment.maps import Maps
from trainer.config import DistillConfig
from trainer.losses import (
    Affinity,
    clip_loss,
    cross_contrastive,
    feature_regression,
    graph_matching,
    mean_affinity,
    siglip_loss,
    similarity_distillation,
)
from trainer.student import StudentOutput
from trainer.teacher_vectors import (
    AlignedTeachers,
    EmbeddingQueue,
    TeacherBatch,
    TeacherHeads,
    draw_teacher,
    side_of,
    stored_dims,
    unit_length,
)

MAX_LOG_SCALE = math.log(100)  # CLIP's own bound; without it the scale runs away on easy batches
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0  # where SigLIP starts: nearly all pairings are false
PAPER_CROSS_SCALE = math.log(1 / 0.07)
"""What MMKD-CLIP's code multiplies cosines with: the logarithm of the scale that is meant (KDClipLoss)."""


class Stage1Terms(NamedTuple):
    """Stage 1 has one term."""

    contrastive: torch.Tensor
    total: torch.Tensor


class Stage2Terms(NamedTuple):
    """Unweighted terms of stage 2, and their weighted sum; a term of weight 0 is not computed and reads 0."""

    contrastive: torch.Tensor
    image_text: torch.Tensor
    image_image: torch.Tensor
    text_text: torch.Tensor
    graph: torch.Tensor
    heads: torch.Tensor
    feature: torch.Tensor
    cross: torch.Tensor
    total: torch.Tensor


class LearnedScale(nn.Module):
    """A positive factor on cosines, learned as its logarithm and never above 100."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(min(math.log(start), MAX_LOG_SCALE)))

    def forward(self) -> torch.Tensor:
        """The factor."""
        return self.log.clamp(max=MAX_LOG_SCALE).exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the parameter back to its bound, where the clamp in forward would leave it without gradient."""
        self.log.clamp_(max=MAX_LOG_SCALE)


class ContrastiveObjective(nn.Module):
    """Stage 1: the pairs themselves."""

    def __init__(self, init_temperature: float, loss: Literal["clip", "siglip"] = "clip") -> None:
        """Start the scale, and for SigLIP the bias.

        Args:
            init_temperature: Of the CLIP loss; SigLIP starts where its authors do.
            loss: Which of the two.
        """
        super().__init__()
        self.scale = LearnedScale(1 / init_temperature if loss == "clip" else SIGLIP_SCALE)
        self.bias = nn.Parameter(torch.tensor(SIGLIP_BIAS)) if loss == "siglip" else None

    def forward(
        self,
        student: StudentOutput,
        teachers: Mapping[str, TeacherBatch],
        draws_NK: torch.Tensor | None = None,
        places_N: torch.Tensor | None = None,
    ) -> Stage1Terms:
        """The contrastive loss; teachers are not consulted in this stage."""
        image_ND, text_ND, scale = student.image_BD, student.text_BD, self.scale()
        if self.bias is None:
            contrastive = clip_loss(image_ND, text_ND, scale)
        else:
            contrastive = siglip_loss(image_ND, text_ND, scale, self.bias)
        return Stage1Terms(contrastive=contrastive, total=contrastive)

    def after_step(self, is_finite: torch.Tensor) -> None:
        """Keep the scale in its bounds.

        Args:
            is_finite: Bool scalar on the device: whether the step was taken.
        """
        self.scale.clamp()


class DistillObjective(nn.Module):
    """Stage 2: the pairs, and what every admissible teacher says about them."""

    def __init__(
        self,
        weights: DistillConfig,
        teacher_scales: Mapping[str, float],
        init_scale: float,
        width: int = 0,
        dims: Mapping[str, tuple[int | None, int | None]] | None = None,
        maps: Maps | None = None,
    ) -> None:
        """Start the scales and the heads.

        Args:
            weights: Of the terms.
            teacher_scales: Teacher -> the factor on its cosines it was trained with.
            init_scale: The contrastive scale that stage 1 arrived at.
            width: Of the student's vectors; for heads.
            dims: Teacher -> widths of its two towers, aligned if so, as for :class:`TeacherHeads`.
            maps: Of an alignment: heads, feature and cross see the teachers through it, similarities never do.
        """
        super().__init__()
        self.weights = weights
        self.teacher_scales = dict(teacher_scales)
        self.scale = LearnedScale(init_scale)
        # Its own scale: teachers' softmaxes are softer than one-hot labels and would otherwise fight over one number.
        self.distill_scale = LearnedScale(init_scale)
        self.cross_scale = LearnedScale(1 / 0.07) if weights.cross and weights.cross_scale == "learned" else None
        self.graph_scale = LearnedScale(1 / 0.07) if weights.graph else None
        self.heads = TeacherHeads(width, dims or {}) if weights.heads else None
        self.aligned = AlignedTeachers(maps) if maps else None
        self.queue = EmbeddingQueue(weights.queue, width, stored_dims(dims or {}, maps)) if weights.queue else None
        self._last: tuple[StudentOutput, Mapping[str, TeacherBatch], torch.Tensor] | None = None

    def forward(
        self,
        student: StudentOutput,
        teachers: Mapping[str, TeacherBatch],
        draws_NK: torch.Tensor | None = None,
        places_N: torch.Tensor | None = None,
    ) -> Stage2Terms:
        """The weighted sum over the global batch.

        Args:
            student: Its vectors.
            teachers: Theirs, in the order of the columns of ``draws_NK`` but the first.
            draws_NK: Numbers in [0, 1) for each row: the first chooses its drawn teacher, the others drop heads. None:
                the first admissible teacher, and all heads.
            places_N: Int64 that tells samples apart, by which a queue knows a row's own sample; None with a queue: it
                holds none of the batch's.
        """
        weights, image_ND, text_ND = self.weights, student.image_BD, student.text_BD
        zero = image_ND.new_zeros(())
        contrastive = clip_loss(image_ND, text_ND, self.scale())
        stored = teachers
        if weights.target_length == "stored" and self.aligned is None:
            teachers = {name: unit_length(teacher) for name, teacher in teachers.items()}
        keys, said, itself = student, teachers, None
        if self.queue is not None:
            if places_N is None:
                places_N = torch.full((len(image_ND),), -1, device=image_ND.device)
            keys, said, itself = self.queue.behind(student, teachers, places_N)
            self._last = StudentOutput(*(side.detach() for side in student)), teachers, places_N
        image_text = self._image_text(student, keys, teachers, said) if weights.image_text else zero
        image_image = self._within("image", student, keys, teachers, said, itself) if weights.image_image else zero
        text_text = self._within("text", student, keys, teachers, said, itself) if weights.text_text else zero
        graph = self._graph(student, teachers) if self.graph_scale is not None else zero
        aligned = dict(teachers) if self.aligned is None else self.aligned(stored)
        drawn = stored if self.aligned is None else aligned
        heads = zero
        if self.heads is not None:
            drops = None if draws_NK is None else draws_NK[:, 1:]
            heads = self.heads(student, aligned, weights.head_smooth, weights.drop_teachers, drops)
        feature, cross = self._drawn(student, drawn, draws_NK) if weights.feature or weights.cross else (zero, zero)
        return Stage2Terms(
            contrastive=contrastive,
            image_text=image_text,
            image_image=image_image,
            text_text=text_text,
            graph=graph,
            heads=heads,
            feature=feature,
            cross=cross,
            total=weights.contrastive * contrastive
            + weights.image_text * image_text
            + weights.image_image * image_image
            + weights.text_text * text_text
            + weights.graph * graph
            + weights.heads * heads
            + weights.feature * feature
            + weights.cross * cross,
        )

    def after_step(self, is_finite: torch.Tensor) -> None:
        """Keep the scales in their bounds, and the batch in the queue if the step was taken.

        Args:
            is_finite: Bool scalar on the device: whether it was.
        """
        for scale in (self.scale, self.distill_scale, self.cross_scale, self.graph_scale):
            if scale is not None:
                scale.clamp()
        if self.queue is not None and self._last is not None:
            self.queue.push(*self._last, is_finite)
            self._last = None

    def _drawn(
        self, student: StudentOutput, teachers: Mapping[str, TeacherBatch], draws_NK: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """MMKD-CLIP's two terms: each row is compared with the vectors of one of its admissible teachers."""
        image_ND, text_ND, rows_N = draw_teacher(teachers, None if draws_NK is None else draws_NK[:, 0])
        if self.weights.target_length == "unit":
            image_ND, text_ND = F.normalize(image_ND, dim=1), F.normalize(text_ND, dim=1)
        feature = feature_regression(student.image_BD, image_ND, rows_N)
        feature = feature + feature_regression(student.text_BD, text_ND, rows_N)
        scale = image_ND.new_tensor(PAPER_CROSS_SCALE) if self.cross_scale is None else self.cross_scale()
        cross = cross_contrastive(student.image_BD, student.text_BD, image_ND, text_ND, rows_N, scale)
        return feature, cross

    def _image_text(
        self,
        student: StudentOutput,
        keys: StudentOutput,
        teachers: Mapping[str, TeacherBatch],
        said: Mapping[str, TeacherBatch],
    ) -> torch.Tensor:
        """Both directions, averaged; a teacher speaks where it has both the picture and the caption.

        Args:
            student: The batch, which asks.
            keys: The batch and the queue, which are compared with.
            teachers: Their vectors of the batch.
            said: Their vectors of the keys.
        """
        forward, backward = [], []
        for name, teacher in teachers.items():
            if teacher.image_NT.shape[1] != teacher.text_NT.shape[1]:
                continue  # one tower only: its other column is a placeholder of width 1, masked everywhere
            of_keys, scale = said[name], self.teacher_scales[name]
            masks = teacher.image_mask_N & teacher.text_mask_N, scale, of_keys.image_mask_N & of_keys.text_mask_N
            forward.append(Affinity(teacher.image_NT, of_keys.text_NT, *masks))
            backward.append(Affinity(teacher.text_NT, of_keys.image_NT, *masks))
        if not forward:
            return student.image_BD.new_zeros(())
        terms = [
            similarity_distillation(query_ND, key_MD, self.distill_scale(), *mean_affinity(affinities, False), False)
            for query_ND, key_MD, affinities in (
                (student.image_BD, keys.text_BD, forward),
                (student.text_BD, keys.image_BD, backward),
            )
        ]
        return (terms[0] + terms[1]) / 2

    def _within(
        self,
        side: str,
        student: StudentOutput,
        keys: StudentOutput,
        teachers: Mapping[str, TeacherBatch],
        said: Mapping[str, TeacherBatch],
        itself_NM: torch.Tensor | None,
    ) -> torch.Tensor:
        """Similarities within one modality, the columns of each row's own sample left out."""
        affinities = []
        for name, teacher in teachers.items():
            (query_NT, mask_N), (key_MT, key_mask_M) = side_of(teacher, side), side_of(said[name], side)
            affinities.append(Affinity(query_NT, key_MT, mask_N, self.teacher_scales[name], key_mask_M))
        own = True if itself_NM is None else itself_NM
        target_NM, rows_N = mean_affinity(affinities, own)
        place = ("image", "text").index(side)
        return similarity_distillation(student[place], keys[place], self.distill_scale(), target_NM, rows_N, own)

    def _graph(self, student: StudentOutput, teachers: Mapping[str, TeacherBatch]) -> torch.Tensor:
        """Every teacher's graphs of pictures and of captions, weighted by how many rows it may speak for."""
        assert self.graph_scale is not None
        total, count = student.image_BD.new_zeros(()), 0
        for teacher in teachers.values():
            for side, features_ND in zip(("image", "text"), student, strict=True):
                vectors_NT, mask_N = side_of(teacher, side)
                rows = int(mask_N.sum())
                total = total + rows * graph_matching(features_ND, vectors_NT, mask_N, self.graph_scale())
                count += rows
        return total / max(count, 1)


Objective = ContrastiveObjective | DistillObjective
