"""CPU half of extraction: read a shard of pairs, decode each image once, tokenise once per distinct tokenizer.

The result is one Arrow table per shard, row-aligned with the pairs, that every teacher reads without copying.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from common.lake import Lake
from common.models.dual_encoder import Tokenize
from common.models.load import load_tokenizer
from common.models.spec import Geometry, ModelDescription, ModelSpec
from common.parquet_reading import single_chunk
from common.views import view_boxes
from extractor.config import DecodeLimits, DecodeMode, StoredPrecision, ViewsConfig
from extractor.decoding import PictureDecoder

SCALED_MARGIN = 2
"""A JPEG decoded at a fraction of its size keeps so many times the pixels, along a side, that any teacher needs."""
KILLS = b"mmkd.decoder_kills"
"""Likewise, with the decoding processes that were lost."""
VIEW_BOXES = "view_boxes"
SECONDS = b"mmkd.prepare_seconds"
"""Key of the prepared table's metadata with the time it took."""


@dataclass(frozen=True)
class TeacherInput:
    """Which of the prepared columns a teacher reads."""

    spec: ModelSpec
    description: ModelDescription
    partition: str = ""
    """Name of its partition, if it is not the model's own."""
    stored_precision: StoredPrecision = "float16"
    """What its vectors are rounded to."""

    @property
    def name(self) -> str:
        """Name of its partition in the lake."""
        return self.partition or self.spec.name

    @property
    def pixels(self) -> str:
        """Column with the teacher's pictures: uint8 [size * size * channels] per row."""
        return pixel_column(self.description.geometry)

    @property
    def view_pixels(self) -> str:
        """Column with the teacher's augmented views: list of uint8 [size * size * channels] per row."""
        return f"view_{self.pixels}"

    @property
    def tokens(self) -> str:
        """Column with the main caption's token ids: int32 [context length] per row, null where there is no caption."""
        return f"tokens:{self.description.tokenizer_key}"

    @property
    def extra_tokens(self) -> str:
        """Column with the further captions' token ids: list of int32 [context length] per row."""
        return f"extra_{self.tokens}"


def pixel_column(geometry: Geometry) -> str:
    """Name of the column with the pictures of a geometry."""
    return f"pixels:{geometry.key}"


def restrict(description: ModelDescription, towers: Literal["both", "image", "text"]) -> ModelDescription:
    """A model of which only one tower is used is described, fingerprinted and stored like one that has no other."""
    if towers == "image":
        return description.model_copy(update={"text_dim": None, "tokenizer_sha256": None, "context_length": None})
    return description.model_copy(update={"image_dim": None}) if towers == "text" else description


def restrict_like(like: ModelDescription, description: ModelDescription) -> ModelDescription:
    """A description without the towers that ``like`` was stripped of."""
    if like.text_dim is None:
        description = restrict(description, "image")
    return restrict(description, "text") if like.image_dim is None else description


_TOKENIZERS: dict[str, Tokenize] = {}
"""Loaded once per worker process, by the key under which teachers share token ids."""
_DECODERS: dict[DecodeLimits, PictureDecoder] = {}
"""Started once per worker process: its child outlives the shard."""


def _kills() -> int:
    return sum(decoder.kills for decoder in _DECODERS.values())


class Prepare:
    """Turn shard numbers into prepared tables; small, so that it travels to every task.

    Args:
        lake_uri: The lake.
        inputs: Every teacher of the run, by name.
        todo: Shard -> names of the teachers that still lack it.
        views: Augmented views beside the clean picture.
        decode: ``fast`` resizes by torch, ``scaled`` also decodes large JPEGs at a fraction of their size.
        limits: What one picture may cost.
    """

    def __init__(
        self,
        lake_uri: str,
        inputs: dict[str, TeacherInput],
        todo: dict[int, tuple[str, ...]],
        views: ViewsConfig | None = None,
        decode: DecodeMode = "exact",
        limits: DecodeLimits | None = None,
    ) -> None:
        self.lake = Lake(lake_uri)
        self.inputs = inputs
        self.todo = todo
        self.views = views or ViewsConfig()
        self.decode = decode
        self.limits = limits or DecodeLimits()

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """Prepare the one shard named in the batch."""
        (index,) = batch["shard"]
        return self.prepare(int(index))

    def prepare(self, index: int) -> pa.Table:
        """Prepared table of one shard: shard, sample_id, image_error, then pixel, view and token columns."""
        started, kills_before = time.monotonic(), _kills()
        needed = [self.inputs[name] for name in self.todo[index]]
        with_images = [item for item in needed if item.description.image_dim]
        pairs = self.lake.read_pairs(index, ["sample_id", *(["image"] if with_images else []), "captions"])
        columns: dict[str, pa.Array] = {
            "shard": pa.array(np.full(pairs.num_rows, index, np.int32)),
            "sample_id": pairs["sample_id"].combine_chunks(),
        }
        if with_images:
            columns.update(self._decode(pairs, {item.pixels: item.description.geometry for item in with_images}))
        else:
            columns["image_error"] = pa.nulls(pairs.num_rows, pa.string())
        captions = pairs["captions"].to_pylist()
        for item in needed:
            if item.description.text_dim and item.tokens not in columns:
                columns.update(self._tokenise(item, captions))
        kills = str(_kills() - kills_before)
        seconds = f"{time.monotonic() - started:.3f}"
        return pa.table(columns).replace_schema_metadata({SECONDS: seconds, KILLS: kills})

    def _decode(self, pairs: pa.Table, geometries: dict[str, Geometry]) -> dict[str, pa.Array]:
        boxes = None
        if self.views.count:
            settings = (self.views.count, self.views.least_area, self.views.seed)
            ids = pairs["sample_id"].to_pylist()
            boxes = np.stack([view_boxes(sample_id, *settings) for sample_id in ids])
        if self.limits not in _DECODERS:
            _DECODERS[self.limits] = PictureDecoder(self.limits)
        decoder = _DECODERS[self.limits]
        distinct = list(geometries.values())
        least_side = scaled_side(distinct, self.views) if self.decode == "scaled" else None
        return prepare_images(decoder, pairs["image"], distinct, boxes, least_side, self.decode != "exact")

    def _tokenise(self, item: TeacherInput, captions: list[list[str]]) -> dict[str, pa.Array]:
        if item.tokens not in _TOKENIZERS:
            _TOKENIZERS[item.tokens] = load_tokenizer(item.spec)
        # A row without captions gets the ids of an empty text, which nobody sees: it keeps the column's shape.
        distinct = sorted({caption for row in captions for caption in row or [""]})
        ids_UL = _TOKENIZERS[item.tokens](distinct)
        position = {caption: place for place, caption in enumerate(distinct)}
        main = ids_UL[[position[row[0] if row else ""] for row in captions]]
        extra = ids_UL[[position[caption] for row in captions for caption in row[1:]]]
        offsets = np.cumsum([0, *(len(row[1:]) for row in captions)], dtype=np.int32)
        absent = np.array([not row for row in captions], bool)
        return {
            item.tokens: fixed_rows(main, absent),
            item.extra_tokens: pa.ListArray.from_arrays(pa.array(offsets), fixed_rows(extra)),
        }


def scaled_side(geometries: Sequence[Geometry], views: ViewsConfig) -> int:
    """Pixels that both sides of a JPEG must keep when it is decoded at a fraction of its size."""
    side = SCALED_MARGIN * max(max(geometry.size, geometry.resize_to or 0) for geometry in geometries)
    # A crop of a quarter of the area has half the side: it must keep as many pixels as the whole would.
    return int(np.ceil(side / views.least_area**0.5)) if views.count else side


def prepare_images(
    decoder: PictureDecoder,
    images: pa.ChunkedArray,
    geometries: Sequence[Geometry],
    boxes: np.ndarray | None = None,
    least_side: int | None = None,
    fast_resize: bool = False,
) -> dict[str, pa.Array]:
    """Decode each image once and fit it to every distinct geometry.

    Returns:
        ``image_error`` (null where the image decoded) and one uint8 column per geometry; a failed row is black. With
        ``boxes``, ``view_boxes`` and one list column of views per geometry too.
    """
    decoded = decoder.decode(images, geometries, boxes, least_side, fast_resize)
    rows = len(images)
    errors = [": ".join(decoded.errors[row]) if row in decoded.errors else None for row in range(rows)]
    columns: dict[str, pa.Array] = {"image_error": pa.array(errors, pa.string())}
    for geometry in geometries:
        columns[pixel_column(geometry)] = fixed_rows(decoded.pixels[geometry.key].reshape(rows, -1))
    if boxes is not None:
        views = boxes.shape[1]
        offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * views)
        columns[VIEW_BOXES] = pa.ListArray.from_arrays(offsets, fixed_rows(boxes.reshape(-1, 4)))
        for geometry in geometries:
            flat = decoded.view_pixels[geometry.key].reshape(rows * views, -1)
            columns[f"view_{pixel_column(geometry)}"] = pa.ListArray.from_arrays(offsets, fixed_rows(flat))
    return columns


def fixed_rows(array_NK: np.ndarray, absent_N: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """A two-dimensional array as an Arrow column, without copying; null where ``absent_N`` says so."""
    flat = pa.array(np.ascontiguousarray(array_NK).reshape(-1))
    kind = pa.list_(flat.type, array_NK.shape[1])
    mask = None if absent_N is None or not absent_N.any() else pa.array(absent_N)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=mask)


def rows_of(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The inverse of :func:`fixed_rows`: numpy [N, K] of the rows that are not null; no copy if all are."""
    array = single_chunk(column) if isinstance(column, pa.ChunkedArray) else column
    width = array.type.list_size
    return np.asarray(array.flatten().to_numpy(zero_copy_only=True)).reshape(-1, width)
