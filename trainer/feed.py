"""Batches for one worker, in the exact global order: through Ray Data, or in this process for tests and notebooks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from common.errors import MmkdError, TrainError, from_row, to_row
from common.gate import Gate, GateKeeper, gate_options
from trainer.data import Batch, TrainData, block_bytes, decode_block, read_blocks, rows_per_block, split_batches
from trainer.order import Segment, worker_lanes

if TYPE_CHECKING:
    import ray

SEGMENTS_PER_DATASET = 2000
BLOCKS_AHEAD = 4
"""What may be there of a worker's blocks beside two for each decode task. Without a limit Ray takes a good part of
the object store for each worker, whatever the others take."""
LEAST_AHEAD = 128 << 20
"""Bytes: small blocks may be more."""
PREFETCHED = 2
"""Blocks that Ray fetches to this machine before they are asked for."""
READERS = 2  # one ahead, so that a new window does not make the decoders wait


def local_batches(
    data: TrainData, first_step: int, total_steps: int, rank: int = 0, workers: int = 1
) -> Iterator[Batch]:
    """The batches of steps ``first_step`` to ``total_steps``, read and decoded here."""
    lanes = worker_lanes(data.order.lanes, rank, workers)
    for segment in data.order.segments(first_step, total_steps):
        for block in read_blocks(data, segment, lanes):
            yield from split_batches(data, decode_block(data, block), data.order.batch_size // workers)


def ray_batches(
    data: ray.ObjectRef,
    first_step: int,
    total_steps: int,
    rank: int,
    workers: int,
    tasks: int,
    cpus_per_task: int = 1,
) -> Iterator[Batch]:
    """The same batches from a streaming Ray Data pipeline: read -> decode in ``tasks`` parallel tasks -> here.

    Args:
        data: Reference to the :class:`TrainData` of the run.
        first_step: Where to begin; everything before it was trained on already.
        total_steps: Where to end.
        rank: This worker.
        workers: How many there are; divides the lanes.
        tasks: Decode tasks in flight.
        cpus_per_task: What each reserves; 0 where workers may take every CPU that there is, and decoding would wait
            for one for ever.
    """
    import ray

    known: TrainData = ray.get(data)
    lanes = worker_lanes(known.order.lanes, rank, workers)
    rows = known.order.batch_size // workers
    ahead = max(LEAST_AHEAD // block_bytes(known, rows), BLOCKS_AHEAD + 2 * tasks)
    steps = rows_per_block(rows) // rows
    segments = known.order.segments(first_step, total_steps)
    # One dataset spans many epochs, since each start costs a second; a bound keeps the list of inputs short.
    while chunk := list(itertools.islice(segments, SEGMENTS_PER_DATASET)):
        for blob in _stream(data, chunk, lanes, tasks, cpus_per_task, ahead, steps):
            yield from split_batches(known, _checked(_unpack(blob)), rows)


def quiet_libraries() -> None:
    """Keep open_clip's and Ray Data's own accounts of every step off the terminal; real warnings still come through."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that progress bars are off
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)


def started(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """The same batches, the first being fetched from now on: data and model then start up at the same time."""
    with_first = ThreadPoolExecutor(1).submit(lambda: list(itertools.islice(batches, 1)))

    def rest() -> Generator[Batch, None, None]:
        yield from with_first.result()
        yield from batches

    return rest()


def _stream(
    data: ray.ObjectRef, segments: list[Segment], lanes: range, tasks: int, cpus: int, ahead: int, steps: int
) -> Iterator[pa.Scalar]:
    """The decoded blocks of some segments, of ``steps`` steps each; never more than ``ahead`` of them at once."""
    import ray

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block is one opaque row, and a limit of one byte makes every row a block of Ray's: no setting of the engine
    # can then merge or split what belongs to a step.
    context.target_max_block_size = 1
    counts = [-(-(segment.stop - segment.first) // steps) for segment in segments]
    firsts = [0, *itertools.accumulate(counts)]
    items = [
        {**dataclasses.asdict(segment), "place": place, "is_last": place + count == firsts[-1]}
        for segment, place, count in zip(segments, firsts, counts, strict=False)
    ]
    with ray.data.DataContext.current(context):
        source = ray.data.from_items(items, override_num_blocks=len(items))
    node = ray.get_runtime_context().get_node_id()
    keeper = GateKeeper(ray.remote(Gate).options(**gate_options(node)).remote())
    keeper.allow(min(ahead, firsts[-1]))
    blocks = source.map_batches(
        cast(Any, _read_task),
        fn_kwargs={"data": data, "lanes": lanes, "gate": keeper.actor},
        batch_size=None,
        num_cpus=0,  # it waits for storage
        compute=ray.data.TaskPoolStrategy(min(READERS, len(items))),  # Ray Data warns of more than there is to do
        # An environment of their own gives them processes of their own: in time each process would have both a window
        # of rows and all that decoding imports.
        runtime_env={"env_vars": {"MMKD_STEP": "read"}},
    )
    decoded = blocks.map_batches(
        cast(Any, _decode_task),
        fn_kwargs={"data": data},
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=cpus,
        compute=ray.data.TaskPoolStrategy(tasks),
    )
    taken, last = 0, firsts[-1] - PREFETCHED
    try:
        if taken >= last:
            keeper.close()
        for batch in decoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCHED):
            for blob in batch["block"]:
                taken += 1
                if taken >= last:  # it holds the others, and gives none before it knows that there are no more
                    keeper.close()
                keeper.allow(min(taken + ahead, firsts[-1]))
                yield blob
        if taken < firsts[-1]:
            raise TrainError(
                f"The stream of batches ended after {taken} of {firsts[-1]} blocks. Run the same command again to go "
                "on from the last checkpoint; if it comes again, it is a mistake in mmkd."
            )
    finally:
        keeper.close()


def _read_task(items: dict[str, Any], data: ray.ObjectRef, lanes: range, gate: Any) -> Iterator[pa.Table]:
    """Blocks of segments, each when its turn has come: what is read and not wanted yet waits here, see common.gate."""
    import ray

    known: TrainData = ray.get(data)
    for i in range(len(items["epoch"])):
        segment = Segment(**{name: int(items[name][i]) for name in Segment.__dataclass_fields__})
        place = int(items["place"][i])
        try:
            for block in read_blocks(known, segment, lanes):
                if not ray.get(gate.passes.remote(place)):
                    return
                place += 1
                yield _pack(block)
        except MmkdError as error:
            yield _pack(_error_block(error))
        if items["is_last"][i]:
            ray.get(gate.passes.remote(place))  # no block has this place: until everything is taken


def _decode_task(table: pa.Table, data: ray.ObjectRef) -> pa.Table:
    import ray

    known: TrainData = ray.get(data)
    return pa.concat_tables([_pack(_decode_or_say(known, _unpack(blob))) for blob in table["block"]])


def _decode_or_say(data: TrainData, block: pa.Table) -> pa.Table:
    """A mistake the user can mend travels as a block: Ray Data would bury it under exceptions of its own."""
    if "error" in block.column_names:
        return block
    try:
        return decode_block(data, block)
    except MmkdError as error:
        return _error_block(error)


def _error_block(error: MmkdError) -> pa.Table:
    return pa.table({"error": [json.dumps(to_row(error))]})


def _checked(block: pa.Table) -> pa.Table:
    """The block, or the error that took its place."""
    if "error" in block.column_names:
        raise from_row(json.loads(block["error"][0].as_py()))
    return block


def _pack(block: pa.Table) -> pa.Table:
    """A table as one row of one column."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema) as writer:
        writer.write_table(block)
    blob = pa.Array.from_buffers(
        pa.large_binary(), 1, [None, pa.array([0, sink.tell()], pa.int64()).buffers()[1], sink.getvalue()]
    )
    return pa.table({"block": blob})


def _unpack(blob: pa.Scalar) -> pa.Table:
    """The inverse, without copying the columns."""
    return pa.ipc.open_stream(blob.as_buffer()).read_all()
