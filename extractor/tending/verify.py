"""Everything in a lake's embeddings read and checked, whatever ledgers say; on request, what is bad is removed.

Repair only takes away: a bad file, with the rejects beside it, so that the next `mmkd extract` computes its shard
again; a bad pack, after its good shards became files of their own; what killed writes left. Pairs are never touched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from common.errors import LakeError, SchemaError, StorageError
from common.lake import (
    EXTRACT_REJECTS,
    Lake,
    check_pairs_table,
    now,
    open_lake,
    require_teachers,
    shard_name,
    teacher_manifest,
)
from common.lease import hold_all
from common.listing import FileMark, Place
from common.local_disk import LOCK, TEMPORARY
from common.logs import Progress, logger
from common.parquet_reading import table_of
from common.shard_files import CONTENT, UNREADABLE, is_pack, locate, shards_in
from common.teachers_table import TEACHERS_TABLE, refresh_teachers
from extractor.sink import rejects_folder
from extractor.tending.integrity import Fault, content_hash
from extractor.tending.ledger import Pairs, in_threads, write_valid
from extractor.tending.packing import Partition, dissolve, overlapping, settle

KILLED_AFTER_SECONDS = 3600
"""A temporary file older than this belongs to no write that is still under way."""
SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Finding:
    """Something in the lake that should not be so.

    Attributes:
        path: Where, relative to the lake.
        sentence: What is wrong.
        mended: Whether the repair took it away.
    """

    path: str
    sentence: str
    mended: bool = False


@dataclass
class Tally:
    """One teacher's shards."""

    good: int = 0
    bad: int = 0
    missing: int = 0


@dataclass
class VerifyReport:
    """What a verification saw."""

    teachers: dict[str, Tally] = field(default_factory=dict)
    """As they were found, before any repair."""
    findings: list[Finding] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    """Teachers that lack shards, after the repair if there was one."""
    files: int = 0
    rows: int = 0
    bytes: int = 0
    pairs_checked: bool = False
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing bad is left in the lake; shards that are only missing are not bad."""
        return all(finding.mended for finding in self.findings)


def verify(
    lake_uri: str,
    teachers: Iterable[str] | None = None,
    repair: bool = False,
    pairs: bool = False,
    lease_seconds: float = 60.0,
) -> VerifyReport:
    """Check every file of embeddings in full, and what lies beside them.

    Args:
        lake_uri: The lake.
        teachers: Names of partitions; None: all.
        repair: Remove what is bad; the teachers' leases are held meanwhile.
        pairs: Read all pairs too, pictures included.
        lease_seconds: A holder of a teacher's lease that shows no sign of life for so long is passed over.

    Raises:
        LakeError: There is no lake or no such teacher.
        LeaseError: With ``repair``, an extraction is at work on a teacher.
        StorageError: The storage does not answer; what it does not give is not called bad.
    """
    started = time.monotonic()
    lake = open_lake(lake_uri)
    wanted = require_teachers(lake, teachers) if teachers else lake.partitions()
    run, leased = f"verify-{now()}", [f"teacher={name}" for name in wanted] if repair else []
    report = VerifyReport(pairs_checked=pairs)
    with hold_all(lake.storage, leased, run, lease_seconds):
        known = Pairs(lake, trust=False)
        report.findings += [Finding(f"pairs/{shard_name(i)}", _unreadable(why)) for i, why in known.faults.items()]
        report.findings += check_ingests(lake)
        if pairs:
            report.findings += check_pairs(lake, known)
        for name in wanted:
            verify_teacher(lake, name, known, repair, report)
        report.findings += _clear(lake, [*orphaned_rejects(lake, wanted, teachers is None)], repair)
        report.findings += _clear(lake, [*killed_writes(lake)], repair)
        report.findings += killed_uploads(lake, repair)
        known.save()
        _refresh_teachers(lake)
    report.seconds = time.monotonic() - started
    return report


def _refresh_teachers(lake: Lake) -> None:
    """Bring the table of teachers up to date; like a ledger, it is made from what is there and never the truth."""
    try:
        if refresh_teachers(lake):
            logger.info("verify: teachers.parquet was not what the manifests say, and was written anew")
    except StorageError as error:  # whoever may only read can still verify
        logger.debug("%s was not written: %s", TEACHERS_TABLE, error)


def verify_teacher(lake: Lake, teacher: str, pairs: Pairs, repair: bool, report: VerifyReport) -> None:
    """Check one teacher's files, write its ledger anew, and repair if asked; adds to the report."""
    try:
        partition = Partition(lake, teacher, pairs)
    except (LakeError, KeyError):
        what = (
            "it is missing or of another kind, so nothing says what made the files in "
            f"{lake.features_folder(teacher)}; restore it or delete that folder"
        )
        report.findings.append(Finding(teacher_manifest(teacher), what))
        return
    marks = partition.marks()
    faults = _check_all(partition, marks)
    beside = overlapping(marks)
    places = locate(marks)
    bad = {index for index, place in places.items() if index in faults[place.name]}
    good = places.keys() - bad
    report.teachers[teacher] = Tally(len(good), len(bad), len(pairs.marks.keys() - places.keys()))
    report.files += len(marks)
    report.rows += sum(pairs.rows.get(index, 0) for index in good)
    report.bytes += sum(mark.size for mark in marks.values())
    report.findings += [
        Finding(f"{partition.folder}/{name}", _sentence(name, found), repair) for name, found in faults.items() if found
    ]
    report.findings += [
        Finding(f"{partition.folder}/{pack}", f"{', '.join(names[:3])} beside it hold the same shards", repair)
        for pack, names in beside.items()
    ]
    if repair and (any(faults.values()) or beside):
        _repair(partition, marks, faults)
        places = locate(partition.marks())
        good = {index for index, place in places.items() if index not in partition.check(place)}
    write_valid(lake, teacher, partition.identity, good, places, pairs)
    if pairs.marks.keys() - places.keys():
        report.incomplete.append(teacher)


def _check_all(partition: Partition, marks: dict[str, FileMark]) -> dict[str, dict[int, Fault]]:
    places = [Place(name, mark) for name, mark in marks.items()]
    progress = Progress(f"verify: {partition.teacher}", sum(len(shards_in(name)) for name in marks), "shards")
    faults = {}
    for place, found in zip(places, in_threads(partition.check, places), strict=True):
        faults[place.name] = found
        progress.advance(len(shards_in(place.name)))
    return faults


def _sentence(name: str, faults: dict[int, Fault]) -> str:
    """A file's faults as one sentence; a pack's name the shards."""
    if not is_pack(name):
        return next(iter(faults.values())).sentence
    shown = [f"shard {index}: {fault.sentence}" for index, fault in list(faults.items())[:SHOWN_FAULTS]]
    more = f"; and {len(faults) - SHOWN_FAULTS} more shards" if len(faults) > SHOWN_FAULTS else ""
    return f"{len(faults)} of {len(shards_in(name))} shards are bad ({'; '.join(shown)}{more})"


def _repair(partition: Partition, marks: dict[str, FileMark], faults: dict[str, dict[int, Fault]]) -> None:
    """Remove bad files, take bad packs apart, and settle what lies in two files."""
    partition.remove(name for name, found in faults.items() if found and not is_pack(name))
    settle(partition)
    for name, mark in partition.marks().items():
        if is_pack(name) and faults.get(name) and mark == marks.get(name):
            dissolve(partition, Place(name, mark), [])


def check_ingests(lake: Lake) -> list[Finding]:
    """Compare what the ingests say they wrote with the shards that are there."""
    present, owners, findings = set(lake.files("pairs")), dict[int, str](), []
    for name in lake.storage.list_files("ingests", ".json"):
        manifest = lake.storage.read_json(f"ingests/{name}")
        first = int(manifest["first_shard"])
        claimed = range(first, first + int(manifest["shards"]))
        gone = [shard_name(index) for index in claimed if index not in present]
        if gone:
            more = f" and {len(gone) - SHOWN_FAULTS} more" if len(gone) > SHOWN_FAULTS else ""
            sentence = f"{', '.join(gone[:SHOWN_FAULTS])}{more} of its {len(claimed)} shards are not in pairs/"
            findings.append(
                Finding(f"ingests/{name}", f"{sentence}; restore them from a copy, or ingest into a fresh lake")
            )
        twice = sorted({owners[index] for index in claimed if index in owners})
        if twice:
            sentence = f"{', '.join(twice)} claims the same shards, so the rows of one of the two are not in the lake"
            findings.append(Finding(f"ingests/{name}", f"{sentence}; ingest both into a fresh lake"))
        owners |= dict.fromkeys(claimed, name)
    return findings


def check_pairs(lake: Lake, pairs: Pairs) -> list[Finding]:
    """Read every pairs file in full: its columns, what ingest hashed of it, and that no sample is in the lake twice."""
    findings = []
    ids: dict[int, np.ndarray] = {}
    progress = Progress("verify: pairs", len(pairs.facts), "shards")

    def read(index: int) -> tuple[int, np.ndarray, str]:
        name = f"pairs/{shard_name(index)}"
        try:
            # Bytes first: what the storage fails to give is its error, and nothing against the file.
            table = table_of(lake.storage.read_bytes(name))
            check_pairs_table(table, f"{lake.uri}/{name}")
            written = (table.schema.metadata or {}).get(CONTENT.encode())  # not by hand: those have no hash
            if written is not None and written.decode() != content_hash(table):
                return index, np.array([]), _unreadable("pictures or rows are not those that ingest wrote")
            return index, np.array([sample_id.encode() for sample_id in table["sample_id"].to_pylist()]), ""
        except (SchemaError, *UNREADABLE) as error:
            return index, np.array([]), _unreadable(error)

    for index, found, why in in_threads(read, pairs.facts):
        progress.advance(1)
        if why:
            findings.append(Finding(f"pairs/{shard_name(index)}", why))
        else:
            ids[index] = found
    return [*findings, *_repeated(ids)]


def _unreadable(why: object) -> str:
    return f"it cannot be read ({why}); restore it from a copy, or ingest into a fresh lake"


def _repeated(ids: dict[int, np.ndarray]) -> Iterator[Finding]:
    """Shards with sample ids, bytes [N] each, that stand in an earlier row of the lake."""
    if not ids:
        return
    owner = np.repeat(list(ids), [len(found) for found in ids.values()])
    every = np.concatenate(list(ids.values()))
    _, first, back = np.unique(every, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[back] != np.arange(len(every)))
    for index in np.unique(owner[again]):
        rows = again[owner[again] == index]
        where = f"{every[rows[0]].decode()} is in shard {owner[first[back[rows[0]]]]} too"
        sentence = f"{len(rows)} of its sample ids are not unique in the lake ({where})"
        yield Finding(f"pairs/{shard_name(int(index))}", sentence)


def orphaned_rejects(lake: Lake, teachers: Iterable[str], everybody: bool) -> Iterator[Finding]:
    """Rejects of shards that have no embeddings: the run was killed between the two, or the embeddings were removed."""
    names = set(teachers)
    if everybody:
        names |= set(lake.storage.list_folders(EXTRACT_REJECTS))
    for teacher in sorted(names):
        folder = rejects_folder(teacher)
        orphans = set(lake.files(folder)) - set(lake.files(lake.features_folder(teacher)))
        yield from (Finding(f"{folder}/{shard_name(i)}", "its shard has no embeddings") for i in sorted(orphans))


def killed_writes(lake: Lake) -> Iterator[Finding]:
    """Temporary files that a killed process left on a local disk."""
    root = lake.storage.path()
    for folder, _, names in os.walk(root) if lake.storage.is_local else ():
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith(TEMPORARY) and name != LOCK and time.time() - _changed(path) > KILLED_AFTER_SECONDS:
                yield Finding(os.path.relpath(path, root), "a killed write left it")


def killed_uploads(lake: Lake, repair: bool) -> list[Finding]:
    """Parts of large files that a killed process left in an object store, where no listing shows and the bill does."""
    try:
        old = [one for one in lake.storage.uploads() if time.time() - one.begun > KILLED_AFTER_SECONDS]
    except StorageError as error:
        logger.warning("verify: whether killed writes left parts of files is not known: %s", error)
        return []
    for upload in old if repair else ():
        lake.storage.abort(upload)
    return [Finding(upload.path, "a killed write left parts of it", mended=repair) for upload in old]


def _changed(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return time.time()  # renamed meanwhile: no leftover


def _clear(lake: Lake, findings: list[Finding], repair: bool) -> list[Finding]:
    if not repair:
        return findings
    for finding in findings:
        lake.storage.remove(finding.path)
    if findings:
        logger.info("verify: removed %d files that nothing refers to", len(findings))
    return [Finding(finding.path, finding.sentence, mended=True) for finding in findings]
