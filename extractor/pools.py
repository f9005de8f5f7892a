"""Each teacher's actors: started on GPUs of their own, given work one shard at a time, replaced when they die."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from common.errors import ModelError, root_cause
from common.logs import logger
from extractor.placement import TeacherPlacement, ray_options
from extractor.teachers import Embedded

PATIENCE_SECONDS = 30
"""Between two lines that say what is being waited for."""
QUEUE = 2
"""Shards an actor may hold: one at work, one that is there when it is done."""
SEAT_SECONDS = 30
"""So long may a teacher take to be placed before the next is asked for; after that the rest is asked for at once."""
MAX_FAILED_STARTS = 3
"""So often in a row may an actor's process die while it loads; its place is given up then."""


@dataclass(frozen=True)
class Job:
    """One prepared shard for one teacher."""

    shard: int
    teacher: str
    block: Any
    """Reference of the prepared table."""
    attempts: int = 0


class TeacherProcess:
    """What runs in an actor's process: it is there before it loads a model, so that its GPUs are known early.

    One process may hold several teachers; they take turns, shard by shard.
    """

    def __init__(self) -> None:
        self._teachers: dict[str, Any] = {}

    def gpus(self) -> list[str]:
        """Numbers on its machine (or the ids, where it names them so) of the GPUs that Ray gave to the process."""
        return [str(number) for number in ray.get_gpu_ids()]

    def load(self, name: str, kind: type, arguments: tuple[Any, ...]) -> float | None:
        """Load a model; its logit scale, or None for an image encoder.

        Args:
            name: Of the teacher.
            kind: Of the teacher, with ``describe_scale`` and ``embed``; such as
                :class:`extractor.teachers.Teacher`.
            arguments: Of its constructor.
        """
        self._teachers[name] = kind(*arguments)
        return self._teachers[name].describe_scale()

    def embed(self, name: str, prepared: pa.Table) -> Embedded:
        """One prepared shard through a teacher."""
        return self._teachers[name].embed(prepared)

    def unload(self, name: str) -> None:
        """Forget a teacher that is at work elsewhere, or nowhere."""
        self._teachers.pop(name, None)


class WorkQueue:
    """The teachers whose shards a process was given, oldest first; it works on one after the other."""

    def __init__(self) -> None:
        self._names: deque[str] = deque()
        self._since = 0.0

    def begins(self, name: str) -> None:
        """A shard was given to it for a teacher."""
        if not self._names:
            self._since = time.monotonic()
        self._names.append(name)

    def ends(self, name: str) -> None:
        """A teacher's oldest shard is done, or lost."""
        if name in self._names:
            self._names.remove(name)
            self._since = time.monotonic()

    def at_work(self) -> tuple[str, float] | None:
        """The teacher whose shard it is at, and for how many seconds."""
        return (self._names[0], time.monotonic() - self._since) if self._names else None


class Process:
    """The driver's end of a process: who uses it, and its end when nobody does.

    Args:
        title: By which ``ray status`` and the dashboard know it.
        placement: What it holds.
    """

    def __init__(self, title: str, placement: TeacherPlacement) -> None:
        # A class of its own name, so that they tell the teachers apart. Ray's own restarts are off: what died is seen
        # and counted here, and its shard goes to whoever is free.
        remote: Any = ray.remote(type(title, (TeacherProcess,), {}))
        self.actor = remote.options(**ray_options(placement), max_restarts=0, max_task_retries=0).remote()
        self.placed = self.actor.gpus.remote()
        """Reference that is ready when the process is there, with the numbers of its GPUs."""
        self._users: set[str] = set()
        self.work = WorkQueue()

    def load(self, name: str, kind: type, arguments: tuple[Any, ...]) -> Any:
        """Reference that is ready when a teacher's weights are loaded; the process stays until they all left."""
        self._users.add(name)
        return self.actor.load.remote(name, kind, arguments)

    def leave(self, name: str) -> None:
        """A teacher uses the process no more."""
        self._users.discard(name)
        if self._users:
            self.actor.unload.remote(name)
        else:
            ray.kill(self.actor)


@dataclass
class Seat:
    """One actor's place: a process that is loading, at work, or being replaced."""

    process: Process
    loading: Any
    """Reference that is ready when the weights are; None from then on."""
    is_shared: bool = False
    jobs: dict[int, float] = field(default_factory=dict)
    """Shard -> when it was given, oldest first: that one is at work."""
    failed_starts: int = 0
    died_at: int | None = None
    """The shard at work when the process died; None where it may have been another teacher's."""

    @property
    def placed(self) -> Any:
        """Reference that is ready when the process is there, with the numbers of its GPUs."""
        return self.process.placed


class TeacherPool:
    """The actors of one teacher and the shards that wait for them. For one thread.

    Args:
        name: Of the teacher.
        kind: Of the teacher; see :class:`TeacherProcess`.
        arguments: Of its constructor.
        placement: How many actors, and what each holds.
        shared: Processes that it shares with other teachers, one for each actor; none: processes of its own. What
            takes the place of a shared process that died is the teacher's own, so that a teacher that ends processes
            takes the others with it once at most.
        alone: Arguments of its constructor in such a process of its own; by default the same.
    """

    def __init__(
        self,
        name: str,
        kind: type,
        arguments: tuple[Any, ...],
        placement: TeacherPlacement,
        shared: Sequence[Process] = (),
        alone: tuple[Any, ...] | None = None,
    ) -> None:
        self.name = name
        self._placement = placement
        self._kind = kind
        self._alone = arguments if alone is None else alone
        self.micro_batch: int = arguments[2]
        self.gpus = placement.gpus or 0.0
        """Of each actor."""
        processes = shared or [self._own_process() for _ in range(placement.actors or 1)]
        self.seats = [self._start(process, arguments, bool(shared)) for process in processes]
        self.queue: deque[Job] = deque()
        self.failure: str | None = None
        """Why the teacher cannot go on; its work is dropped then."""
        self.was_ready = False
        """Whether an actor has ever loaded its weights."""
        self.logit_scale: float | None = None
        """Of the model; known once an actor is there."""
        self.restarts = 0
        self.rows = 0
        self.rejected = 0
        self.reasons: Counter[str] = Counter()

    def _own_process(self) -> Process:
        return Process(f"Teacher_{self.name}", self._placement)

    def _start(self, process: Process, arguments: tuple[Any, ...], is_shared: bool = False) -> Seat:
        return Seat(process, process.load(self.name, self._kind, arguments), is_shared)

    @property
    def waiting(self) -> list[Any]:
        """References of the seats that are loading."""
        return [seat.loading for seat in self.seats if seat.loading is not None]

    def is_ready(self) -> bool:
        """Whether at least one actor has loaded its weights."""
        return any(seat.loading is None for seat in self.seats)

    def seated(self, loading: Any) -> None:
        """A loading reference has an answer: the actor is there, or it did not start.

        A model that does not load would not load in another process either, and ends the teacher. Anything else (a GPU
        whose memory is not free yet, a machine that went) is tried again a few times.
        """
        seat = next((seat for seat in self.seats if seat.loading == loading), None)
        if seat is None:
            return  # the teacher was given up meanwhile
        try:
            self.logit_scale = ray.get(loading)
        except ray.exceptions.RayError as error:
            if root_cause(error) is not None:
                self.fail(f"it did not load: {last_line(error)}")
            else:
                self._replace(seat, seat.failed_starts + 1, last_line(error))
        else:
            seat.loading, seat.failed_starts, self.was_ready = None, 0, True

    def lost(self, seat: Seat) -> None:
        """An actor's process has died or is of no more use; another takes its place."""
        if seat not in self.seats:
            return  # noticed before, by another of its shards
        seat.died_at = None if seat.is_shared else next(iter(seat.jobs), None)
        self._replace(seat, 0, "it died at work")

    def _replace(self, seat: Seat, failed_starts: int, why: str) -> None:
        self.restarts += 1
        seat.process.leave(self.name)
        self.seats.remove(seat)
        if failed_starts < MAX_FAILED_STARTS:
            logger.warning("extract: another process of teacher %s is being started: %s", self.name, why)
            fresh = self._start(self._own_process(), self._alone)
            fresh.failed_starts = failed_starts
            self.seats.append(fresh)
        elif not self.seats:
            self.fail(f"its process did not start {failed_starts} times in a row, the last time with: {why}")

    def fail(self, reason: str) -> None:
        """Give the teacher up; the others go on."""
        self.failure = reason
        self.queue.clear()
        self.close()

    def next_seat(self) -> Seat | None:
        """The least busy actor with room for a shard."""
        free = [seat for seat in self.seats if seat.loading is None and len(seat.jobs) < QUEUE]
        return min(free, key=lambda seat: len(seat.jobs), default=None)

    def close(self) -> None:
        """End the actors."""
        for seat in self.seats:
            seat.process.leave(self.name)
        self.seats = []


def start_pools(
    placements: Mapping[str, TeacherPlacement],
    kind: type,
    arguments: Mapping[str, tuple[Any, ...]],
    stopped: Callable[[], object] = lambda: False,
    share: bool = False,
    alone: Mapping[str, tuple[Any, ...]] | None = None,
) -> dict[str, TeacherPool]:
    """Start every teacher's actors, in the order of ``placements``.

    Ray puts a share of a GPU on the fullest one with room, so who sits beside whom depends on who comes first, and of
    requests made at once Ray may serve a later one first. Where there are several GPUs to share, each teacher is
    therefore placed before the next is asked for; models load meanwhile.

    Args:
        placements: See :func:`extractor.placement.place`.
        kind: Of the teachers; see :class:`TeacherProcess`.
        arguments: Teacher -> arguments of its constructor.
        stopped: Whether to wait no more.
        share: Whether teachers without a GPU that are placed alike are held by the same processes.
        alone: Like ``arguments``, for a process that takes the place of a shared one; by default the same.
    """
    together = _shared_processes(placements, share)
    shares = any(0 < (one.gpus or 0) < 1 for one in placements.values())
    in_turn = shares and ray.cluster_resources().get("GPU", 0) > 1
    pools: dict[str, TeacherPool] = {}
    for name, placement in placements.items():
        pools[name] = TeacherPool(
            name, kind, arguments[name], placement, together.get(name, ()), (alone or arguments)[name]
        )
        if in_turn and placement.gpus and not (in_turn := _placed(pools[name], stopped)) and not stopped():
            logger.warning(
                "extract: teacher %s has no place after %d s; the other teachers are asked for at once, and may share "
                "GPUs in another way than planned",
                name,
                SEAT_SECONDS,
            )
    return pools


def group_teachers(placements: Mapping[str, TeacherPlacement], share: bool) -> list[list[str]]:
    """Teachers that are held by the same processes: alone, or with those that have no GPU and are placed alike."""
    if not share:
        return [[name] for name in placements]
    groups: dict[str, list[str]] = {}
    for name, placement in placements.items():
        alike = name if placement.gpus else repr((placement.actors, ray_options(placement)))
        groups.setdefault(alike, []).append(name)
    return list(groups.values())


def _shared_processes(placements: Mapping[str, TeacherPlacement], share: bool) -> dict[str, list[Process]]:
    """Teacher -> the processes that it shares; only those that have somebody to share with."""
    found: dict[str, list[Process]] = {}
    for names in group_teachers(placements, share):
        if len(names) > 1:
            placement = placements[names[0]]
            title = f"Teachers_{'_'.join(names)}"
            found |= dict.fromkeys(names, [Process(title, placement) for _ in range(placement.actors or 1)])
    return found


def _placed(pool: TeacherPool, stopped: Callable[[], object]) -> bool:
    """Wait until the processes of a teacher are there; False if they take too long."""
    missing, deadline = [seat.placed for seat in pool.seats], time.monotonic() + SEAT_SECONDS
    while missing and not stopped() and time.monotonic() < deadline:
        _, missing = ray.wait(missing, num_returns=len(missing), timeout=0.5)
    return not missing


def wait_until_seated(pools: dict[str, TeacherPool], stopped: Callable[[], object]) -> None:
    """Wait until every teacher has an actor with its weights loaded, and say so when it takes long.

    Raises:
        ModelError: A teacher does not start; better now than after hours without it.
    """
    said = time.monotonic()
    while not stopped():
        for pool in pools.values():
            if pool.failure is not None and not pool.was_ready:
                raise ModelError(f"Teacher {pool.name!r} did not start: {pool.failure}")
        # One that failed after it was there is not waited for: the others do what they can.
        missing = [pool for pool in pools.values() if pool.failure is None and not pool.is_ready()]
        if not missing:
            return
        ready, _ = ray.wait([ref for pool in missing for ref in pool.waiting], timeout=0.5)
        for pool in missing:
            for loading in set(pool.waiting) & set(ready):
                pool.seated(loading)
        if time.monotonic() - said > PATIENCE_SECONDS:
            said = time.monotonic()
            free = ray.available_resources().get("GPU", 0)
            names = ", ".join(pool.name for pool in missing)
            logger.info("extract: waiting for %s to load or to be placed (%g GPUs free)", names, free)


def last_line(error: BaseException) -> str:
    """What actually went wrong: this project's own words if they are, else the last line of a remote traceback."""
    if (ours := root_cause(error)) is not None:
        return str(ours)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
