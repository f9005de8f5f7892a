"""Who stores files: small tasks beside the embeddings, or threads of the driver on a small machine that is alone."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import pyarrow as pa
import ray

from common.errors import MmkdError, from_row, to_row
from common.processes import has_few_cores
from extractor.writing import WriteOrder, write_file

THREADS = 2
"""One encodes while another waits for storage."""
TASK_CPUS = 0.25
"""A writer mostly waits for storage."""
LAST_WRITE_SECONDS = 10.0

Handle = Any
"""A file under way: a reference of Ray's, or a future."""


class Writers:
    """Stores files in Ray tasks, so that no vector passes through the driver; or in threads of the driver.

    A task's process takes a second and a half of a core to start, and 100 MiB: on a small machine that is more than the
    writing.

    Args:
        in_driver: Whether threads do it; by default where the driver's machine is the only one, and has few cores.
    """

    def __init__(self, in_driver: bool | None = None) -> None:
        if in_driver is None:
            in_driver = has_few_cores() and len(ray.nodes()) == 1
        self._threads = ThreadPoolExecutor(THREADS, "mmkd-writer") if in_driver else None
        self._task: Any = ray.remote(write_file).options(num_cpus=TASK_CPUS, max_retries=5)

    def begin(
        self, order: WriteOrder, teacher: str, shard: int, features: Any, rejects: list[tuple[str, str, str]]
    ) -> Handle:
        """Store the table behind a reference; see :func:`extractor.writing.write_file`."""
        if self._threads is None:
            return self._task.remote(order, teacher, shard, features, rejects)
        return self._threads.submit(_fetch_and_write, order, teacher, shard, features, rejects)

    def result(self, handle: Handle) -> tuple[int, float]:
        """The file's size in bytes and the seconds it took.

        Raises:
            MmkdError: The storage is gone, or the lake is another run's.
            RayError: The embeddings were lost with their machine, or a task with its process.
        """
        try:
            found: Any = handle.result() if isinstance(handle, Future) else ray.get(handle)
        except MmkdError as error:
            raise from_row(to_row(error)) from error  # in its own words: a task's comes as Ray's traceback
        return found[0], found[1]

    def close(self, handles: Iterable[Handle]) -> None:
        """Nothing more is begun; files under way are waited for, for a moment."""
        futures = [handle for handle in handles if isinstance(handle, Future)]
        references = [handle for handle in handles if not isinstance(handle, Future)]
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            wait_for(futures, LAST_WRITE_SECONDS)
        for reference in references:
            ray.cancel(reference)
        if references:
            ray.wait(references, num_returns=len(references), timeout=LAST_WRITE_SECONDS, fetch_local=False)


def wait_for_any(references: list[Any], handles: Iterable[Handle], timeout: float) -> list[Any]:
    """What of both is there, after at most so many seconds."""
    futures = [handle for handle in handles if isinstance(handle, Future)]
    references = references + [handle for handle in handles if not isinstance(handle, Future)]
    if not references:
        return list(wait_for(futures, timeout, FIRST_COMPLETED).done)
    if any(future.done() for future in futures):
        timeout = 0
    ready, _ = ray.wait(references, timeout=timeout, fetch_local=False)
    if ready:
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
    return [*ready, *(future for future in futures if future.done())]


def _fetch_and_write(
    order: WriteOrder, teacher: str, shard: int, features: Any, rejects: list[tuple[str, str, str]]
) -> tuple[int, float]:
    table: pa.Table = ray.get(features)
    return write_file(order, teacher, shard, table, rejects)
