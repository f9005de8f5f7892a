"""Many small tasks, in this process or through Ray Data, whose answers are small rows.

What a user can mend travels back as data.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from common.errors import MmkdError, StoppedError, StorageError, from_row, to_row
from common.processes import has_few_cores, usable_cores
from common.storage_errors import without_secrets

KEPT = " What was finished is kept: run the same command again to go on from there."
"""Behind an error's own words."""
_OF_THREAD = threading.local()


def insist_on_going() -> None:
    """Between two rows of a long task: end it if whoever wanted its answer is gone.

    Raises:
        StoppedError: They are.
    """
    over = getattr(_OF_THREAD, "over", None)
    if over is not None and over.is_set():
        raise StoppedError("The run is over.")


class Workers:
    """Runs tasks on whatever machines there are, and starts nothing for what one process does sooner.

    Args:
        session: Context in which Ray is initialised, entered at the first need and left at the end; by default it must
            be already.
    """

    def __init__(self, session: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext) -> None:
        self._session = session
        self._entered = contextlib.ExitStack()
        self._is_there = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return bool(self._entered.__exit__(kind, error, trace))

    def run(
        self, items: list[Any], task: Callable[..., Any], *arguments: Any, few: int = 1, threads: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Call ``task(item, *arguments)`` for each item, one CPU each.

        Args:
            items: JSON-able values.
            task: A module-level function that returns a JSON-able value.
            *arguments: The same for every call; small and picklable.
            few: No more items than these are done here, one after the other. A single task gains nothing by a cluster,
                and starting one takes longer than most.
            threads: The task leaves its work to libraries and children, and calls :func:`insist_on_going` now and then:
                on a small machine that belongs to no cluster threads do it, and no Ray is started.

        Yields:
            Index of an item and its answer, in the order in which they are finished.

        Raises:
            MmkdError: A task met one, or a file or connection failed it; the tasks that are done stay done.
        """
        rows = [{"index": index, "item": json.dumps(item)} for index, item in enumerate(items)]
        if not rows or (len(rows) <= few and not self._is_there):
            answers: Iterator[dict[str, Any]] = (_run_one(row, task, arguments) for row in rows)
        elif threads and not self._is_there and not _has_cluster() and has_few_cores():
            answers = _through_threads(rows, task, arguments)
        else:
            self._enter()
            answers = _through_ray(rows, task, arguments)
        for row in answers:
            if row["error"]:
                error = json.loads(row["error"])
                raise from_row({**error, "message": error["message"] + KEPT})
            yield row["index"], json.loads(row["answer"])

    def share(self) -> AbstractContextManager[None]:
        """The session for somebody else, who leaves it open."""
        self._enter()
        return contextlib.nullcontext()

    def _enter(self) -> None:
        if not self._is_there:
            self._entered.enter_context(self._session())
            self._is_there = True


def _has_cluster() -> bool:
    """Whether Ray is there already, or an address says where."""
    ray = sys.modules.get("ray")
    named = os.environ.get("RAY_ADDRESS", "local") or "local"
    return named != "local" or (ray is not None and ray.is_initialized())


def _through_threads(
    rows: list[dict[str, Any]], task: Callable[..., Any], arguments: tuple[Any, ...]
) -> Iterator[dict[str, Any]]:
    over = threading.Event()

    def run(row: dict[str, Any]) -> dict[str, Any]:
        _OF_THREAD.over = over
        return _run_one(row, task, arguments)

    pool = ThreadPoolExecutor(usable_cores(), "mmkd-task")
    try:
        for future in as_completed([pool.submit(run, row) for row in rows]):
            yield future.result()
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)


def _through_ray(
    rows: list[dict[str, Any]], task: Callable[..., Any], arguments: tuple[Any, ...]
) -> Iterator[dict[str, Any]]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    stream = ray.data.from_items(rows, override_num_blocks=len(rows))
    answers = stream.map(_run_one, fn_args=(task, arguments), num_cpus=1)  # type: ignore[arg-type]  # stub lacks fn_args
    yield from answers.iter_rows()


def _run_one(row: dict[str, Any], task: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    answer, failure = None, ""
    try:
        answer = task(json.loads(row["item"]), *arguments)
    except MmkdError as error:
        failure = json.dumps(to_row(error))
    except OSError as error:  # a source that vanished or broke off while it was read
        said = without_secrets(f"{type(error).__name__}: {error}")
        failure = json.dumps(to_row(StorageError(f"Reading or writing failed: {said}.")))
    return {"index": row["index"], "answer": json.dumps(answer), "error": failure}
