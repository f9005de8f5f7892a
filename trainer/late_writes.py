"""Files of a run that are stored beside the training: a step waits for no storage, a checkpoint for all of it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from common.storage import Storage


class LateWrites:
    """Writes files one after the other in a thread, in the order in which they were given.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, "mmkd-record")
        self._under_way: list[Future[None]] = []

    def write(self, name: str, data: bytes) -> None:
        """Write a file soon, whole or not at all."""
        self._under_way.append(self._thread.submit(self._run.write_bytes, name, data))

    def wait(self) -> None:
        """Wait until all that was given is stored.

        Raises:
            StorageError: Something cannot be.
        """
        under_way, self._under_way = self._under_way, []
        for future in under_way:
            future.result()
