"""One objective per stage: it owns every learned scalar, and its terms are named, weighted in plain sight and summed.

Shapes: N = global batch, D = the student's width, T = a teacher's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
    head_errors,
    mean_affinity,
    mean_over_teachers,
    siglip_loss,
    similarity_distillation,
)
from trainer.student import StudentOutput

MAX_LOG_SCALE = math.log(100)  # CLIP's own bound; without it the scale runs away on easy batches
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0  # where SigLIP starts: nearly all pairings are false
PAPER_CROSS_SCALE = math.log(1 / 0.07)
"""What MMKD-CLIP's code multiplies cosines with: the logarithm of the scale that is meant (KDClipLoss)."""


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

    def after_step(self) -> None:
        """Keep the scale in its bounds."""
        self.scale.clamp()


class AlignedTeachers(nn.Module):
    """The maps of an alignment on the device; constants, which no checkpoint keeps, since the lake does.

    Args:
        maps: Teacher -> side -> map.
    """

    def __init__(self, maps: Maps) -> None:
        super().__init__()
        self.teachers = tuple(maps)
        self.sides = {name: tuple(sides) for name, sides in maps.items()}
        for number, sides in enumerate(maps.values()):
            for side, one in sides.items():
                for part, values in (("matrix", one.matrix_TW), ("shift", one.shift_W)):
                    self.register_buffer(f"{side}_{part}_{number}", torch.from_numpy(values.copy()), persistent=False)

    def forward(self, teachers: Mapping[str, TeacherBatch]) -> dict[str, TeacherBatch]:
        """The teachers' vectors after their maps; masks stay, and what has no map stays as it is."""
        return {
            name: TeacherBatch(
                self._mapped(name, "image", teacher.image_NT),
                self._mapped(name, "text", teacher.text_NT),
                teacher.image_mask_N,
                teacher.text_mask_N,
            )
            for name, teacher in teachers.items()
        }

    def _mapped(self, name: str, side: str, vectors_NT: torch.Tensor) -> torch.Tensor:
        if side not in self.sides.get(name, ()):
            return vectors_NT
        number = self.teachers.index(name)
        return vectors_NT @ self.get_buffer(f"{side}_matrix_{number}") + self.get_buffer(f"{side}_shift_{number}")


class TeacherHeads(nn.Module):
    """For each teacher and side a linear map from the student's space to the teacher's; never exported.

    Args:
        width: Of the student's vectors.
        dims: Teacher -> widths of its picture's and its caption's vectors; None for a tower it lacks.
    """

    def __init__(self, width: int, dims: Mapping[str, tuple[int | None, int | None]]) -> None:
        super().__init__()
        # By number: a module's name may hold no dot, a teacher's may.
        self.teachers = tuple(dims)
        sides = zip(*dims.values(), strict=True) if dims else ((), ())
        self.image, self.text = (
            nn.ModuleList([nn.Identity() if dim is None else nn.Linear(width, dim) for dim in side]) for side in sides
        )

    def forward(
        self,
        student: StudentOutput,
        teachers: Mapping[str, TeacherBatch],
        smooth_share: float,
        drop: float,
        draws_NK: torch.Tensor | None,
    ) -> torch.Tensor:
        """Mean error over teachers and rows, both sides averaged; for ``drop``, ``draws_NK`` has a column a teacher."""
        draws_KN = None if draws_NK is None else draws_NK.T
        sides = []
        for maps, features_ND, vectors, mask in (
            (self.image, student.image_BD, "image_NT", "image_mask_N"),
            (self.text, student.text_BD, "text_NT", "text_mask_N"),
        ):
            there = [k for k, name in enumerate(self.teachers) if name in teachers and isinstance(maps[k], nn.Linear)]
            if not there:
                continue
            said = [teachers[self.teachers[k]] for k in there]
            errors = [
                head_errors(maps[k](features_ND), getattr(teacher, vectors), smooth_share)
                for k, teacher in zip(there, said, strict=True)
            ]
            masks = [getattr(teacher, mask) for teacher in said]
            sides.append(mean_over_teachers(errors, masks, None if draws_KN is None else draws_KN[there], drop))
        return torch.stack(sides).mean() if sides else student.image_BD.new_zeros(())


class EmbeddingQueue(nn.Module):
    """Vectors of the samples of the last steps, the student's and every teacher's, newest first.

    Similarities then have more columns than the batch has rows. The teachers' vectors are exact; the student's are as
    old as their step, which at the learning rates of distillation matters little (Wang et al. 2020, XBM). Its buffers
    belong to the checkpoint, so a resumed run goes on with the same columns.

    Args:
        length: Rows kept.
        width: Of the student's vectors.
        dims: Teacher -> widths of its stored picture's and caption's vectors; None for a tower it lacks.
    """

    filled: torch.Tensor

    def __init__(self, length: int, width: int, dims: Mapping[str, tuple[int | None, int | None]]) -> None:
        super().__init__()
        self.length, self.teachers = length, tuple(dims)
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("place", torch.full((length,), -1))
        for name, size in self._widths(width, dims):
            empty = torch.zeros(length, size) if size else torch.zeros(length, dtype=torch.bool)
            self.register_buffer(name, empty)

    @staticmethod
    def _widths(width: int, dims: Mapping[str, tuple[int | None, int | None]]) -> Iterator[tuple[str, int]]:
        """Name and width of each buffer, 0 for a mask; a teacher goes by its number, for its name may hold a dot."""
        yield from (("image", width), ("text", width))
        for k, (image, text) in enumerate(dims.values()):
            # Batches hold a placeholder of width 1 where there is no tower.
            yield from ((f"image_{k}", image or 1), (f"text_{k}", text or 1), (f"image_mask_{k}", 0))
            yield f"text_mask_{k}", 0

    def behind(
        self, student: StudentOutput, teachers: Mapping[str, TeacherBatch], places_N: torch.Tensor
    ) -> tuple[StudentOutput, dict[str, TeacherBatch], torch.Tensor]:
        """The batch with the queue's rows below it, and bool [N, M]: the rows that are the same sample.

        Where an epoch ends the queue may hold a sample of the batch, whose vectors would be the nearest of all.
        """
        rows = int(self.filled)

        def longer(batch: torch.Tensor, name: str) -> torch.Tensor:
            return torch.cat([batch, self.get_buffer(name)[:rows]])

        own = StudentOutput(longer(student.image_BD, "image"), longer(student.text_BD, "text"))
        numbers = {name: self.teachers.index(name) for name in teachers}
        said = {
            name: TeacherBatch(
                *(longer(part, f"{side}_{numbers[name]}") for part, side in zip(one, QUEUED, strict=True))
            )
            for name, one in teachers.items()
        }
        batch_NN = torch.eye(len(places_N), dtype=torch.bool, device=places_N.device)
        queue_NQ = (places_N[:, None] == self.get_buffer("place")[None, :rows]) & (places_N >= 0)[:, None]
        return own, said, torch.cat([batch_NN, queue_NQ], dim=1)

    @torch.no_grad()
    def push(self, student: StudentOutput, teachers: Mapping[str, TeacherBatch], places_N: torch.Tensor) -> None:
        """Put a batch's rows in front, and forget the oldest."""
        self._push("place", places_N)
        self._push("image", student.image_BD)
        self._push("text", student.text_BD)
        for name, one in teachers.items():
            for part, side in zip(one, QUEUED, strict=True):
                self._push(f"{side}_{self.teachers.index(name)}", part)
        self.filled.fill_(min(int(self.filled) + len(student.image_BD), self.length))

    def _push(self, name: str, rows: torch.Tensor) -> None:
        buffer = self.get_buffer(name)
        buffer.copy_(torch.cat([rows.detach().to(buffer.dtype), buffer])[: self.length])


QUEUED = ("image", "text", "image_mask", "text_mask")
"""The parts of a :class:`TeacherBatch`, as the queue names them."""


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
            teachers = {name: _unit(teacher) for name, teacher in teachers.items()}
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

    def after_step(self) -> None:
        """Keep the scales in their bounds, and the batch in the queue."""
        for scale in (self.scale, self.distill_scale, self.cross_scale, self.graph_scale):
            if scale is not None:
                scale.clamp()
        if self.queue is not None and self._last is not None:
            self.queue.push(*self._last)
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
            (query_NT, mask_N), (key_MT, key_mask_M) = _side(teacher, side), _side(said[name], side)
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
                vectors_NT, mask_N = _side(teacher, side)
                rows = int(mask_N.sum())
                total = total + rows * graph_matching(features_ND, vectors_NT, mask_N, self.graph_scale())
                count += rows
        return total / max(count, 1)


def _side(teacher: TeacherBatch, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's vectors of one side, and where it may speak of it."""
    return (teacher.image_NT, teacher.image_mask_N) if side == "image" else (teacher.text_NT, teacher.text_mask_N)


def stored_dims(
    dims: Mapping[str, tuple[int | None, int | None]], maps: Maps | None
) -> dict[str, tuple[int | None, int | None]]:
    """Teacher -> widths of its vectors before an alignment, from those after it."""
    found = {}
    for name, (image, text) in dims.items():
        into = (maps or {}).get(name, {})
        found[name] = (
            into["image"].matrix_TW.shape[0] if "image" in into else image,
            into["text"].matrix_TW.shape[0] if "text" in into else text,
        )
    return found


def _unit(teacher: TeacherBatch) -> TeacherBatch:
    """The same with vectors of length one; zeros stay."""
    image_NT, text_NT = F.normalize(teacher.image_NT, dim=1), F.normalize(teacher.text_NT, dim=1)
    return TeacherBatch(image_NT, text_NT, teacher.image_mask_N, teacher.text_mask_N)


def draw_teacher(
    teachers: Mapping[str, TeacherBatch], draw_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row the vectors of one of the teachers that may speak for both its sides, all alike probable.

    Args:
        teachers: Of equal widths.
        draw_N: Numbers in [0, 1) that choose; None takes the first.

    Returns:
        Pictures' vectors [N, T], captions' [N, T], and bool [N], where there is any; zeros elsewhere.
    """
    said = list(teachers.values())
    mask_KN = torch.stack([teacher.image_mask_N & teacher.text_mask_N for teacher in said])
    count_N = mask_KN.sum(dim=0)
    chosen_N = torch.zeros_like(count_N) if draw_N is None else (draw_N * count_N).long().clamp(max=len(said) - 1)
    is_chosen_KN = mask_KN & (mask_KN.cumsum(dim=0) - 1 == chosen_N)
    image_NT, text_NT = torch.zeros_like(said[0].image_NT), torch.zeros_like(said[0].text_NT)
    for teacher, here_N in zip(said, is_chosen_KN, strict=True):
        image_NT = torch.where(here_N[:, None], teacher.image_NT, image_NT)
        text_NT = torch.where(here_N[:, None], teacher.text_NT, text_NT)
    return image_NT, text_NT, count_N > 0


Objective = ContrastiveObjective | DistillObjective
