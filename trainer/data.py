"""From aligned shards to training batches, as plain callables: read side by side, draw, decode, augment, tokenise.

A *block* is a few consecutive steps of one worker as an Arrow table, rows in their final order. Reading joins the pairs
with every teacher's vectors; decoding, which costs the time, then needs nothing but the block.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from common.errors import LakeError
from common.images import UndecodableImageError, decode_rgb, fit
from common.lake import Lake, check_same_samples, shard_name
from common.parquet_reading import single_chunk
from common.seeding import rng
from common.views import cut_view, view_boxes
from trainer.architecture import Architecture, load_tokenizer
from trainer.order import Order, Segment, split_places
from trainer.transforms import training_view

# B = rows of a worker's batch, H x W = pixels, L = context length, T = a teacher's width.

PAIR_COLUMNS = ["sample_id", "image", "captions"]
FEATURE_COLUMNS = ["sample_id", "image_embedding", "text_embedding", "extra_text_embeddings"]
LENGTH_COLUMNS = ["image_norm", "text_norm"]
VIEW_COLUMNS = ["view_embeddings"]
BLOCK_ROWS = 256
VALIDATION_BATCH = 256


class StoredViews(NamedTuple):
    """The crops that extraction stored vectors of, as :func:`common.views.view_boxes` makes them."""

    crops: int
    least_area: float
    seed: int


@dataclass(frozen=True)
class TrainData:
    """Everything that determines the batches of a run; small, so that it travels to every task."""

    lake_uri: str
    order: Order
    architecture: Architecture
    crop_scale: float
    teachers: tuple[str, ...] = ()
    selection: str | None = None
    """Fingerprint of the selection; with teachers only."""
    stored_lengths: bool = False
    """Give teachers' vectors the lengths they had before they were stored; further captions' were not kept."""
    views: StoredViews | None = None
    """Show the student one of these crops, drawn for each epoch, and the teachers' vectors of it."""


@dataclass(frozen=True)
class TeacherRows:
    """One teacher's unit vectors of a batch, of the picture and of the drawn caption, and where it may speak."""

    image_BT: np.ndarray
    text_BT: np.ndarray
    image_mask_B: np.ndarray
    text_mask_B: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One worker's share of a step."""

    place_B: np.ndarray
    """Where each sample lies, see ``order.split_places``."""
    sample_ids: list[str]
    pixels_BHWC: np.ndarray
    tokens_BL: np.ndarray
    teachers: dict[str, TeacherRows]
    draws_BK: np.ndarray
    """Float32 in [0, 1): one number to draw a teacher by and one for each teacher; of no columns without teachers."""


def read_blocks(data: TrainData, segment: Segment, lanes: range) -> Iterator[pa.Table]:
    """Read a segment's shards once and give its rows in their final order, as blocks of whole steps.

    Raises:
        LakeError: A teacher's shard does not hold the same samples as its pairs shard.
    """
    places_SB = data.order.segment_places(segment, lanes)
    steps = rows_per_block(places_SB.shape[1]) // places_SB.shape[1]
    lake = Lake(data.lake_uri)
    wanted = (int(shard) for shard in np.unique(split_places(places_SB)[0]))
    shards = {shard: _draw_rows(data, segment.epoch, read_shard(data, lake, shard)) for shard in wanted}
    for first in range(0, len(places_SB), steps):
        yield _block(data, segment.epoch, places_SB[first : first + steps].reshape(-1), shards)


def rows_per_block(rows: int) -> int:
    """Rows of a full block for a worker that gives ``rows`` to each step: whole steps."""
    return max(1, BLOCK_ROWS // rows) * rows


def block_bytes(data: TrainData, rows: int) -> int:
    """About how many bytes a block takes at most, decoded or not, for a worker that gives ``rows`` to each step.

    Encoded pictures are taken to be as large as those of the largest pairs file; of the rest the widths are known.
    """
    lake = Lake(data.lake_uri)
    largest = max((mark.size for mark in lake.pair_marks().values()), default=0)
    producers = [lake.read_teacher(teacher)["fingerprint"] for teacher in data.teachers]
    vectors = sum(4 * (made.get(f"{side}_dim") or 0) for made in producers for side in ("image", "text"))
    pixels = 3 * data.architecture.geometry.size**2
    return rows_per_block(rows) * (largest // int(lake.info()["shard_rows"]) + pixels + vectors)


def validation_batches(data: TrainData, places: np.ndarray) -> Iterator[Batch]:
    """Clean views with main captions, in batches of equal size whatever the number of workers; none without places."""
    if not len(places):
        return
    rows = min(len(places), VALIDATION_BATCH)
    clean = dataclasses.replace(data, teachers=(), selection=None, crop_scale=1.0, views=None)
    lake = Lake(data.lake_uri)
    for first in range(0, len(places) - rows + 1, rows):
        chosen = places[first : first + rows]
        wanted = (int(shard) for shard in np.unique(split_places(chosen)[0]))
        shards = {shard: _draw_rows(clean, None, read_shard(clean, lake, shard)) for shard in wanted}
        yield from split_batches(clean, decode_block(clean, _block(clean, None, chosen, shards)), rows)


def read_shard(data: TrainData, lake: Lake, shard: int) -> pa.Table:
    """A pairs shard with every teacher's columns beside it, named ``<teacher>/<column>``.

    From an object store all files are read side by side: in turn, those of nine teachers are 57 round trips.

    Raises:
        LakeError: A teacher has no embeddings or no selection of the shard, or they are of other samples.
    """
    with ThreadPoolExecutor(1 if lake.storage.is_local else 1 + 2 * len(data.teachers)) as pool:
        pairs = pool.submit(lake.read_pairs, shard, PAIR_COLUMNS)
        beside = [
            (
                teacher,
                pool.submit(_read_features, data, lake, teacher, shard),
                pool.submit(_read_selection, lake, str(data.selection), teacher, shard),
            )
            for teacher in data.teachers
        ]
        joined = known = pairs.result().combine_chunks()
        for teacher, found, selected in beside:
            features = found.result()
            check_same_samples(features, known, f"{data.lake_uri}/{lake.features_folder(teacher)}/{shard_name(shard)}")
            for column in features.column_names[1:]:
                joined = joined.append_column(f"{teacher}/{column}", single_chunk(features[column]))
            name, selection = selected.result()
            check_same_samples(selection, known, f"{lake.uri}/{name}")
            joined = joined.append_column(f"{teacher}/admitted", single_chunk(selection["admitted"]))
        return joined


def _read_features(data: TrainData, lake: Lake, teacher: str, shard: int) -> pa.Table:
    columns = [*FEATURE_COLUMNS, *(LENGTH_COLUMNS if data.stored_lengths else ())]
    if data.views and lake.read_teacher(teacher)["fingerprint"].get("views"):
        columns += VIEW_COLUMNS
    try:
        return lake.read_features(teacher, shard, columns).select(columns)
    except FileNotFoundError as error:
        raise LakeError(
            f"{data.lake_uri} has no embeddings of teacher {teacher!r} for shard {shard}. Run `mmkd extract` "
            "again: it computes only what is missing."
        ) from error


def read_selection(lake: Lake, fingerprint: str, teacher: str, shard: int, pairs: pa.Table) -> pa.Table:
    """Which rows of a shard a teacher may speak for; the ids are compared with the pairs'.

    Raises:
        LakeError: The selection does not cover this shard, or was made for other samples.
    """
    name, table = _read_selection(lake, fingerprint, teacher, shard)
    check_same_samples(table, pairs, f"{lake.uri}/{name}")
    return table


def _read_selection(lake: Lake, fingerprint: str, teacher: str, shard: int) -> tuple[str, pa.Table]:
    name = f"selection/{fingerprint}/teacher={teacher}/{shard_name(shard)}"
    try:
        return name, lake.storage.read_table(name, ["sample_id", "admitted"])
    except FileNotFoundError as error:
        raise LakeError(
            f"{lake.uri}/{name} is missing: pairs were added after the selection was made. Run `mmkd select` again."
        ) from error


class _ShardRows(NamedTuple):
    """A shard as an epoch sees it: R rows, whichever of them are wanted."""

    pairs: pa.Table
    """With ``PAIR_COLUMNS``."""
    drawn_R: np.ndarray
    """Which of a row's captions."""
    view_R: np.ndarray | None
    """Which of a row's stored crops; None for the whole picture."""
    teachers: dict[str, dict[str, np.ndarray]]
    """Teacher -> what :func:`teacher_columns` gives."""


def _draw_rows(data: TrainData, epoch: int | None, table: pa.Table) -> _ShardRows:
    """Draw captions and crops for all rows of :func:`read_shard`'s table; main captions without an epoch."""
    ids, captions, seed = table["sample_id"].to_pylist(), table["captions"].to_pylist(), data.order.seed
    drawn_R = np.zeros(len(ids), dtype=np.int64)
    if epoch is not None:
        drawn_R[:] = [draw_caption(seed, epoch, *row) for row in zip(ids, captions, strict=True)]
    view_R = None
    if data.views is not None:
        view_R = np.array([draw_view(seed, epoch, sample, data.views.crops) for sample in ids])
    teachers = {name: teacher_columns(table, name, drawn_R, view_R) for name in data.teachers}
    return _ShardRows(table.select(PAIR_COLUMNS), drawn_R, view_R, teachers)


def _block(data: TrainData, epoch: int | None, places: np.ndarray, shards: dict[int, _ShardRows]) -> pa.Table:
    shard_of, row_of = split_places(places)
    # Grouped by shard first: taking from one shard at a time never concatenates gigabytes of encoded pictures.
    parts = [(shards[int(shard)], np.flatnonzero(shard_of == shard)) for shard in np.unique(shard_of)]
    wheres = [(where, row_of[where]) for _, where in parts]
    pairs = pa.concat_tables([rows.pairs.take(row_of[where]) for rows, where in parts])
    pairs = pairs.take(np.argsort(np.concatenate([where for where, _ in wheres]))).combine_chunks()
    ids, captions = pairs["sample_id"].to_pylist(), pairs["captions"].to_pylist()
    drawn = _gather([rows.drawn_R for rows, _ in parts], wheres)
    columns = {
        "place": pa.array(places),
        "epoch": pa.array([epoch] * len(places), pa.int32()),
        "sample_id": pairs["sample_id"],
        "image": pairs["image"],
        "caption": pa.array([texts[which] for texts, which in zip(captions, drawn, strict=True)], pa.string()),
    }
    if data.views is not None:
        view_B = _gather([rows.view_R for rows, _ in parts if rows.view_R is not None], wheres)
        boxes = [view_boxes(sample, *data.views)[which] for sample, which in zip(ids, view_B, strict=True)]
        columns["box"] = _to_arrow(np.array(boxes, np.float32))
    for teacher in data.teachers:
        for name in parts[0][0].teachers[teacher]:
            columns[f"{teacher}/{name}"] = _to_arrow(
                _gather([rows.teachers[teacher][name] for rows, _ in parts], wheres)
            )
    if data.teachers:
        columns["draws"] = _to_arrow(draw_numbers(data.order.seed, epoch, ids, 1 + len(data.teachers)))
    return pa.table(columns)


def _gather(arrays: list[np.ndarray], wheres: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Rows of several shards in their final order: ``wheres[i]`` says where they go and which of ``arrays[i]``."""
    shape = (sum(len(where) for where, _ in wheres), *arrays[0].shape[1:])
    # Arrow's memory, which is warm; numpy's would come fresh from the kernel for each block.
    memory = pa.allocate_buffer(math.prod(shape) * arrays[0].itemsize)
    whole = np.frombuffer(memory, arrays[0].dtype).reshape(shape)
    for array, (where, rows) in zip(arrays, wheres, strict=True):
        whole[where] = array[rows]
    return whole


def draw_numbers(seed: int, epoch: int | None, sample_ids: list[str], count: int) -> np.ndarray:
    """Numbers in [0, 1) by which a sample's teachers are drawn in an epoch: float32 [B, count]."""
    # By a hash: to make a generator of numbers for each sample takes as long as to read half of its vectors.
    drawn = b"".join(
        hashlib.shake_128(f"{seed}/teachers/{epoch}/{sample}".encode()).digest(4 * count) for sample in sample_ids
    )
    bits = np.frombuffer(drawn, "<u4").reshape(len(sample_ids), count) >> 8  # as many as a float32 holds exactly
    return bits.astype(np.float32) / np.float32(1 << 24)


def draw_caption(seed: int, epoch: int, sample_id: str, captions: list[str]) -> int:
    """Which of a sample's captions is used in an epoch; 0 for a row without any, which no batch takes."""
    return 0 if len(captions) <= 1 else int(rng(seed, "caption", epoch, sample_id).integers(len(captions)))


def draw_view(seed: int, epoch: int | None, sample_id: str, count: int) -> int:
    """Which of a sample's stored crops is used in an epoch."""
    return int(rng(seed, "view", epoch, sample_id).integers(count))


def teacher_columns(
    table: pa.Table, teacher: str, drawn: np.ndarray, view_B: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """One teacher's dense vectors for the picture and the drawn caption, zero where masked.

    Args:
        table: From :func:`read_shard`.
        teacher: Whose.
        drawn: For each row, which of its captions.
        view_B: For each row, which of its stored crops; None for the whole picture.
    """
    if view_B is not None and f"{teacher}/view_embeddings" in table.column_names:
        image_BT, has_image_B = _views(single_chunk(table[f"{teacher}/view_embeddings"]), view_B)
    else:
        image_BT, has_image_B = _vectors(single_chunk(table[f"{teacher}/image_embedding"]))
    text_BT, has_text_B = _vectors(single_chunk(table[f"{teacher}/text_embedding"]))
    extra = single_chunk(table[f"{teacher}/extra_text_embeddings"])
    others = np.flatnonzero(drawn > 0)
    if len(others):
        text_BT = text_BT.copy()
        offsets, counts = extra.offsets.to_numpy(), extra.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        present = counts[others] >= drawn[others]
        flat_XT, has_flat_X = _vectors(extra.values)
        has_text_B[others], text_BT[others] = False, 0
        filled = others[present]
        index = offsets[filled] + drawn[filled] - 1
        has_text_B[filled], text_BT[filled] = has_flat_X[index], flat_XT[index]
    if f"{teacher}/image_norm" in table.column_names:
        image_BT = image_BT * _lengths(table[f"{teacher}/image_norm"])
        text_BT = text_BT * np.where(drawn[:, None] > 0, np.float32(1), _lengths(table[f"{teacher}/text_norm"]))
    admitted_B = table[f"{teacher}/admitted"].to_numpy()
    return {
        "image": image_BT,
        "text": text_BT,
        "image_mask": admitted_B & has_image_B,
        "text_mask": admitted_B & has_text_B,
    }


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return column.fill_null(0.0).to_numpy()[:, None]


def _views(lists: pa.Array, view_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The vector of each row's crop; a row without it, or whose crop the teacher could not embed, is zero."""
    flat_XT, has_flat_X = _vectors(lists.values)
    offsets, counts = lists.offsets.to_numpy(), lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    there_B = counts > view_B
    index_B = np.where(there_B, offsets[:-1] + view_B, 0)
    if not len(flat_XT):
        return np.zeros((len(view_B), flat_XT.shape[1]), np.float32), np.zeros(len(view_B), bool)
    there_B &= has_flat_X[index_B]
    return np.where(there_B[:, None], flat_XT[index_B], 0), there_B


def _vectors(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """A fixed_size_list<float> column -> float32 [B, T], zero where null, and bool [B] where not null.

    The former may be the column's own memory.
    """
    present = array.is_valid().to_numpy(zero_copy_only=False).copy()
    width = array.type.list_size
    # `values` is the whole child array, nulls' slots included; a slice has to be cut out by hand.
    flat = array.values.slice(array.offset * width, len(array) * width)
    # Its numbers are never null (common.schemas), so the buffer is the vectors; beneath a null list lies anything.
    dense = np.frombuffer(flat.buffers()[1], np.float32, len(flat), 4 * flat.offset).reshape(len(array), width)
    if dense[~present].any():
        dense = np.where(present[:, None], dense, np.float32(0))
    return dense, present


def decode_block(data: TrainData, block: pa.Table) -> pa.Table:
    """Turn encoded pictures into augmented pixels and captions into token ids; the other columns stay.

    Raises:
        LakeError: A picture that ingest could decode cannot be decoded now; names the samples.
    """
    geometry, seed = data.architecture.geometry, data.order.seed
    ids, epochs = block["sample_id"].to_pylist(), block["epoch"].to_pylist()
    pixels_BHWC = np.empty((block.num_rows, geometry.size, geometry.size, 3), dtype=np.uint8)
    boxes = _to_numpy(block, "box") if data.views is not None else None
    bad = []
    for i, encoded in enumerate(block["image"]):
        try:
            picture = decode_rgb(encoded.as_py())
        except UndecodableImageError as error:
            bad.append(f"{ids[i]} ({error})")
            continue
        if boxes is None:
            pixels_BHWC[i] = training_view(picture, geometry, data.crop_scale, rng(seed, "crop", epochs[i], ids[i]))
        else:
            pixels_BHWC[i] = fit(cut_view(picture, boxes[i]), geometry)
    if bad:
        raise LakeError(
            f"{len(bad)} pictures of {data.lake_uri} cannot be decoded, though ingest could: {'; '.join(bad[:5])}. "
            "The pairs were damaged or written by another version; ingest the source again into a fresh lake."
        )
    tokens_BL = _tokenizer(data.architecture)(block["caption"].to_pylist())
    block = block.drop_columns(["image", "caption", *(["box"] if boxes is not None else [])])
    return block.append_column("pixels", _to_arrow(pixels_BHWC)).append_column("tokens", _to_arrow(tokens_BL))


_TOKENIZERS: dict[str, Callable[[list[str]], np.ndarray]] = {}


def _tokenizer(architecture: Architecture) -> Callable[[list[str]], np.ndarray]:
    """Loaded once per process: it costs seconds."""
    key = str(architecture.local_folder())
    if key not in _TOKENIZERS:
        _TOKENIZERS[key] = load_tokenizer(architecture)
    return _TOKENIZERS[key]


def split_batches(data: TrainData, block: pa.Table, rows: int) -> Iterator[Batch]:
    """Cut a decoded block into batches of ``rows``, as views of its memory."""
    size = data.architecture.geometry.size
    dense = functools.partial(_to_numpy, block)
    pixels, tokens, ids = dense("pixels", (size, size, 3)), dense("tokens"), block["sample_id"].to_pylist()
    teachers = {
        name: TeacherRows(*(dense(f"{name}/{part}") for part in ("image", "text", "image_mask", "text_mask")))
        for name in data.teachers
    }
    draws = dense("draws") if data.teachers else np.empty((block.num_rows, 0), np.float32)
    for first in range(0, block.num_rows, rows):
        part = slice(first, first + rows)
        yield Batch(
            place_B=block["place"].to_numpy()[part],
            sample_ids=ids[part],
            pixels_BHWC=pixels[part],
            tokens_BL=tokens[part],
            teachers={
                name: TeacherRows(t.image_BT[part], t.text_BT[part], t.image_mask_B[part], t.text_mask_B[part])
                for name, t in teachers.items()
            },
            draws_BK=draws[part],
        )


def digest_rows(batch: Batch) -> np.ndarray:
    """For each row a number that depends on its pixels, token ids, draws and teachers' vectors: int64 [B].

    It does not depend on how many rows a worker has, so runs on any number of workers can be compared.
    """
    parts = [batch.pixels_BHWC, batch.tokens_BL, batch.draws_BK]
    for rows in batch.teachers.values():
        parts += [rows.image_BT, rows.text_BT, rows.image_mask_B, rows.text_mask_B]
    found = np.zeros(len(batch.place_B), np.int64)
    for i in range(len(found)):
        for part in parts:
            found[i] = zlib.crc32(np.ascontiguousarray(part[i]).data, int(found[i]))
    return found


def _to_arrow(values: np.ndarray) -> pa.Array:
    """An array [B] or [B, ...] as a column, without a copy; trailing axes become one fixed-size list."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), int(np.prod(values.shape[1:])))


def _to_numpy(table: pa.Table, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The inverse of :func:`_to_arrow`."""
    column = single_chunk(table[name])
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy(zero_copy_only=False)
    return column.flatten().to_numpy().reshape(table.num_rows, *(shape or (column.type.list_size,)))
