"""Packs of one teacher's shards: written from single files, taken apart again, and put in order after a kill.

A pack appears whole, is read back in full, and only then are the files it replaces removed. So whatever dies, nothing
is lost; at worst a shard is in two files, of which its own counts (:func:`common.shard_files.locate`), until
:func:`settle` removes one of them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.config import fingerprint
from common.errors import LakeError, StorageError
from common.lake import Lake, shard_name
from common.listing import FileMark, Place, list_marks
from common.logs import logger
from common.shard_files import PACK, ShardFacts, ShardFile, is_pack, origin_of, pack_name, shards_in
from extractor.sink import write_single
from extractor.tending.integrity import Fault, check_features, check_file, content_hash, samples_hash
from extractor.tending.ledger import Pairs, in_threads

NO_PAIRS = "the pairs have no such shard"


class Partition:
    """One teacher's files beside the pairs, with what a full check has found of each.

    Attributes:
        folder: The teacher's folder, relative to the lake.
        manifest: What produced the files.
        identity: The producer, as the manifest records it.
    """

    def __init__(self, lake: Lake, teacher: str, pairs: Pairs) -> None:
        """Look a teacher up.

        Raises:
            LakeError: It has no manifest.
        """
        self.lake, self.teacher, self.pairs = lake, teacher, pairs
        self.folder = lake.features_folder(teacher)
        self.manifest = lake.read_teacher(teacher)
        self.identity: dict[str, Any] = self.manifest["fingerprint"]
        self._faults: dict[Place, dict[int, Fault]] = {}

    def marks(self) -> dict[str, FileMark]:
        """Name -> mark of the files that hold shards, from a fresh listing."""
        return {name: mark for name, mark in list_marks(self.lake.storage, self.folder).items() if shards_in(name)}

    def open(self, place: Place) -> ShardFile:
        """Open one of the files."""
        return ShardFile(self.lake.storage, f"{self.folder}/{place.name}", place.mark.size)

    def check(self, place: Place) -> dict[int, Fault]:
        """Shard -> what is wrong with it, for a file that is read in full, once; empty if it is good."""
        if place not in self._faults:
            expected = self.pairs.expected(shards_in(place.name))
            try:
                found = check_file(self.lake.storage, self.folder, place, expected, self.identity)
            except FileNotFoundError:
                found = dict.fromkeys(expected, Fault("it was removed meanwhile"))
            faults = {index: fault for index, fault in found.items() if fault is not None}
            strange = {index: Fault(NO_PAIRS) for index in expected if index not in self.pairs.marks}
            self._faults[place] = {**faults, **strange}
        return self._faults[place]

    def remove(self, names: Iterable[str]) -> None:
        """Delete some of the files."""
        list(in_threads(lambda name: self.lake.storage.remove(f"{self.folder}/{name}"), names))


def plan_packs(marks: Mapping[str, FileMark], target_bytes: int) -> list[list[str]]:
    """Group files of consecutive shards, in order, so that each group makes a pack of at most ``target_bytes``.

    A pack that has reached half of that is left alone; a smaller one grows together with single files that follow it,
    but packs alone are never packed again, so that a second run finds nothing to do.

    Args:
        marks: The files of a teacher; no shard in two of them.
        target_bytes: Size of a pack.
    """
    groups: list[list[str]] = [[]]
    total = 0
    for name in sorted(marks, key=lambda name: shards_in(name)[0]):
        size = marks[name].size
        full = is_pack(name) and 2 * size >= target_bytes
        follows = bool(groups[-1]) and shards_in(groups[-1][-1])[-1] + 1 == shards_in(name)[0]
        if full or not follows or total + size > target_bytes:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total = target_bytes if full else total + size
    return [group for group in groups if len(group) > 1 and not all(map(is_pack, group))]


def write_pack(partition: Partition, files: list[Place]) -> Place:
    """Write some files' shards as one pack, and read it back.

    Raises:
        LakeError: One of the files is not good; nothing was written.
        StorageError: The pack does not read back as it was written; it is removed.
    """
    shards = [(file, index) for file in map(partition.open, files) for index in file.shards]
    expected = partition.pairs.expected(index for _, index in shards)
    producer = fingerprint(partition.identity)
    buffer, facts = io.BytesIO(), []
    writer: pq.ParquetWriter | None = None
    for (file, index), table in zip(shards, in_threads(lambda item: item[0].read(item[1]), shards), strict=True):
        table = table.replace_schema_metadata(None)
        writer = writer or _open_writer(buffer, table.schema, file.footer)
        fault = check_features(table, file.facts[index], expected[index], partition.identity)
        if file.fingerprint != producer:
            fault = Fault("it was made by another producer than the manifest records")
        elif not table.schema.equals(writer.schema):
            fault = Fault("its columns are not those of the files before it")
        if fault is not None:
            raise _not_good(partition, file.name, fault)
        writer.write_table(table, row_group_size=max(table.num_rows, 1))
        said = file.facts[index]  # compared with the values a moment ago
        samples, content = said.samples or samples_hash(table["sample_id"]), said.content or content_hash(table)
        facts.append(ShardFacts(index, table.num_rows, samples, content))
    assert writer is not None
    listing = json.dumps([fact._asdict() for fact in facts])
    writer.add_key_value_metadata({**origin_of(partition.teacher, partition.manifest), PACK: listing})
    writer.close()
    name = pack_name(shards[0][1], shards[-1][1])
    partition.lake.storage.write_bytes(f"{partition.folder}/{name}", buffer.getvalue())
    return _read_back(partition, name)


def _open_writer(buffer: io.BytesIO, schema: pa.Schema, footer: pq.FileMetaData) -> pq.ParquetWriter:
    """A writer with the encodings of the single files (``Storage.write_table``)."""
    leaves = [footer.schema.column(number) for number in range(footer.num_columns)]
    floats = [leaf.path for leaf in leaves if leaf.physical_type == "FLOAT"]
    return pq.ParquetWriter(
        buffer,
        schema,
        compression="zstd",
        use_dictionary=False,
        use_byte_stream_split=floats,
        write_page_index=True,
        store_schema=True,
    )


def _read_back(partition: Partition, name: str) -> Place:
    place = Place(name, partition.marks()[name])
    for fault in partition.check(place).values():
        partition.remove([name])
        raise StorageError(
            f"{partition.lake.uri}/{partition.folder}/{name} does not read back as it was written: {fault.sentence}. "
            "It was removed and the single files were kept. Check the disk or the network, then run compact again."
        )
    return place


def unpack(partition: Partition, pack: Place, shards: Iterable[int]) -> None:
    """Write some of a pack's shards as files of their own, then remove the pack."""
    wanted = list(shards)
    file = partition.open(pack) if wanted else None  # one of which nothing is good may not even open
    for index in wanted:
        assert file is not None
        table = file.read(index).replace_schema_metadata(None)
        write_single(partition.lake, partition.teacher, index, table, partition.manifest)
    partition.remove([pack.name])


def overlapping(marks: Mapping[str, FileMark]) -> dict[str, list[str]]:
    """Pack -> the other files that hold some of its shards, narrower packs among them; widest packs first."""
    packs = sorted(filter(is_pack, marks), key=lambda name: (-len(shards_in(name)), name))
    found: dict[str, list[str]] = {}
    for rank, pack in enumerate(packs):
        span = shards_in(pack)
        beside = [shard_name(index) for index in span if shard_name(index) in marks]
        beside += [other for other in packs[rank + 1 :] if {*shards_in(other)} & {*span}]
        if beside:
            found[pack] = beside
    return found


def settle(partition: Partition) -> None:
    """Bring order where shards are in a pack and in another file: what killed runs of compact leave.

    A good pack makes files beside it superfluous if they hold the same, or are damaged. In any other case the files
    beside it count: the pack's other good shards become files of their own, and the pack is removed.
    """
    while beside := overlapping(marks := partition.marks()):
        pack, others = next(iter(beside.items()))
        dissolve(partition, Place(pack, marks[pack]), [Place(name, marks[name]) for name in others])


def dissolve(partition: Partition, pack: Place, beside: list[Place]) -> None:
    """Decide between a pack and the files beside it (see :func:`settle`); a damaged pack is taken apart in any case."""
    faults = partition.check(pack)
    good = [other for other in beside if not partition.check(other)]
    names = [other.name for other in beside]
    if not faults and all(_contents(partition, other).items() <= _contents(partition, pack).items() for other in good):
        logger.info("%s/%s: removing %d files whose shards the pack holds", partition.folder, pack.name, len(names))
        partition.remove(names)
        return
    kept = {index for other in good for index in shards_in(other.name)}
    rescued = [index for index in shards_in(pack.name) if index not in faults and index not in kept]
    logger.info("%s/%s: taking %d shards out of the pack", partition.folder, pack.name, len(rescued))
    unpack(partition, pack, rescued)
    written = {shard_name(index) for index in rescued}
    partition.remove(other.name for other in beside if other not in good and other.name not in written)


def _contents(partition: Partition, place: Place) -> dict[int, str]:
    file = partition.open(place)
    return {index: fact.content or content_hash(file.read(index)) for index, fact in file.facts.items()}


def refuse_other_samples(partition: Partition, places: Iterable[Place]) -> None:
    """Insist that files hold the samples of their pairs.

    Raises:
        LakeError: One of them does not.
    """
    for place in places:
        for fault in partition.check(place).values():
            if fault.other_samples:
                raise _not_good(partition, place.name, fault)


def _not_good(partition: Partition, name: str, fault: Fault) -> LakeError:
    return LakeError(
        f"{partition.lake.uri}/{partition.folder}/{name} is not good: {fault.sentence}. Run "
        f"`mmkd verify {partition.lake.uri}` to see all such files, with --repair to remove them, and extract again."
    )
