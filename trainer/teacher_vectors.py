"""What stage 2 makes of the teachers' vectors: their batches, alignment on the device, heads, the queue, the draw.

Shapes: N = global batch, Q = queued rows, M = both, K = teachers, D = the student's width, T = a teacher's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import nn

from trainer.alignment.maps import Maps
from trainer.losses import head_errors, mean_over_teachers
from trainer.student import StudentOutput


class TeacherBatch(NamedTuple):
    """One teacher's stored unit vectors for a batch, and where it may speak."""

    image_NT: torch.Tensor
    text_NT: torch.Tensor
    image_mask_N: torch.Tensor
    text_mask_N: torch.Tensor


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
    def push(
        self,
        student: StudentOutput,
        teachers: Mapping[str, TeacherBatch],
        places_N: torch.Tensor,
        wanted: torch.Tensor,
    ) -> None:
        """Put a batch's rows in front, and forget the oldest.

        Args:
            student: Of the batch.
            teachers: Likewise.
            places_N: Likewise.
            wanted: Bool scalar on the device; where it is false, nothing changes.
        """
        self._push("place", places_N, wanted)
        self._push("image", student.image_BD, wanted)
        self._push("text", student.text_BD, wanted)
        for name, one in teachers.items():
            for part, side in zip(one, QUEUED, strict=True):
                self._push(f"{side}_{self.teachers.index(name)}", part, wanted)
        filled = (self.filled + len(student.image_BD)).clamp(max=self.length)
        self.filled.copy_(torch.where(wanted, filled, self.filled))

    def _push(self, name: str, rows: torch.Tensor, wanted: torch.Tensor) -> None:
        buffer = self.get_buffer(name)
        pushed = torch.cat([rows.detach().to(buffer.dtype), buffer])[: self.length]
        buffer.copy_(torch.where(wanted, pushed, buffer))


QUEUED = ("image", "text", "image_mask", "text_mask")
"""The parts of a :class:`TeacherBatch`, as the queue names them."""


def side_of(teacher: TeacherBatch, side: str) -> tuple[torch.Tensor, torch.Tensor]:
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


def unit_length(teacher: TeacherBatch) -> TeacherBatch:
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
