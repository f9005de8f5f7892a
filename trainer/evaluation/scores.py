"""Scores as a table: what was measured becomes rows of the SCORES schema, in the lake's ``scores/`` folder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

from common.lake import Lake, now
from common.schemas import SCORES, check_table
from trainer.evaluation.metrics import Score

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


def scores_table(
    measured: Iterable[Measured], model: str, model_kind: str, dataset: str, weights_sha256: str | None
) -> pa.Table:
    """The figures of one model in the SCORES schema, with 95 % intervals."""
    created_at = now()
    rows = []
    for task, modality, metric, score in measured:
        low, high = score.interval()
        rows.append(
            {
                "model": model,
                "model_kind": model_kind,
                "task": task,
                "dataset": dataset,
                "modality": modality,
                "metric": metric,
                "value": score.value,
                "low": low,
                "high": high,
                "n": score.n,
                "weights_sha256": weights_sha256,
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
