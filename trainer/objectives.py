"""One objective per stage: it owns every learned scalar, and its terms are named, weighted in plain sight and summed.

Shapes: N = global batch, D = the student's width, T = a teacher's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from trainer.config import DistillConfig
from trainer.losses import Affinity, clip_loss, mean_affinity, similarity_distillation
from trainer.student import StudentOutput

MAX_LOG_SCALE = math.log(100)  # CLIP's own bound; without it the scale runs away on easy batches


class TeacherBatch(NamedTuple):
    """One teacher's stored unit vectors for a batch, and where it may speak."""

    image_NT: torch.Tensor
    text_NT: torch.Tensor
    image_mask_N: torch.Tensor
    text_mask_N: torch.Tensor


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

    def __init__(self, init_temperature: float) -> None:
        super().__init__()
        self.scale = LearnedScale(1 / init_temperature)

    def forward(self, student: StudentOutput, teachers: Mapping[str, TeacherBatch]) -> Stage1Terms:
        """The CLIP loss; teachers are not consulted in this stage."""
        contrastive = clip_loss(student.image_BD, student.text_BD, self.scale())
        return Stage1Terms(contrastive=contrastive, total=contrastive)

    def after_step(self) -> None:
        """Keep the scale in its bounds."""
        self.scale.clamp()


class DistillObjective(nn.Module):
    """Stage 2: the pairs, and the similarity matrices of every admissible teacher."""

    def __init__(self, weights: DistillConfig, teacher_scales: Mapping[str, float], init_scale: float) -> None:
        """Start the scales.

        Args:
            weights: Of the terms.
            teacher_scales: Teacher -> the factor on its cosines it was trained with.
            init_scale: The contrastive scale that stage 1 arrived at.
        """
        super().__init__()
        self.weights = weights
        self.teacher_scales = dict(teacher_scales)
        self.scale = LearnedScale(init_scale)
        # Its own scale: teachers' softmaxes are softer than one-hot labels and would otherwise fight over one number.
        self.distill_scale = LearnedScale(init_scale)

    def forward(self, student: StudentOutput, teachers: Mapping[str, TeacherBatch]) -> Stage2Terms:
        """The weighted sum over the global batch."""
        weights, image_ND, text_ND = self.weights, student.image_BD, student.text_BD
        zero = image_ND.new_zeros(())
        contrastive = clip_loss(image_ND, text_ND, self.scale())
        image_text = self._image_text(student, teachers) if weights.image_text else zero
        image_image = self._within(image_ND, teachers, "image") if weights.image_image else zero
        text_text = self._within(text_ND, teachers, "text") if weights.text_text else zero
        return Stage2Terms(
            contrastive=contrastive,
            image_text=image_text,
            image_image=image_image,
            text_text=text_text,
            total=weights.contrastive * contrastive
            + weights.image_text * image_text
            + weights.image_image * image_image
            + weights.text_text * text_text,
        )

    def after_step(self) -> None:
        """Keep the scales in their bounds."""
        self.scale.clamp()
        self.distill_scale.clamp()

    def _image_text(self, student: StudentOutput, teachers: Mapping[str, TeacherBatch]) -> torch.Tensor:
        """Both directions, averaged; a teacher speaks where it has both the picture and the caption."""
        forward, backward = [], []
        for name, teacher in teachers.items():
            both_N = teacher.image_mask_N & teacher.text_mask_N
            scale = self.teacher_scales[name]
            if teacher.image_NT.shape[1] != teacher.text_NT.shape[1]:
                continue  # one tower only: its other column is a placeholder of width 1, masked everywhere
            forward.append(Affinity(teacher.image_NT, teacher.text_NT, both_N, scale))
            backward.append(Affinity(teacher.text_NT, teacher.image_NT, both_N, scale))
        if not forward:
            return student.image_BD.new_zeros(())
        terms = [
            similarity_distillation(query_ND, key_ND, self.distill_scale(), *mean_affinity(said, False), False)
            for query_ND, key_ND, said in (
                (student.image_BD, student.text_BD, forward),
                (student.text_BD, student.image_BD, backward),
            )
        ]
        return (terms[0] + terms[1]) / 2

    def _within(self, features_ND: torch.Tensor, teachers: Mapping[str, TeacherBatch], side: str) -> torch.Tensor:
        """Similarities within one modality, each row's own column left out."""
        said = []
        for name, teacher in teachers.items():
            vectors_NT, mask_N = (
                (teacher.image_NT, teacher.image_mask_N) if side == "image" else (teacher.text_NT, teacher.text_mask_N)
            )
            said.append(Affinity(vectors_NT, vectors_NT, mask_N, self.teacher_scales[name]))
        target_NN, rows_N = mean_affinity(said, exclude_self=True)
        return similarity_distillation(
            features_ND, features_ND, self.distill_scale(), target_NN, rows_N, exclude_self=True
        )


Objective = ContrastiveObjective | DistillObjective
