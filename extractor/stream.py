"""The CPU half as a stream: Ray Data prepares shards on all machines, a thread hands them over one by one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray

from common.errors import ClusterError, MmkdError, from_row, to_row
from common.gate import Gate, GateKeeper, gate_options
from common.logs import duration
from extractor.prepare import Prepare

STALL_SECONDS = 1800.0
"""A stream that gives nothing for so long, while it is being asked, will never give anything."""
NO_SHARD = -1
_ADVICE = "\nFailed to apply UDF"
"""So begins what Ray Data puts behind an error's own words."""
LAST_PULL_SECONDS = 10.0
"""So long may a stream take to end. It is a second on a busy machine."""
_LOOK_SECONDS = 0.2
_PAUSE_SECONDS = 10.0
"""Who has not asked for so long had no need; the wait begins anew."""


class PreparedShards:
    """Shard index and reference of its prepared table, for each shard that ``prepare`` has something to do for.

    A block is a shard from reading to here: nothing merges or splits it, and the order is that of ``prepare.todo``, by
    which a reference is known without fetching a pixel. A task waits at a gate before it begins, so that what is ready
    is always taken at once: Ray Data's own ways of holding back cost a core (see :mod:`common.gate`).

    Args:
        prepare: What to do.
        tasks: Shards that are prepared at the same time.

    Raises:
        MmkdError: In the iteration; a shard cannot be prepared.
    """

    def __init__(self, prepare: Prepare, tasks: int) -> None:
        self._prepare = prepare
        self._shards = list(prepare.todo)
        self._tasks = max(1, min(len(self._shards), tasks))
        node = ray.get_runtime_context().get_node_id()
        self._keeper = GateKeeper(ray.remote(Gate).options(**gate_options(node)).remote())

    def allow(self, shards: int) -> None:
        """Let so many of the shards be prepared, counted from the first; a lower number than before changes nothing."""
        self._keeper.allow(min(shards, len(self._shards)))

    def close(self) -> None:
        """Begin nothing more; an iteration ends soon."""
        self._keeper.close()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Give each shard as soon as it and those before it are ready."""
        blocks = (entry.ref for bundle in self._dataset().iter_internal_ref_bundles() for entry in bundle.blocks)
        try:
            for place, shard in enumerate(self._shards, start=1):
                block = next(blocks)
                if place == len(self._shards):
                    self.close()
                yield shard, block
        except MmkdError as error:
            row = to_row(error)
            raise from_row({**row, "message": row["message"].partition(_ADVICE)[0]}) from error
        finally:
            self.close()

    def _dataset(self) -> Any:
        context = ray.data.DataContext.get_current().copy()
        context.target_max_block_size = None  # a shard is never split
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        # Ray Data's own clock also runs while nobody takes what is ready: teachers may load or work for longer.
        context.execution_no_progress_timeout_s = -1
        context.raise_original_map_exception = True  # Ray Data's own would hide which of ours it is
        # The last one has nothing to do but to wait until all others are taken.
        items = [{"shard": shard, "place": place} for place, shard in enumerate([*self._shards, NO_SHARD])]
        with ray.data.DataContext.current(context):
            source = ray.data.from_items(items, override_num_blocks=len(items))
        call: Any = _prepare_in_turn  # Ray's stubs know functions of one argument only
        # Tasks, not actors: a dead worker is retried by Ray, and what is worth keeping (tokenizers, the decoder's
        # process) stays in its process.
        return source.map_batches(
            call,
            fn_args=(self._prepare, self._keeper.actor),
            compute=ray.data.TaskPoolStrategy(size=self._tasks),
            num_cpus=1,
            batch_size=1,
            # An environment of their own gives them processes of their own. Otherwise every process that ever wrote a
            # file would in time have tokenizers and a decoder, too.
            runtime_env={"env_vars": {"MMKD_STEP": "prepare"}},
        )


def _prepare_in_turn(batch: Any, prepare: Callable[[Any], pa.Table], gate: Any) -> pa.Table:
    """Prepare the shard of a batch when its turn has come; an empty table when it never will."""
    if not ray.get(gate.passes.remote(int(batch["place"][0]))):
        return pa.table({"shard": pa.array([], pa.int32())})
    return prepare(batch)


class Feeder:
    """Pulls a stream in a thread of its own, so that the driver can look after everything else while it waits.

    At most one item is waiting at any time; the rest is the stream's own affair.

    Args:
        stream: What to pull.
        stall_seconds: How long the stream may give nothing while it is being asked.
        on_stop: Called when nothing more is wanted, so that a pull that waits comes to an end.
    """

    def __init__(
        self,
        stream: Iterable[tuple[int, Any]],
        stall_seconds: float = STALL_SECONDS,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._stream = iter(stream)
        self._on_stop = on_stop
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
        """Pull nothing more; the stream has ended when this returns."""
        self._stopped.set()
        self._on_stop()
        # A thread that still asks Ray for something while Ray shuts down would end this process.
        self._thread.join(timeout=LAST_PULL_SECONDS)

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
