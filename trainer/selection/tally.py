"""What a selection came to, counted in the files that it wrote: the report then says what stage 2 will find there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.lake import Lake, shard_name

READERS = 8
"""Shards counted at once: three light columns of each, which is less than the vectors of one."""


class Count(NamedTuple):
    """A teacher's rows of one modality."""

    rows: int
    scored: int
    """Rows of which both vectors are there, in one space."""
    kept: int
    first: int
    """Scored rows whose caption ranks first among the candidates."""
    kept_first: int
    """The same of those kept."""

    @property
    def eligible(self) -> int:
        """Rows that the teacher might have spoken for. One that speaks unscored has no text tower: all of them."""
        return self.scored or (self.rows if self.kept else 0)

    @property
    def report(self) -> dict[str, Any]:
        """Share kept, and how often the caption ranks first among all rows and among those kept; None of no rows."""
        return {
            "kept": round(self.kept / max(self.eligible, 1), 4),
            "found_first": [
                round(self.first / self.scored, 4) if self.scored else None,
                round(self.kept_first / self.kept, 4) if self.scored and self.kept else None,
            ],
        }


class Heard(NamedTuple):
    """Rows of one modality, whoever speaks for them."""

    rows: int
    without_teacher: int


@dataclass(frozen=True)
class Tally:
    """The counts of a whole selection."""

    teachers: dict[tuple[str, str], Count]
    """(Teacher, modality) -> its rows."""
    modalities: dict[str, Heard]


def tally(lake: Lake, folder: str, teachers: Sequence[str], shards: Sequence[int]) -> Tally:
    """Count a selection's rows shard by shard, all teachers of a shard together; no vector is read again.

    Args:
        lake: The lake.
        folder: The selection's, in the lake.
        teachers: Whose decisions it holds.
        shards: Numbers of its shards.
    """
    spoken: dict[tuple[str, str], np.ndarray] = {}
    heard: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for by_teacher, by_modality in pool.map(functools.partial(_count_shard, lake, folder, teachers), shards):
            for key, numbers in by_teacher.items():
                spoken[key] = spoken.get(key, 0) + numbers
            for modality, numbers in by_modality.items():
                heard[modality] = heard.get(modality, 0) + numbers
    return Tally(
        {key: Count(*numbers.tolist()) for key, numbers in spoken.items()},
        {modality: Heard(*numbers.tolist()) for modality, numbers in sorted(heard.items())},
    )


def _count_shard(
    lake: Lake, folder: str, teachers: Sequence[str], shard: int
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, np.ndarray]]:
    by_teacher: dict[tuple[str, str], np.ndarray] = {}
    admitted = []
    for teacher in teachers:
        file = f"{folder}/teacher={teacher}/{shard_name(shard)}"
        table = lake.storage.read_table(file, ["modality", "rank", "admitted"])
        admitted.append(table["admitted"])
        first = pc.fill_null(pc.equal(table["rank"], 1), False)
        counts = _sums(table["modality"], pc.is_valid(table["rank"]), admitted[-1], first, pc.and_(first, admitted[-1]))
        by_teacher.update({(teacher, modality): numbers for modality, numbers in counts.items()})
    return by_teacher, _sums(table["modality"], pc.invert(functools.reduce(pc.or_, admitted)))


def _sums(modality: pa.ChunkedArray, *flags: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Modality -> its rows, and those with each flag."""
    names = [f"flag-{number}" for number in range(len(flags))]
    grouped = pa.table([modality, *flags], names=["modality", *names]).group_by("modality")
    summed = grouped.aggregate([([], "count_all"), *((name, "sum") for name in names)])
    columns = [summed[name].to_pylist() for name in ("count_all", *(f"{name}_sum" for name in names))]
    return {name: np.array(row) for name, *row in zip(summed["modality"].to_pylist(), *columns, strict=True)}
