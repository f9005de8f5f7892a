"""What is measured on: rows of picture, captions, labels and modality, whatever they come from.

A further source of data is one more function that returns an ``EvaluationData``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pyarrow.compute as pc

from common.errors import EvaluateError
from common.lake import Lake

UNSPECIFIED = "unknown"
"""The modality of samples that name none."""


class Sample(NamedTuple):
    """One picture (an encoded file) with what is known about it."""

    sample_id: str
    image: bytes
    captions: tuple[str, ...]
    modality: str
    labels: tuple[str, ...]
    """Distinct; often one or none."""


@dataclass(frozen=True)
class EvaluationData:
    """A set of samples that can be streamed, with the classes of its modalities known beforehand."""

    name: str
    """Of the lake."""
    split: str
    classes: dict[str, tuple[str, ...]]
    """Modality -> distinct labels, sorted; modalities without labels are absent."""
    count: int
    identity: dict[str, Any]
    """What determines the samples, as JSON-able values; part of the fingerprint of the scores."""
    stream: Callable[[], Iterator[list[Sample]]]
    """Yields the samples shard by shard, at most one shard in memory, the same order each time."""

    @property
    def words(self) -> str:
        """The lake and the split as messages name them."""
        return f"{self.name}/{self.split}"


def lake_data(lake: Lake, split: str, limit: int | None = None) -> EvaluationData:
    """The samples of one split of a lake; classes are the labels found in any split.

    Raises:
        EvaluateError: The split has no samples.
    """
    labels: dict[str, set[str]] = {}
    splits: dict[str, int] = {}
    ids = hashlib.sha256()
    count = 0
    for shard in lake.shards():
        for row in lake.read_pairs(shard, ["sample_id", "modality", "labels", "split"]).to_pylist():
            splits[row["split"]] = splits.get(row["split"], 0) + 1
            if row["labels"]:
                labels.setdefault(row["modality"] or UNSPECIFIED, set()).update(row["labels"])
            if row["split"] == split and (limit is None or count < limit):
                ids.update(row["sample_id"].encode())
                count += 1
    if not count:
        raise EvaluateError(
            f"{lake.uri} has no samples in split {split!r} (it has: {splits}). "
            "Choose another with --set split=..., or ingest data whose split column or share of test samples fits."
        )
    return EvaluationData(
        name=lake.uri.rstrip("/").rsplit("/", 1)[-1],
        split=split,
        classes={modality: tuple(sorted(found)) for modality, found in sorted(labels.items())},
        count=count,
        identity={"split": split, "samples": count, "sample_ids_sha256": ids.hexdigest()},
        stream=lambda: _stream(lake, split, count),
    )


def _stream(lake: Lake, split: str, count: int) -> Iterator[list[Sample]]:
    left = count
    columns = ["sample_id", "image", "captions", "modality", "labels", "split"]
    for shard in lake.shards():
        if not left:
            return
        table = lake.read_pairs(shard, columns)
        rows = table.filter(pc.equal(table["split"], split)).to_pylist()
        samples = [_sample(row) for row in islice(rows, left)]
        left -= len(samples)
        if samples:
            yield samples


def _sample(row: dict[str, Any]) -> Sample:
    captions, labels = tuple(row["captions"]), tuple(dict.fromkeys(row["labels"]))
    return Sample(row["sample_id"], row["image"], captions, row["modality"] or UNSPECIFIED, labels)


def find_samples(data: EvaluationData, wanted: set[str]) -> dict[str, Sample]:
    """Fetch single samples again by id, for the pictures of a report."""
    return {s.sample_id: s for samples in data.stream() for s in samples if s.sample_id in wanted}
