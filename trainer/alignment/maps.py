"""A fitted alignment: for each teacher and side one affine map, as safetensors and JSON in a folder of the lake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import fingerprint
from common.errors import LakeError
from common.lake import Lake, claim_partition, now

FOLDER = "alignment"
MANIFEST = "alignment.json"
MAPS = "maps.safetensors"
NEWEST = "newest"
"""In a configuration: whichever alignment was asked for last."""
SIDES = ("image", "text")


@dataclass(frozen=True)
class AffineMap:
    """``x @ matrix + shift``: from a teacher's unit vectors, of width T, to a space of width W. Float32."""

    matrix_TW: np.ndarray
    shift_W: np.ndarray

    def __call__(self, vectors_NT: np.ndarray) -> np.ndarray:
        """Vectors [N, T] -> [N, W]."""
        return vectors_NT @ self.matrix_TW + self.shift_W


Maps = dict[str, dict[str, AffineMap]]
"""Teacher -> side (``image``, ``text``) -> map; a side that the teacher lacks is missing."""


@dataclass(frozen=True)
class Alignment:
    """A fitted alignment of a lake.

    Attributes:
        name: Its fingerprint, which is also its folder's name.
        recipe: How it was fitted.
        maps: The maps of its teachers.
    """

    name: str
    recipe: str
    maps: Maps


def save_alignment(lake: Lake, identity: dict[str, Any], maps: Maps, facts: dict[str, Any]) -> str:
    """Write the maps and, last, the manifest that makes them count.

    Args:
        lake: The lake.
        identity: Everything that determines the maps.
        maps: What was fitted.
        facts: For people: what the maps change.

    Returns:
        The fingerprint.
    """
    from safetensors.numpy import save

    name = fingerprint(identity)
    tensors = {
        f"{teacher}/{side}/{part}": np.ascontiguousarray(getattr(one, field), np.float32)
        for teacher, sides in maps.items()
        for side, one in sides.items()
        for part, field in (("matrix", "matrix_TW"), ("shift", "shift_W"))
    }
    lake.storage.write_bytes(f"{FOLDER}/{name}/{MAPS}", save(tensors))
    claim_partition(lake.storage, f"{FOLDER}/{name}/{MANIFEST}", identity, "", facts)
    return name


def touch_alignment(lake: Lake, name: str) -> bool:
    """Whether an alignment is there already; if so it is the newest from now on."""
    manifest = f"{FOLDER}/{name}/{MANIFEST}"
    if not lake.storage.exists(manifest):
        return False
    lake.storage.write_json(manifest, {**lake.storage.read_json(manifest), "created_at": now()})
    return True


def load_alignment(lake: Lake, name: str, teachers: tuple[str, ...]) -> Alignment:
    """Read an alignment and insist that it is of the teachers as they are now.

    Args:
        lake: The lake.
        name: A fingerprint, or ``newest``.
        teachers: Who must be covered.

    Raises:
        LakeError: There is none of that name, it lacks a teacher, or a teacher's embeddings are others now.
    """
    from safetensors.numpy import load

    manifests = {
        found: lake.storage.read_json(f"{FOLDER}/{found}/{MANIFEST}")
        for found in lake.storage.list_folders(FOLDER)
        if lake.storage.exists(f"{FOLDER}/{found}/{MANIFEST}")
    }
    if not manifests:
        raise LakeError(f"{lake.uri} has no alignment yet. Run `mmkd align {lake.uri} --recipe paper` first.")
    if name == NEWEST:
        name = max(manifests, key=lambda found: (str(manifests[found]["created_at"]), found))
    if name not in manifests:
        raise LakeError(f"{lake.uri} has no alignment {name!r}; it has {', '.join(sorted(manifests))}.")
    recorded = manifests[name]["fingerprint"]
    missing = sorted(set(teachers) - set(recorded["teachers"]))
    if missing:
        raise LakeError(
            f"Alignment {name} does not cover {', '.join(missing)} (it covers {', '.join(recorded['teachers'])}). Run "
            f"`mmkd align {lake.uri}` again, or leave these teachers out."
        )
    now_there = {teacher: fingerprint(lake.read_teacher(teacher)["fingerprint"]) for teacher in teachers}
    changed = [teacher for teacher in teachers if recorded["teachers"][teacher] != now_there[teacher]]
    if changed:
        raise LakeError(
            f"Alignment {name} was fitted to other embeddings of {', '.join(changed)} than the lake holds now. Run "
            f"`mmkd align {lake.uri}` again."
        )
    tensors = load(lake.storage.read_bytes(f"{FOLDER}/{name}/{MAPS}"))
    maps: Maps = {teacher: {} for teacher in teachers}
    for teacher in teachers:
        for side in SIDES:
            if f"{teacher}/{side}/matrix" in tensors:
                parts = (tensors[f"{teacher}/{side}/{part}"] for part in ("matrix", "shift"))
                maps[teacher][side] = AffineMap(*parts)
    return Alignment(name, recorded["config"]["recipe"], maps)
