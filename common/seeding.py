"""Randomness as a function of names: the same keys give the same numbers on any machine, in any order."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(*keys: object) -> int:
    """A 64-bit seed that depends on all keys and nothing else."""
    text = "\0".join(str(key) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def rng(*keys: object) -> np.random.Generator:
    """A generator for the given keys, for example ``rng(seed, "crop", epoch, sample_id)``."""
    return np.random.default_rng(seed_of(*keys))
