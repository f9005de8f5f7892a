"""Scores as a table: what was measured becomes rows of the SCORES schema, in the lake's ``scores/`` folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa

from common.lake import Lake, now
from common.schemas import SCORES, check_table
from trainer.evaluation.metrics import Score, mean_score

ALL = "all"
"""Stands in the modality column for figures over everything at once."""
MEAN = "mean"
"""Stands in the modality column for unweighted means over modalities."""


class Measured(NamedTuple):
    """One figure of one model."""

    task: str
    modality: str
    metric: str
    score: Score
    classes: int | None = None
    """How many a classification chose among."""
    chance: float | None = None
    """What guessing gives; None where that is no one number."""


class Provenance(NamedTuple):
    """What all figures of one model have in common."""

    evaluation: str
    """Name of the file that they go to."""
    model: str
    model_kind: str
    dataset: str
    split: str
    weights_sha256: str | None


def mean_over_modalities(found: Sequence[Measured]) -> Measured:
    """The unweighted mean of one figure over modalities, and of what guessing gives where that is known for all."""
    chances = [one.chance for one in found]
    known = [chance for chance in chances if chance is not None]
    chance = sum(known) / len(known) if len(known) == len(chances) else None
    return Measured(found[0].task, MEAN, found[0].metric, mean_score([one.score for one in found]), chance=chance)


def scores_table(measured: Iterable[Measured], of: Provenance) -> pa.Table:
    """The figures of one model in the SCORES schema, with 95 % intervals."""
    created_at = now()
    rows = []
    for one in measured:
        low, high = one.score.interval()
        rows.append(
            {
                **of._asdict(),
                "task": one.task,
                "modality": one.modality,
                "metric": one.metric,
                "value": one.score.value,
                "low": low,
                "high": high,
                "n": one.score.n,
                "classes": one.classes,
                "chance": one.chance,
                "created_at": created_at,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCORES)


def read_scores(lake: Lake, name: str | None = None) -> pa.Table | None:
    """Scores written earlier.

    Args:
        lake: The lake.
        name: File name in ``scores/`` without its suffix; None takes the file written last.

    Returns:
        A table of the SCORES schema, or None when nothing was evaluated here yet.

    Raises:
        SchemaError: The file was written with other columns.
        FileNotFoundError: There is no file of the name asked for.
    """
    names = (
        [name] if name else [file.removesuffix(".parquet") for file in lake.storage.list_files("scores", ".parquet")]
    )
    tables = [lake.storage.read_table(f"scores/{each}.parquet") for each in names]
    for each, table in zip(names, tables, strict=True):
        check_table(table, SCORES, f"{lake.uri}/scores/{each}.parquet")
    filled = [table for table in tables if table.num_rows]
    return max(filled, key=lambda table: max(table["created_at"].to_pylist()), default=None)
