"""What was found valid before, so that a resume need not read it again: caches, never the truth.

``manifests/valid/teachers/T.json`` lists the shards whose embeddings were checked in full, each with the mark of the
file that held them and of its pairs; ``manifests/valid/pairs.json`` keeps rows and hashes of the pairs. An entry counts
while the marks in a fresh listing are the same. A ledger that is torn, foreign or copied from another lake only costs
reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pydantic import ValidationError

from common.config import StrictModel, fingerprint
from common.errors import LakeError, StorageError
from common.lake import PAIRS_LEDGER, Lake, shard_name, teacher_ledger
from common.listing import FileMark, Place
from common.logs import logger
from common.parquet_reading import read_columns, read_footer
from common.shard_files import UNREADABLE
from extractor.tending.integrity import Expected, samples_hash

READ_THREADS = 16


class PairFacts(NamedTuple):
    """What is known of one pairs shard."""

    mark: FileMark
    rows: int
    samples: str | None = None
    """Hash of the sample ids; None until somebody needed it."""


class ValidShard(NamedTuple):
    """A shard of embeddings that was checked: where it lay, and beside which pairs."""

    name: str
    mark: FileMark
    pairs: FileMark


class PairsLedger(StrictModel):
    """The content of :data:`common.lake.PAIRS_LEDGER`."""

    shards: dict[int, PairFacts] = {}


class ValidLedger(StrictModel):
    """The content of a teacher's ledger; ``fingerprint`` is the producer's."""

    fingerprint: str = ""
    shards: dict[int, ValidShard] = {}


class Pairs:
    """The pairs as one listing shows them, with rows and hashes read only where no ledger has them.

    Attributes:
        facts: Shard -> mark and rows, ascending.
        faults: Shard -> why its file cannot be read; such a shard is not in ``facts``.
    """

    def __init__(self, lake: Lake, trust: bool = True) -> None:
        """List the pairs.

        Args:
            lake: The lake.
            trust: Whether to believe the ledger; if not, everything is read.
        """
        self.lake = lake
        self.faults: dict[int, str] = {}
        self._saved = _read_ledger(lake, PAIRS_LEDGER, PairsLedger).shards
        known = self._saved if trust else {}
        marks = lake.pair_marks()
        self.marks = marks
        self.facts = {index: known[index] for index, mark in marks.items() if is_current(known.get(index), mark)}
        self._read([index for index in marks if index not in self.facts], with_ids=not trust)

    @property
    def rows(self) -> dict[int, int]:
        """Shard -> number of pairs, ascending."""
        return {index: self.facts[index].rows for index in self.marks if index in self.facts}

    def expected(self, shards: Iterable[int]) -> dict[int, Expected]:
        """What some shards demand of the embeddings beside them; reads sample ids where no ledger has their hash."""
        wanted = list(shards)
        self._read([i for i in wanted if i in self.facts and self.facts[i].samples is None], with_ids=True)
        nothing = Expected(None, None)
        return {i: Expected(*self.facts[i][1:]) if i in self.facts else nothing for i in wanted}

    def require(self) -> None:
        """Insist that all pairs can be read.

        Raises:
            LakeError: Names the first file that cannot.
        """
        for index, why in self.faults.items():
            raise LakeError(
                f"{self.lake.uri}/pairs/{shard_name(index)} cannot be read: {why}. Restore the file from a copy, or "
                "ingest into a fresh lake; `mmkd verify --pairs` lists every such file."
            )

    def save(self) -> None:
        """Keep what was learnt for the next run, if it is new."""
        facts = {index: self.facts[index] for index in self.marks if index in self.facts}
        if facts != self._saved:
            _write_ledger(self.lake, PAIRS_LEDGER, PairsLedger(shards=facts))
            self._saved = facts

    def _read(self, shards: list[int], with_ids: bool) -> None:
        def read(index: int) -> tuple[int, PairFacts | None, str]:
            mark = self.marks[index]
            try:
                name, storage = f"pairs/{shard_name(index)}", self.lake.storage
                footer, samples = read_footer(storage, name, mark.size), None
                if with_ids:
                    ids = read_columns(storage, name, mark.size, ["sample_id"], footer=footer)
                    samples = samples_hash(ids["sample_id"])
                return index, PairFacts(mark, footer.num_rows, samples), ""
            except UNREADABLE as error:
                return index, None, str(error)

        for index, facts, why in in_threads(read, shards):
            if facts is not None:
                self.facts[index] = facts
            else:
                self.facts.pop(index, None)
                self.faults[index] = why


def read_valid(lake: Lake, teacher: str, identity: Mapping[str, Any]) -> dict[int, ValidShard]:
    """Shard -> where it was found valid; empty if there is no ledger, or none of this producer."""
    ledger = _read_ledger(lake, teacher_ledger(teacher), ValidLedger)
    return ledger.shards if ledger.fingerprint == fingerprint(identity) else {}


def write_valid(
    lake: Lake, teacher: str, identity: Mapping[str, Any], good: Iterable[int], places: dict[int, Place], pairs: Pairs
) -> None:
    """Write a teacher's ledger anew.

    Args:
        lake: The lake.
        teacher: Name of the partition.
        identity: Its producer.
        good: Shards that were checked, or written by this run.
        places: Where they lie.
        pairs: The pairs they were checked against.
    """
    shards = {
        index: ValidShard(*places[index], pairs.marks[index])
        for index in sorted(good)
        if index in places and index in pairs.marks and places[index].mark.version and pairs.marks[index].version
    }
    ledger = ValidLedger(fingerprint=fingerprint(identity), shards=shards)
    _write_ledger(lake, teacher_ledger(teacher), ledger)


def is_current(known: PairFacts | None, mark: FileMark) -> bool:
    """Whether a ledger's entry is of the bytes that are there now."""
    return known is not None and known.mark == mark and bool(mark.version)


def in_threads(step: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
    """Apply a step that mostly waits for storage to many items; results in order, as they come."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        yield from pool.map(step, items)


def _read_ledger(lake: Lake, name: str, kind: type[Any]) -> Any:
    try:
        return kind.model_validate_json(lake.storage.read_bytes(name))
    except (FileNotFoundError, ValidationError):
        return kind()


def _write_ledger(lake: Lake, name: str, ledger: StrictModel) -> None:
    try:
        lake.storage.write_bytes(name, ledger.model_dump_json().encode())
    except StorageError as error:  # whoever may only read can still verify and plan
        logger.debug("%s was not written: %s", name, error)
