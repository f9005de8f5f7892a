"""What the writers of upstream-layout checkpoints have in common.

A writer leaves files as a teacher's authors publish them (names, prefixes, types, wrappers, stray keys) with random
weights, small unless asked otherwise, and gives a reference that computes the documented recipe independently of
this project's code.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

WORDS = (
    *("a", "an", "the", "of", "in", "with", "and", "no", "left", "right", "lung", "chest", "x", "ray", "ct", "mri"),
    *("slide", "tumour", "cell", "cells", "skin", "lesion", "fundus", "eye", "heart", "finding", "picture", "view"),
    *("normal", "opacity", "shows", "showing", "image", "scan", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
)
PIECES = tuple(f"##{piece}" for piece in ("s", "al", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"))


@dataclass(frozen=True)
class Upstream:
    """A published teacher as the tests wrote it."""

    name: str
    """The catalog's name for it."""
    place: Path
    """What a user would give: NAME=PLACE."""
    entry: dict = field(default_factory=dict)
    """What a user's YAML has to state because the model is a small one (such as ``architecture``, ``expect``)."""
    image: Callable[[list[bytes]], np.ndarray] | None = None
    """Encoded pictures -> unit vectors float32 [N, D], by the documented recipe."""
    text: Callable[[list[str]], np.ndarray] | None = None
    """Captions -> unit vectors float32 [N, D]; None for image encoders."""


def write_bert_vocabulary(folder: Path, cased: bool = False) -> Path:
    """A folder with ``vocab.txt`` alone, as older BERT repositories have it: [PAD] is 0, [CLS] 2, [SEP] 3."""
    folder.mkdir(parents=True, exist_ok=True)
    # A cased vocabulary holds capitals that a lower-casing tokenizer never produces.
    capitals = ("Lung", "Chest", "CT", "MRI") if cased else ()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *capitals, *PIECES, ".", ",", "-"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return folder


def vocabulary_size(folder: Path) -> int:
    """Number of tokens in a folder's ``vocab.txt``."""
    return len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())


def write_json(path: Path, value: dict) -> Path:
    """Write a JSON file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def unit(vectors) -> np.ndarray:
    """Rows of a tensor or array at unit length, float32."""
    array = np.asarray(vectors.detach() if hasattr(vectors, "detach") else vectors, dtype=np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)
