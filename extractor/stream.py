"""The CPU half as a stream: Ray Data prepares shards on all machines, a thread hands them over one by one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray

from extractor.prepare import Prepare

_LOOK_SECONDS = 0.2


def prepared_shards(prepare: Prepare, tasks: int) -> Iterator[tuple[int, Any]]:
    """Shard index and reference of its prepared table, for each shard that ``prepare`` has something to do for.

    A block is a shard from reading to here: nothing merges or splits it, and the order is that of ``prepare.todo``, by
    which a reference is known without fetching a pixel. Ray Data holds back when the object store fills.

    Args:
        prepare: What to do.
        tasks: Shards that are prepared at the same time.
    """
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a shard is never split
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    shards = list(prepare.todo)
    source = ray.data.from_items([{"shard": index} for index in shards], override_num_blocks=len(shards))
    call: Any = _call  # Ray's stubs know functions of one argument only
    # Tasks, not actors: a dead worker is retried by Ray, and what is worth keeping (tokenizers, the decoder's process)
    # stays in its process.
    prepared = source.map_batches(
        call,
        fn_args=(prepare,),
        compute=ray.data.TaskPoolStrategy(size=max(1, min(len(shards), tasks))),
        num_cpus=1,
        batch_size=1,
    )
    blocks = (entry.ref for bundle in prepared.iter_internal_ref_bundles() for entry in bundle.blocks)
    yield from zip(shards, blocks, strict=True)


def _call(batch: Any, step: Callable[[Any], pa.Table]) -> pa.Table:
    """Apply a step to a block: Ray Data takes plain functions with arguments for its tasks."""
    return step(batch)


class Feeder:
    """Pulls a stream in a thread of its own, so that the driver can look after everything else while it waits.

    At most one item is waiting at any time; the rest is the stream's own affair.
    """

    def __init__(self, stream: Iterator[tuple[int, Any]]) -> None:
        self._stream = stream
        self._items: queue.Queue[tuple[int, Any]] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._pull, name="mmkd-feeder", daemon=True)
        self._thread.start()

    def next(self) -> tuple[int, Any] | None:
        """The next item if it is there already.

        Raises:
            Exception: What ended the stream before its end.
        """
        try:
            return self._items.get_nowait()
        except queue.Empty:
            pass
        if not self._thread.is_alive() and self._items.empty() and self._error is not None:
            raise self._error
        return None

    @property
    def is_done(self) -> bool:
        """Whether the stream has ended and everything was taken."""
        return not self._thread.is_alive() and self._items.empty() and self._error is None

    def stop(self) -> None:
        """Pull nothing more."""
        self._stopped.set()
        self._thread.join(timeout=_LOOK_SECONDS * 2)

    def _pull(self) -> None:
        try:
            for item in self._stream:
                while not self._stopped.is_set():
                    try:
                        self._items.put(item, timeout=_LOOK_SECONDS)
                        break
                    except queue.Full:
                        continue
                if self._stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the items are taken
            self._error = error
        finally:
            close = getattr(self._stream, "close", None)
            if close is not None:
                close()
