"""What the finished files of a run add up to: by teacher, by device, by stage and over time. Only counting, no output.

The stages of a run are ``prepare`` (CPU), one ``teacher=NAME`` for each teacher, and ``write``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from extractor.events import FileDone

PREPARE, WRITE = "prepare", "write"
RECENT_SECONDS = 60.0
RECENT_FILES = 4
MAX_BINS = 360


def teacher_stage(teacher: str) -> str:
    """Name of a teacher's stage, as its folder in the lake is called."""
    return f"teacher={teacher}"


class RecentRate:
    """Rows per second over the last minute, or over the last few files where a file takes longer than that."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.seen: deque[tuple[float, int]] = deque()

    def add(self, at: float, rows: int) -> None:
        """Count rows that arrived at a time."""
        self.seen.append((at, rows))

    def at(self, now: float) -> float | None:
        """The rate at a time not before the last arrival; None before the first. It falls while nothing arrives."""
        while len(self.seen) > RECENT_FILES and self.seen[0][0] < now - RECENT_SECONDS:
            self.seen.popleft()
        if not self.seen:
            return None
        # The rows of the first file were computed before it arrived: it only says since when the others count.
        begin = self.seen[0][0]
        later = sum(rows for _, rows in self.seen) - self.seen[0][1]
        if len(self.seen) > 1 and now > begin and later:
            return later / (now - begin)
        total = later + self.seen[0][1]
        return total / (now - self.started) if now > self.started else None


class Timeline:
    """Rows by teacher in equal spans of time; the spans double whenever there would be more than ``MAX_BINS``."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self.bins: dict[int, Counter[str]] = {}

    def add(self, at: float, teacher: str, rows: int) -> None:
        """Count rows that were done ``at`` seconds after the start."""
        while at / self.seconds >= MAX_BINS:
            self.seconds *= 2
            halved: dict[int, Counter[str]] = {}
            for place, counts in self.bins.items():
                halved.setdefault(place // 2, Counter()).update(counts)
            self.bins = halved
        self.bins.setdefault(int(at / self.seconds), Counter())[teacher] += rows

    def series(self, teacher: str) -> list[int]:
        """Rows of a teacher in each span, up to the last in which any teacher finished a file."""
        return [self.bins.get(place, Counter())[teacher] for place in range(max(self.bins, default=-1) + 1)]


@dataclass
class TeacherTally:
    """What one teacher has done of what was planned."""

    files_planned: int
    rows_planned: int
    recent: RecentRate
    shards: set[int] = field(default_factory=set)
    failed: int = 0
    rows: int = 0
    worked_rows: int = 0
    """With those of files that were made twice."""
    bytes: int = 0
    forwards: int = 0
    model_seconds: float = 0.0
    write_seconds: float = 0.0
    smallest_micro_batch: int | None = None
    rejects: Counter[str] = field(default_factory=Counter)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Process of the teacher (as events name devices) -> when it was first and last heard of."""

    def workers(self) -> int | None:
        """The most processes that were there at once, so that one that replaced a dead one is not counted twice."""
        starts = [first for first, _ in self.spans.values()]
        return max((sum(a <= at <= b for a, b in self.spans.values()) for at in starts), default=None)


@dataclass
class DeviceTally:
    """What one device (a GPU, or the CPU of a node) has done."""

    teachers: set[str] = field(default_factory=set)
    files: int = 0
    rows: int = 0
    busy_seconds: float = 0.0


@dataclass(frozen=True)
class StageFigures:
    """One stage, measured; what is not known is None.

    Attributes:
        name: ``prepare``, ``teacher=NAME`` or ``write``.
        rows: That went through it.
        rows_planned: To go through it in this run.
        files: Files of a teacher so far.
        files_planned: Likewise, in this run.
        busy_seconds: Time its workers spent on them, added up.
        workers: How many it has.
        busy_share: busy_seconds / (wall time x workers).
        rows_per_second: Over the whole run.
        recent_rows_per_second: Over the last minute.
        rows_per_worker_second: Of one worker while it is busy.
        capacity: Rows per second of all its workers, were they always busy.
        expected: What the plan said of the capacity.
        seconds_left: From the recent rate.
    """

    name: str
    rows: int
    rows_planned: int | None = None
    files: int | None = None
    files_planned: int | None = None
    busy_seconds: float | None = None
    workers: int | None = None
    busy_share: float | None = None
    rows_per_second: float | None = None
    recent_rows_per_second: float | None = None
    rows_per_worker_second: float | None = None
    capacity: float | None = None
    expected: float | None = None
    seconds_left: float | None = None


class Tally:
    """Adds up the events of a run; a file that arrives twice adds work but no rows.

    Args:
        started: When the run began, in seconds since 1970.
        planned: Teacher -> files to do.
        rows: Teacher -> rows to do.
        workers: ``prepare``, ``write`` or a teacher -> processes, where the run knows; a teacher's are counted from
            the events otherwise.
        expected: ``prepare`` or a teacher -> rows per second that the plan expects of all its workers.
    """

    def __init__(
        self,
        started: float,
        planned: Mapping[str, int],
        rows: Mapping[str, int],
        workers: Mapping[str, int],
        expected: Mapping[str, float],
    ) -> None:
        self.started, self.known_workers, self.expected = started, workers, expected
        self.teachers = {name: TeacherTally(planned[name], rows[name], RecentRate(started)) for name in sorted(planned)}
        self.devices: dict[str, DeviceTally] = {}
        self.prepared: dict[tuple[int, float], int] = {}
        """(shard, seconds of its preparation) -> rows: a shard that was prepared again is there twice."""
        self.prepare_recent = RecentRate(started)
        self.timeline = Timeline()
        self.first_file_seconds: float | None = None

    def add(self, event: FileDone, now: float) -> bool:
        """Count an event that arrived at a time; whether it is a file that was not there before."""
        teacher = self.teachers[event.teacher]
        if event.error is not None:
            teacher.failed += 1
            return False
        self._add_work(teacher, event, now)
        if event.shard in teacher.shards:
            return False
        if self.first_file_seconds is None:
            self.first_file_seconds = now - self.started
        teacher.shards.add(event.shard)
        teacher.rows += event.rows
        teacher.bytes += event.bytes
        teacher.rejects.update(event.rejects)
        teacher.recent.add(now, event.rows)
        device = self.devices.setdefault(device_of(event.device), DeviceTally())
        device.files += 1
        device.rows += event.rows
        # Another machine's clock may be a little off; no file was done before the run began or after now.
        self.timeline.add(min(max(event.finished_at, self.started), now) - self.started, event.teacher, event.rows)
        return True

    def _add_work(self, teacher: TeacherTally, event: FileDone, now: float) -> None:
        teacher.worked_rows += event.rows
        teacher.forwards += event.forwards
        teacher.model_seconds += event.model_seconds
        teacher.write_seconds += event.write_seconds
        if event.micro_batch:
            teacher.smallest_micro_batch = min(event.micro_batch, teacher.smallest_micro_batch or event.micro_batch)
        first, last = teacher.spans.get(event.device, (event.started_at, event.finished_at))
        teacher.spans[event.device] = (min(first, event.started_at), max(last, event.finished_at))
        device = self.devices.setdefault(device_of(event.device), DeviceTally())
        device.teachers.add(event.teacher)
        device.busy_seconds += event.model_seconds
        if (event.shard, event.prepare_seconds) not in self.prepared:
            self.prepared[event.shard, event.prepare_seconds] = event.rows
            self.prepare_recent.add(now, event.rows)

    def rejects(self) -> Counter[str]:
        """Reason -> rows without a vector, over all teachers."""
        return sum((teacher.rejects for teacher in self.teachers.values()), Counter())

    def stages(self, now: float, at_work: Mapping[str, float] | None = None) -> list[StageFigures]:
        """All stages in the order of the flow, measured up to a time.

        Args:
            now: The time.
            at_work: Teacher -> seconds already spent on shards that are not done. A slow teacher's first shard may take
                minutes; without it that teacher would count as idle so long.
        """
        under_way = at_work or {}
        everyone = self.teachers.values()
        distinct = {shard: rows for (shard, _), rows in self.prepared.items()}
        prepared = _Work(
            rows=sum(distinct.values()),
            worked_rows=sum(self.prepared.values()),
            busy_seconds=sum(seconds for _, seconds in self.prepared),
            recent=self.prepare_recent,
        )
        written = _Work(
            rows=sum(one.rows for one in everyone),
            worked_rows=sum(one.worked_rows for one in everyone),
            busy_seconds=sum(one.write_seconds for one in everyone),
        )
        embedded = []
        for name, one in self.teachers.items():
            work = _Work(one.rows, one.worked_rows, one.model_seconds, one.recent, under_way.get(name, 0.0))
            embedded.append(self._stage(name, now, work, one))
        return [self._stage(PREPARE, now, prepared), *embedded, self._stage(WRITE, now, written)]

    def _stage(self, name: str, now: float, work: _Work, teacher: TeacherTally | None = None) -> StageFigures:
        wall = max(now - self.started, 1e-9)
        workers = self.known_workers.get(name) or (teacher.workers() if teacher else None)
        workers = workers or (1 if work.under_way else None)
        busy = work.busy_seconds or None
        with_present = work.busy_seconds + work.under_way
        of_one = work.worked_rows / busy if busy else None
        recent = work.recent.at(now) if work.recent else None
        left = max(0, teacher.rows_planned - work.rows) if teacher else None
        return StageFigures(
            name=teacher_stage(name) if teacher else name,
            rows=work.rows,
            rows_planned=teacher.rows_planned if teacher else None,
            files=len(teacher.shards) if teacher else None,
            files_planned=teacher.files_planned if teacher else None,
            busy_seconds=busy,
            workers=workers,
            busy_share=with_present / (wall * workers) if with_present and workers else None,
            rows_per_second=work.rows / wall if work.rows else None,
            recent_rows_per_second=recent,
            rows_per_worker_second=of_one,
            capacity=of_one * workers if of_one and workers else None,
            expected=self.expected.get(name),
            seconds_left=0.0 if left == 0 else left / recent if left and recent else None,
        )


class _Work(NamedTuple):
    """Rows of a stage, those it worked on with repetitions included, and the time that took."""

    rows: int
    worked_rows: int
    busy_seconds: float
    recent: RecentRate | None = None
    under_way: float = 0.0
    """Seconds spent on what is not done."""


def bottleneck(stages: list[StageFigures]) -> str | None:
    """The stage whose workers are busy for the largest share of the time; None while no share is known."""
    known = [(stage.busy_share, stage.name) for stage in stages if stage.busy_share is not None]
    return max(known)[1] if known else None


def device_of(place: str) -> str:
    """Node and device of an event's place, without its process."""
    return place.rsplit("/", 1)[0] if place.count("/") >= 2 else place
