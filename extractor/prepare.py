"""CPU half of extraction: read a shard of pairs, decode each image once, tokenise once per distinct tokenizer.

The result is one Arrow table per shard, row-aligned with the pairs, that every teacher reads without copying.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from common.images import UndecodableImageError, decode_rgb, fit
from common.lake import Lake
from common.models.dual_encoder import Tokenize
from common.models.load import load_tokenizer
from common.models.spec import Geometry, ModelDescription, ModelSpec


@dataclass(frozen=True)
class TeacherInput:
    """Which of the prepared columns a teacher reads."""

    spec: ModelSpec
    description: ModelDescription

    @property
    def pixels(self) -> str:
        """Column with the teacher's pictures: uint8 [size * size * channels] per row."""
        return f"pixels:{self.description.geometry.key}"

    @property
    def tokens(self) -> str:
        """Column with the main caption's token ids: int32 [context length] per row."""
        return f"tokens:{self.description.tokenizer_key}"

    @property
    def extra_tokens(self) -> str:
        """Column with the further captions' token ids: list of int32 [context length] per row."""
        return f"extra_{self.tokens}"


_TOKENIZERS: dict[str, Tokenize] = {}
"""Loaded once per worker process, by the key under which teachers share token ids."""


class Prepare:
    """Turn shard numbers into prepared tables; small, so that it travels to every task.

    Args:
        lake_uri: The lake.
        inputs: Every teacher of the run, by name.
        todo: Shard -> names of the teachers that still lack it.
    """

    def __init__(self, lake_uri: str, inputs: dict[str, TeacherInput], todo: dict[int, tuple[str, ...]]) -> None:
        self.lake = Lake(lake_uri)
        self.inputs = inputs
        self.todo = todo

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """Prepare the one shard named in the batch."""
        (index,) = batch["shard"]
        return self.prepare(int(index))

    def prepare(self, index: int) -> pa.Table:
        """Prepared table of one shard: shard, sample_id, image_error, then pixel and token columns."""
        needed = [self.inputs[name] for name in self.todo[index]]
        pairs = self.lake.read_pairs(index, ["sample_id", "image", "captions"])
        columns: dict[str, pa.Array] = {
            "shard": pa.array(np.full(pairs.num_rows, index, np.int32)),
            "sample_id": pairs["sample_id"].combine_chunks(),
        }
        geometries = {item.pixels: item.description.geometry for item in needed if item.description.image_dim}
        columns.update(prepare_images(pairs["image"], geometries))
        captions = pairs["captions"].to_pylist()
        for item in needed:
            if item.description.text_dim and item.tokens not in columns:
                columns.update(self._tokenise(item, captions))
        return pa.table(columns)

    def _tokenise(self, item: TeacherInput, captions: list[list[str]]) -> dict[str, pa.Array]:
        if item.tokens not in _TOKENIZERS:
            _TOKENIZERS[item.tokens] = load_tokenizer(item.spec)
        distinct = sorted({caption for row in captions for caption in row})
        ids_UL = _TOKENIZERS[item.tokens](distinct)
        position = {caption: place for place, caption in enumerate(distinct)}
        main = ids_UL[[position[row[0]] for row in captions]]
        extra = ids_UL[[position[caption] for row in captions for caption in row[1:]]]
        offsets = np.cumsum([0, *(len(row) - 1 for row in captions)], dtype=np.int32)
        return {
            item.tokens: fixed_rows(main),
            item.extra_tokens: pa.ListArray.from_arrays(pa.array(offsets), fixed_rows(extra)),
        }


def prepare_images(images: Iterable[pa.Scalar], geometries: dict[str, Geometry]) -> dict[str, pa.Array]:
    """Decode each image once and fit it to every distinct geometry.

    Returns:
        ``image_error`` (null where the image decoded) and one uint8 column per geometry; a failed row is black.
    """
    encoded = [image.as_buffer() for image in images]
    errors: list[str | None] = [None] * len(encoded)
    pixels = {name: np.zeros((len(encoded), g.size, g.size, g.channels), np.uint8) for name, g in geometries.items()}
    for row, data in enumerate(encoded if geometries else ()):
        try:
            image = decode_rgb(data.to_pybytes())
        except UndecodableImageError as error:
            errors[row] = f"{error.reason}: {error.detail}"
            continue
        for name, geometry in geometries.items():
            pixels[name][row] = fit(image, geometry)
    flat = {name: fixed_rows(array.reshape(len(encoded), -1)) for name, array in pixels.items()}
    return {"image_error": pa.array(errors, pa.string()), **flat}


def fixed_rows(array_NK: np.ndarray) -> pa.FixedSizeListArray:
    """A two-dimensional array as an Arrow column, without copying."""
    width = array_NK.shape[1]
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array_NK).reshape(-1)), width)


def rows_of(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The inverse of :func:`fixed_rows`: numpy [N, K], without copying a single-chunk column."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = array.type.list_size
    return np.asarray(array.flatten().to_numpy(zero_copy_only=True)).reshape(-1, width)
