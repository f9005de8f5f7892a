"""What the fan-out says of each file a teacher finished or failed: the record behind display, report and metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class FileDone:
    """One shard through one teacher.

    Attributes:
        shard: Index of the shard.
        teacher: Name of the teacher's partition.
        rows: Rows of the file; 0 where ``error`` is set.
        bytes: Size of the file.
        forwards: Micro-batches that went through a tower.
        model_seconds: Time the teacher's actor spent embedding.
        write_seconds: Time spent encoding and storing the file.
        prepare_seconds: CPU time spent reading, decoding and tokenising the shard, the same for each of its teachers.
        micro_batch: Rows per forward pass; smaller than asked for after the GPU ran out of memory.
        device: Where the teacher runs: node, device and process, such as ``10.0.0.7/cuda:2/4711``.
        started_at: When the shard reached the teacher, in seconds since 1970.
        finished_at: When its file was whole, likewise.
        rejects: Reason -> rows without a vector.
        error: Why the teacher cannot go on; None if the file was written.
    """

    shard: int
    teacher: str
    rows: int = 0
    bytes: int = 0
    forwards: int = 0
    model_seconds: float = 0.0
    write_seconds: float = 0.0
    prepare_seconds: float = 0.0
    micro_batch: int = 0
    device: str = ""
    started_at: float = 0.0
    finished_at: float = 0.0
    rejects: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    def to_row(self) -> dict[str, Any]:
        """A row for an Arrow table: rejects as a list of reason and count."""
        return {**asdict(self), "rejects": [{"reason": name, "rows": rows} for name, rows in self.rejects.items()]}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> FileDone:
        """The inverse of :meth:`to_row`."""
        return cls(**{**row, "rejects": {item["reason"]: item["rows"] for item in row["rejects"] or ()}})


@dataclass
class EmbedFacts:
    """How one shard went through one teacher; small, so that it travels apart from the vectors."""

    shard: int
    rows: int
    rejects: list[tuple[str, str, str]] = field(default_factory=list)
    """(sample id, reason, detail) of each row that has a null where a vector should be."""
    seconds: float = 0.0
    started_at: float = 0.0
    """Seconds since 1970."""
    prepare_seconds: float = 0.0
    forwards: int = 0
    """Micro-batches that went through a tower."""
    micro_batch: int = 0
    """Rows per forward pass; smaller than asked for after the GPU ran out of memory."""
    device: str = ""
    """Node, device and process."""
    decoder_kills: int = 0
    """Decoding processes that were lost while the shard was prepared."""


@dataclass
class ExtractReport:
    """What a run of extract did."""

    shards: int = 0
    """Files written: shards times teachers."""
    rows: int = 0
    skipped: int = 0
    """Files that were there and valid."""
    rejects: Counter[str] = field(default_factory=Counter)
    forwards: Counter[str] = field(default_factory=Counter)
    """Teacher -> micro-batches that went through a tower."""
    bytes: int = 0
    seconds: float = 0.0
    run: str = ""
    """Name of the run's folder under ``runs/``; empty if there was nothing to do."""

    def add(self, event: FileDone) -> None:
        """Count a finished file."""
        self.shards += 1
        self.rows += event.rows
        self.bytes += event.bytes
        self.forwards[event.teacher] += event.forwards
        self.rejects.update(event.rejects)
