"""Compaction: runs of small files of embeddings become packs that readers open fast. An operation for a quiet lake.

Between a pack's appearance and the removal of the files it replaces, whoever opens the folder sees their rows twice;
this project's own readers do not. Each teacher's lease is held meanwhile, so that no extraction runs on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import LeaseError
from common.lake import Lake, now, open_lake, require_teachers
from common.lease import Lease, hold
from common.listing import Place
from common.logs import Progress, logger
from common.shard_files import locate, shards_in
from extractor.sink import survey_pairs
from extractor.tending.ledger import Pairs, read_valid, write_valid
from extractor.tending.packing import Partition, overlapping, plan_packs, refuse_other_samples, settle, write_pack


@dataclass
class CompactReport:
    """What a compaction did."""

    packs: int = 0
    """Packs written."""
    replaced: int = 0
    """Files whose shards they hold now."""
    bytes: int = 0
    """Of the packs."""


def compact(
    lake_uri: str, teachers: Iterable[str] | None = None, target_bytes: int = 128 << 20, lease_seconds: float = 60.0
) -> CompactReport:
    """Pack runs of consecutive small files of each teacher; what a killed compaction left is put in order first.

    Args:
        lake_uri: The lake.
        teachers: Names of partitions; None: all.
        target_bytes: Most bytes of a pack.
        lease_seconds: A holder of a teacher's lease that shows no sign of life for so long is passed over.

    Raises:
        LakeError: There is no lake or no such teacher, or a file is not good.
        LeaseError: An extraction is at work on a teacher.
    """
    lake = open_lake(lake_uri)
    names = require_teachers(lake, teachers)
    pairs = survey_pairs(lake)
    report = CompactReport()
    for name in names:
        with hold(lake.storage, f"teacher={name}", f"compact-{now()}", lease_seconds) as lease:
            compact_teacher(lake, name, pairs, target_bytes, lease, report)
    pairs.save()
    if report.packs:
        logger.info("compact: %d files are %d now (%.1f MB)", report.replaced, report.packs, report.bytes / 1e6)
    else:
        logger.info("compact: nothing to do; no two neighbouring files of %s fit into one pack", ", ".join(names))
    return report


def compact_teacher(
    lake: Lake, teacher: str, pairs: Pairs, target_bytes: int, lease: Lease, report: CompactReport
) -> None:
    """Pack one teacher's files, and keep its ledger true."""
    partition = Partition(lake, teacher, pairs)
    marks = partition.marks()
    known = read_valid(lake, teacher, partition.identity)
    good = {
        index
        for index, place in locate(marks).items()
        if index in known and index in pairs.marks and known[index] == (*place, pairs.marks[index])
    }
    beside = overlapping(marks)
    suspects = {name for pack, others in beside.items() for name in (pack, *others)}
    refuse_other_samples(partition, [Place(name, marks[name]) for name in suspects])
    settle(partition)
    marks = partition.marks()
    groups = plan_packs(marks, target_bytes)
    progress = Progress(f"compact: {teacher}", sum(map(len, groups)), "files")
    for group in groups:
        _insist_on(lease)
        pack = write_pack(partition, [Place(name, marks[name]) for name in group])
        _insist_on(lease)
        partition.remove(group)
        good.update(shards_in(pack.name))
        report.packs += 1
        report.replaced += len(group)
        report.bytes += pack.mark.size
        progress.advance(len(group), pack.name)
    if groups or beside:
        write_valid(lake, teacher, partition.identity, good, locate(partition.marks()), pairs)


def _insist_on(lease: Lease) -> None:
    if not lease.is_held():
        raise LeaseError(
            f"{lease.storage.uri}: lease {lease.name} was taken over by another run, which found no sign of life of "
            "this one. What was packed is whole; run compact again."
        )
