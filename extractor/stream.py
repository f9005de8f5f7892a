"""The CPU half as a stream: Ray Data prepares shards on all machines, a thread hands them over one by one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray

from common.errors import ClusterError, MmkdError
from common.logs import duration
from extractor.prepare import Prepare

STALL_SECONDS = 1800.0
"""A stream that gives nothing for so long, while it is being asked, will never give anything."""
SHARDS_PER_TASK = 2
"""Measured: with one, tasks wait for the taker; with three, nothing is faster."""
_ADVICE = "\nFailed to apply UDF"
"""So begins what Ray Data puts behind an error's own words."""
_LOOK_SECONDS = 0.2
_PAUSE_SECONDS = 10.0
"""Who has not asked for so long had no need; the wait begins anew."""


def prepared_shards(prepare: Prepare, tasks: int, shard_bytes: int) -> Iterator[tuple[int, Any]]:
    """Shard index and reference of its prepared table, for each shard that ``prepare`` has something to do for.

    A block is a shard from reading to here: nothing merges or splits it, and the order is that of ``prepare.todo``, by
    which a reference is known without fetching a pixel. Ray Data holds back when so much waits to be taken that every
    task has one shard ready and one at work; left alone, it would prepare ahead until half the object store is full.

    Args:
        prepare: What to do.
        tasks: Shards that are prepared at the same time.
        shard_bytes: Of the largest prepared shard.

    Raises:
        MmkdError: A shard cannot be prepared.
    """
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # a shard is never split
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=SHARDS_PER_TASK * tasks * max(1, shard_bytes)
    )
    # Ray Data's own clock also runs while nobody takes what is ready: teachers may load or work for longer than that.
    context.execution_no_progress_timeout_s = -1
    context.raise_original_map_exception = True  # Ray Data's own would hide which of ours it is
    shards = list(prepare.todo)
    with ray.data.DataContext.current(context):
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
        # An environment of their own gives them processes of their own. Otherwise every process that ever wrote a file
        # would in time have tokenizers and a decoder, too.
        runtime_env={"env_vars": {"MMKD_STEP": "prepare"}},
    )
    blocks = (entry.ref for bundle in prepared.iter_internal_ref_bundles() for entry in bundle.blocks)
    try:
        yield from zip(shards, blocks, strict=True)
    except MmkdError as error:
        cause = getattr(error, "cause", error)
        raise type(cause)(str(cause).partition(_ADVICE)[0]) from error


def _call(batch: Any, step: Callable[[Any], pa.Table]) -> pa.Table:
    """Apply a step to a block: Ray Data takes plain functions with arguments for its tasks."""
    return step(batch)


class Feeder:
    """Pulls a stream in a thread of its own, so that the driver can look after everything else while it waits.

    At most one item is waiting at any time; the rest is the stream's own affair.

    Args:
        stream: What to pull.
        stall_seconds: How long the stream may give nothing while it is being asked.
    """

    def __init__(self, stream: Iterator[tuple[int, Any]], stall_seconds: float = STALL_SECONDS) -> None:
        self._stream = stream
        self._stall_seconds = stall_seconds
        self._waiting_since = self._asked = -_PAUSE_SECONDS
        self._items: queue.Queue[tuple[int, Any]] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._pull, name="mmkd-feeder", daemon=True)
        self._thread.start()

    def next(self) -> tuple[int, Any] | None:
        """The next item if it is there already.

        Raises:
            ClusterError: The stream has given nothing for too long, although it was asked all the time.
            Exception: What ended the stream before its end.
        """
        now = time.monotonic()
        if now - self._asked >= _PAUSE_SECONDS:
            self._waiting_since = now
        self._asked = now
        try:
            item = self._items.get_nowait()
        except queue.Empty:
            pass
        else:
            self._waiting_since = now
            return item
        if not self._thread.is_alive():
            if self._items.empty() and self._error is not None:
                raise self._error
        elif now - self._waiting_since > self._stall_seconds:
            raise ClusterError(
                f"No shard was prepared within {duration(self._stall_seconds)}. Look with `ray status` whether CPUs "
                "are free for it, and in Ray's logs whether its processes are killed (memory: smaller shards, or fewer "
                "prepare_tasks); then run the same command again to go on."
            )
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
