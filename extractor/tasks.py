"""Many small tasks through Ray Data, whose answers are small rows; what a user can mend travels back as data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import ray

from common.errors import MmkdError, SourceError, StorageError

KINDS = {kind.__name__: kind for kind in (SourceError, StorageError)}
"""Errors that keep their class on the way back; others of ours become a StorageError with the same words."""


def run_tasks(items: list[Any], task: Callable[..., Any], *arguments: Any) -> Iterator[tuple[int, Any]]:
    """Call ``task(item, *arguments)`` for each item, one CPU each, on whatever machines there are.

    Args:
        items: JSON-able values.
        task: A module-level function that returns a JSON-able value.
        *arguments: The same for every call; small and picklable.

    Yields:
        Index of an item and its answer, in the order in which they are finished.

    Raises:
        MmkdError: A task met one, or a file or connection failed it; the tasks that are done stay done.
    """
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"index": index, "item": json.dumps(item)} for index, item in enumerate(items)]
    stream = ray.data.from_items(rows, override_num_blocks=len(rows))
    answers = stream.map(_run_one, fn_args=(task, arguments), num_cpus=1)  # type: ignore[arg-type]  # stub lacks fn_args
    for row in answers.iter_rows():
        if row["error"]:
            kind = KINDS.get(row["error_kind"], StorageError)
            raise kind(f"{row['error']} What was finished is kept: run the same command again to go on from there.")
        yield row["index"], json.loads(row["answer"])


def _run_one(row: dict[str, Any], task: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    answer, error_kind, message = None, "", ""
    try:
        answer = task(json.loads(row["item"]), *arguments)
    except MmkdError as error:
        error_kind, message = type(error).__name__, str(error)
    except OSError as error:  # a source that vanished or broke off while it was read
        error_kind, message = StorageError.__name__, f"Reading or writing failed: {type(error).__name__}: {error}."
    return {"index": row["index"], "answer": json.dumps(answer), "error_kind": error_kind, "error": message}
