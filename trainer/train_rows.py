"""Stored vectors of the train rows that teachers may speak for, shard by shard: what alignment and temperature see.

Rows without a caption are left out, as they are in training.
"""

from __future__ import annotations

import numpy as np

from common.captions import captioned
from common.errors import LakeError
from common.lake import Lake
from trainer.alignment.maps import SIDES
from trainer.data import read_selection
from trainer.selection.read import vectors_of

COLUMNS = ["sample_id", "image_embedding", "text_embedding"]


class TrainRows:
    """The train rows of a lake with the vectors of the teachers that may speak for them.

    Args:
        lake: The lake.
        selection: Fingerprint of the selection.
        teachers: Whose vectors.
    """

    def __init__(self, lake: Lake, selection: str, teachers: tuple[str, ...]) -> None:
        self.lake, self.selection, self.teachers = lake, selection, teachers
        self.shards = lake.shards()
        self.without_caption: dict[int, int] = {}
        """Shard -> train rows left out for want of a caption, of the shards read so far."""
        producers = {name: lake.read_teacher(name)["fingerprint"] for name in teachers}
        self.dims = {name: {side: made.get(f"{side}_dim") for side in SIDES} for name, made in producers.items()}

    def read(self, shard: int) -> dict[str, dict[str, np.ndarray]]:
        """Teacher -> side -> float32 [N, T] over the shard's train rows; NaN rows where it may not speak."""
        pairs = self.lake.read_pairs(shard, ["sample_id", "captions", "split"])
        train = np.array(pairs["split"].to_pylist()) == "train"
        has_caption = captioned(pairs["captions"])
        self.without_caption[shard] = int((train & ~has_caption).sum())
        train &= has_caption
        found: dict[str, dict[str, np.ndarray]] = {}
        for name in self.teachers:
            try:
                features = self.lake.read_features(name, shard, COLUMNS)
            except FileNotFoundError as error:
                raise LakeError(
                    f"{self.lake.uri} has no embeddings of teacher {name!r} for shard {shard}. Run `mmkd extract` "
                    "again: it computes only what is missing."
                ) from error
            admitted = read_selection(self.lake, self.selection, name, shard, pairs)["admitted"].to_numpy()
            found[name] = {}
            for side in SIDES:
                if self.dims[name][side]:
                    vectors = vectors_of(features[f"{side}_embedding"])
                    vectors[~admitted] = np.nan
                    found[name][side] = vectors[train]
        return found
