"""Orthogonal matrices whose entries are all of one size: they spread any spectrum evenly over the dimensions."""

from __future__ import annotations

import numpy as np


def spreading_rotation(size: int) -> np.ndarray:
    """An orthogonal float64 [size, size] with entries of plus or minus ``1 / sqrt(size)`` where one can be made.

    Such (Hadamard) matrices are made here by Paley's and Sylvester's constructions, for 512, 640, 768, 1024 and most
    other multiples of four. For other sizes it is a discrete Hartley transform, which spreads nearly evenly.
    """
    core, doublings = size, 0
    while core > 2 and not _has_paley(core) and core % 2 == 0:
        core, doublings = core // 2, doublings + 1
    if core in (1, 2) or _has_paley(core):
        matrix = _paley(core) if core > 2 else np.array([[1.0, 1.0], [1.0, -1.0]])[:core, :core]
        for _ in range(doublings):
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return matrix / np.sqrt(size)
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(size)


def _has_paley(order: int) -> bool:
    """Paley's first construction: one less is a prime of the form 4k + 3."""
    prime = order - 1
    return prime % 4 == 3 and all(prime % factor for factor in range(2, int(prime**0.5) + 1))


def _paley(order: int) -> np.ndarray:
    prime = order - 1
    residue = np.full(prime, -1.0)
    residue[np.unique(np.arange(1, prime) ** 2 % prime)] = 1.0
    residue[0] = 0.0
    rows = np.arange(prime)
    matrix = np.eye(order)
    matrix[0, 1:], matrix[1:, 0] = 1.0, -1.0
    matrix[1:, 1:] += residue[(rows[:, None] - rows[None, :]) % prime]
    return matrix
