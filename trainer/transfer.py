"""A batch on its way to the device: one copy for all of its arrays, from pinned memory, beside the step before it.

Shapes: B = this rank's rows, N = the global batch, H x W = pixels, L = context length, T = a teacher's width, K =
numbers to draw by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from trainer.data import Batch
from trainer.losses import gather_constant
from trainer.teacher_vectors import TeacherBatch

_ALIGNMENT = 64
_STAGES = 2
"""Pinned buffers: one is filled while the other is being copied."""


@dataclass(frozen=True)
class DeviceBatch:
    """What a step needs of a batch, on the device."""

    pixels_BHWC: torch.Tensor
    tokens_BL: torch.Tensor
    teachers: dict[str, TeacherBatch]
    """Of the global batch, in rank order."""
    draws_NK: torch.Tensor | None
    """Of the global batch; None without teachers."""
    places_N: torch.Tensor | None
    """Likewise."""


class _Piece(NamedTuple):
    """Where an array lies among the bytes."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Sender:
    """Sends batches to a device, one after the other.

    Args:
        device: Where the student lies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self._is_cuda else None
        self._stages: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._sent = 0

    def send(self, batch: Batch) -> DeviceBatch:
        """A batch's arrays on the device; on a GPU the copy is only on its way, and later work there waits for it.

        With several ranks, what they tell each other of their teachers is one exchange, too.
        """
        own: list[np.ndarray] = [batch.pixels_BHWC, batch.tokens_BL]
        told: list[np.ndarray] = []
        if batch.teachers:
            told = [batch.draws_BK, batch.place_B]
            for rows in batch.teachers.values():
                told += [rows.image_BT, rows.text_BT, rows.image_mask_B, rows.text_mask_B]
        pieces, size = _lay_out([*own, *told])
        flat = self._copy([*own, *told], pieces, size)
        pixels, tokens = (_cut(flat[None], piece) for piece in pieces[:2])
        if not told:
            return DeviceBatch(pixels, tokens, {}, None, None)
        begin = pieces[2].offset
        ranks = gather_constant(flat[None, begin:])
        draws, places, *vectors = (_cut(ranks, piece._replace(offset=piece.offset - begin)) for piece in pieces[2:])
        teachers = {name: TeacherBatch(*vectors[4 * k : 4 * k + 4]) for k, name in enumerate(batch.teachers)}
        return DeviceBatch(pixels, tokens, teachers, draws, places)

    def _copy(self, arrays: Sequence[np.ndarray], pieces: Sequence[_Piece], size: int) -> torch.Tensor:
        if self._copies is None:
            buffer = torch.empty(size, dtype=torch.uint8)  # a fresh one: the step's tensors are views of it
            _fill(buffer, arrays, pieces)
            return buffer.to(self.device)
        buffer, copied = self._stage(size)
        copied.synchronize()  # the copy that used this buffer last, two steps ago
        _fill(buffer, arrays, pieces)
        with torch.cuda.stream(self._copies):
            flat = buffer[:size].to(self.device, non_blocking=True)
            copied.record(self._copies)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        flat.record_stream(current)
        return flat

    def _stage(self, size: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        if not self._stages or self._stages[0][0].numel() < size:
            torch.cuda.synchronize(self.device)
            self._stages = [
                (torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(_STAGES)
            ]
        self._sent += 1
        return self._stages[self._sent % _STAGES]


def _lay_out(arrays: Sequence[np.ndarray]) -> tuple[list[_Piece], int]:
    pieces, offset = [], 0
    for array in arrays:
        piece = _Piece(offset, torch.from_numpy(np.empty(0, array.dtype)).dtype, array.shape)
        pieces.append(piece)
        offset += piece.size + -piece.size % _ALIGNMENT
    return pieces, offset


def _fill(buffer: torch.Tensor, arrays: Sequence[np.ndarray], pieces: Sequence[_Piece]) -> None:
    memory = buffer.numpy()
    for array, piece in zip(arrays, pieces, strict=True):
        part = memory[piece.offset : piece.offset + piece.size]
        part.view(array.dtype).reshape(array.shape)[...] = array


def _cut(ranks_WX: torch.Tensor, piece: _Piece) -> torch.Tensor:
    """An array of all ranks, one below the other: bytes [W, X] -> [W * rows, ...]."""
    part = ranks_WX[:, piece.offset : piece.offset + piece.size]
    rows, *rest = piece.shape
    return part.contiguous().view(piece.dtype).reshape(len(ranks_WX) * rows, *rest)
