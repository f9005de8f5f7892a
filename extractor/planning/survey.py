"""What a run of extract would have to do: which files are missing, and what they cost in rows, pictures and bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from common.config import fingerprint
from common.lake import Lake, open_lake
from extractor.config import ExtractConfig
from extractor.partitions import (
    Todo,
    check_partitions,
    describe_inputs,
    find_teachers,
    identity_of,
    plan_todo,
)
from extractor.planning.measure import Measurement, ShardShape
from extractor.prepare import TeacherInput

BYTES_PER_VALUE = {"float16": 1.77, "bfloat16": 1.39}
"""Of unit vectors so rounded, stored as float32 with BYTE_STREAM_SPLIT and zstd, with ids and lengths beside them:
1.766 to 1.777 measured over widths of 512 and 768 and shards of 1024 rows; 0.38 less in bfloat16, on drawn vectors."""
SAMPLED_FILES = 4


@dataclass(frozen=True)
class Survey:
    """A lake as a run would find it.

    Attributes:
        lake: The lake.
        config: What is asked for.
        inputs: Every teacher that was named, by the name of its partition.
        todo: Shard -> teachers that still lack it.
        rows: Shard -> pairs.
    """

    lake: Lake
    config: ExtractConfig
    inputs: dict[str, TeacherInput]
    todo: Todo
    rows: dict[int, int]

    @cached_property
    def missing_shards(self) -> Counter[str]:
        """Teacher -> shards it lacks; teachers that lack none are left out."""
        return Counter(name for names in self.todo.values() for name in names)

    @cached_property
    def missing_rows(self) -> Counter[str]:
        """Teacher -> rows it lacks."""
        found: Counter[str] = Counter()
        for shard, names in self.todo.items():
            found.update(dict.fromkeys(names, self.rows[shard]))
        return found

    @property
    def pairs_to_prepare(self) -> int:
        """Pairs of the shards that any teacher lacks; each is prepared once for all of them."""
        return sum(self.rows[shard] for shard in self.todo)

    @property
    def pictures_to_decode(self) -> int:
        """Pairs of the shards that any teacher with an image tower lacks."""
        seeing = {name for name, item in self.inputs.items() if item.description.image_dim}
        return sum(self.rows[shard] for shard, names in self.todo.items() if seeing.intersection(names))

    @cached_property
    def _sample(self) -> tuple[int, ShardShape, int, str]:
        """A missing shard of usual size, its shape, how many captions its rows have, a name for its content."""
        shard = max(self.todo, key=lambda index: (self.rows[index], -index))
        pairs = self.lake.read_pairs(shard, ["sample_id", "captions"])
        captions = pairs["captions"].to_pylist()
        distinct = {caption for row in captions for caption in row}
        shape = ShardShape(len(captions), len(captions) * (1 + self.config.views.count), len(distinct))
        return shard, shape, sum(map(len, captions)), fingerprint(pairs["sample_id"].to_pylist())

    @property
    def shape(self) -> ShardShape:
        """What a shard of usual size costs. There must be something to do."""
        return self._sample[1]

    @property
    def measurement(self) -> Measurement:
        """That shard, for all teachers that lack something. There must be something to do."""
        inputs = {name: item for name, item in self.inputs.items() if name in self.missing_shards}
        return Measurement(self.lake.uri, inputs, self._sample[0], self._sample[3], self.config)

    def bytes_per_row(self, teacher: str) -> float:
        """Of a teacher's files: as in those that are there, else reckoned from its widths."""
        folder = self.lake.features_folder(teacher)
        names = [f"{folder}/{name}" for name in self.lake.storage.list_files(folder, ".parquet")[:SAMPLED_FILES]]
        rows = sum(self.lake.storage.read_metadata(name)[0] for name in names)
        if rows:
            return sum(self.lake.storage.size(name) or 0 for name in names) / rows
        description, (_, shape, all_captions, _) = self.inputs[teacher].description, self._sample
        pictures, captions = shape.pictures / shape.rows, all_captions / shape.rows
        values = (description.image_dim or 0) * pictures + (description.text_dim or 0) * captions
        return BYTES_PER_VALUE[self.config.stored_precision] * values


def survey_lake(lake_uri: str, config: ExtractConfig) -> Survey:
    """Find out what is missing, without computing anything.

    Raises:
        LakeError: No lake, or a partition there was produced by something else.
        ModelError: A teacher is unknown or its files are missing.
    """
    lake = open_lake(lake_uri)
    inputs = describe_inputs(find_teachers(config), config)
    identities = {name: identity_of(item, config) for name, item in inputs.items()}
    check_partitions(lake, identities)
    todo, pairs = plan_todo(lake, identities)
    return Survey(lake, config, inputs, todo, pairs.rows)
