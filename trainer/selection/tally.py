"""What a selection came to, counted in the files that it wrote: the report then says what stage 2 will find there.

Rows without a caption are counted apart, since stage 2 takes none of them whoever speaks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.captions import captioned
from common.lake import Lake, shard_name

READERS = 8
"""Shards counted at once: captions and three light columns of each, which is less than the vectors of one."""


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


NO_ROWS = Count(0, 0, 0, 0, 0)
"""Of a modality in which no row has a caption."""


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
    without_caption: int = 0
    """Rows of all modalities, in none of the other counts."""


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
    without_caption = 0
    with ThreadPoolExecutor(READERS) as pool:
        count_one = functools.partial(_count_shard, lake, folder, teachers)
        for by_teacher, by_modality, silent in pool.map(count_one, shards):
            for key, numbers in by_teacher.items():
                spoken[key] = spoken.get(key, 0) + numbers
            for modality, numbers in by_modality.items():
                heard[modality] = heard.get(modality, 0) + numbers
            without_caption += silent
    return Tally(
        {key: Count(*numbers.tolist()) for key, numbers in spoken.items()},
        {modality: Heard(*numbers.tolist()) for modality, numbers in sorted(heard.items())},
        without_caption,
    )


def _count_shard(
    lake: Lake, folder: str, teachers: Sequence[str], shard: int
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, np.ndarray], int]:
    by_teacher: dict[tuple[str, str], np.ndarray] = {}
    has_caption = captioned(lake.read_pairs(shard, ["captions"])["captions"])
    admitted = []
    for teacher in teachers:
        file = f"{folder}/teacher={teacher}/{shard_name(shard)}"
        table = lake.storage.read_table(file, ["modality", "rank", "admitted"]).filter(has_caption)
        admitted.append(table["admitted"])
        first = pc.fill_null(pc.equal(table["rank"], 1), False)
        counts = _sums(table["modality"], pc.is_valid(table["rank"]), admitted[-1], first, pc.and_(first, admitted[-1]))
        by_teacher.update({(teacher, modality): numbers for modality, numbers in counts.items()})
    alone = pc.invert(functools.reduce(pc.or_, admitted))
    return by_teacher, _sums(table["modality"], alone), int((~has_caption).sum())


def _sums(modality: pa.ChunkedArray, *flags: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Modality -> its rows, and those with each flag."""
    names = [f"flag-{number}" for number in range(len(flags))]
    grouped = pa.table([modality, *flags], names=["modality", *names]).group_by("modality")
    summed = grouped.aggregate([([], "count_all"), *((name, "sum") for name in names)])
    columns = [summed[name].to_pylist() for name in ("count_all", *(f"{name}_sum" for name in names))]
    return {name: np.array(row) for name, *row in zip(summed["modality"].to_pylist(), *columns, strict=True)}
