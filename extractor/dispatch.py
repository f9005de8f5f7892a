"""Prepared shards to every teacher at once, embeddings to files; whoever dies, each file is written once.

The driver holds references, never pixels: a prepared shard lies in the object store, every teacher reads the same copy,
and a file is encoded and stored by :class:`extractor.writers.Writers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import ray

from common.errors import LakeError, MmkdError, ModelError, StorageError
from common.logs import duration, logger
from extractor.events import EmbedFacts, FileDone
from extractor.pools import PATIENCE_SECONDS, Job, Seat, TeacherPool, last_line
from extractor.writers import Handle, Writers, wait_for_any
from extractor.writing import WriteOrder

MAX_ATTEMPTS = 3
"""A shard that so many processes of a teacher did not survive is that teacher's end."""
FEW_REJECTS = 10
"""So many bad rows never stop a teacher by themselves."""
LONG_SECONDS = 600.0
"""A shard that takes longer is worth a line."""


class Dispatcher:
    """Deals prepared shards to the pools and follows each file until it is stored. For one thread.

    Args:
        pools: The teachers.
        order: Where files go.
        max_reject_fraction: A teacher that rejects more of what it has seen is stopped.
        on_note: Called with a kind and a sentence for what a report should mention.
    """

    def __init__(
        self,
        pools: dict[str, TeacherPool],
        order: WriteOrder,
        max_reject_fraction: float = 0.1,
        on_note: Callable[[str, str], None] = lambda kind, text: None,
    ) -> None:
        self.pools = pools
        self.order = order
        self.max_reject_fraction = max_reject_fraction
        self.on_note = on_note
        self.unfinished: set[tuple[int, str]] = set()
        """(shard, teacher) whose prepared table was lost with its node: to be prepared again."""
        self._open: dict[int, set[str]] = {}
        """Shard -> teachers that have not finished it."""
        self._embedding: dict[Any, tuple[Job, Seat, Any]] = {}
        self._writing: dict[Handle, tuple[Job, EmbedFacts]] = {}
        self._micro_batches: dict[tuple[str, str], int] = {}
        self._kills_noted: set[int] = set()
        self._said = time.monotonic()
        self._writers = Writers()

    @property
    def in_flight(self) -> int:
        """Prepared shards that are held for a teacher that has not finished them."""
        return len(self._open)

    @property
    def failures(self) -> dict[str, str]:
        """Teacher -> why it cannot go on."""
        return {name: pool.failure for name, pool in self.pools.items() if pool.failure is not None}

    def at_work(self) -> dict[str, float]:
        """Teacher -> seconds that its processes have spent on shards that are not done, added up."""
        seconds: dict[str, float] = {}
        for process in {seat.process for pool in self.pools.values() for seat in pool.seats}:
            if (found := process.work.at_work()) is not None:
                seconds[found[0]] = seconds.get(found[0], 0.0) + found[1]
        return seconds

    def submit(self, shard: int, block: Any, teachers: Iterable[str]) -> None:
        """Give a prepared shard (a reference to it) to those of the teachers that can still work."""
        jobs = [Job(shard, name, block) for name in teachers if self.pools[name].failure is None]
        if jobs:
            self._open[shard] = {job.teacher for job in jobs}
        for job in jobs:
            self.pools[job.teacher].queue.append(job)
        self._seat_jobs()

    def poll(self, timeout: float) -> list[FileDone]:
        """Wait for something to happen, at most so many seconds.

        Returns:
            The files that were finished, and one record with ``error`` for each teacher that failed.

        Raises:
            StorageError: A file cannot be stored.
            LeaseError: Another run has taken over.
        """
        loading = {ref: pool for pool in self.pools.values() for ref in pool.waiting}
        if not (loading or self._embedding or self._writing):
            time.sleep(timeout)
            return []
        events: list[FileDone] = []
        for reference in wait_for_any([*loading, *self._embedding], self._writing, timeout):
            if reference in loading:
                self._seated(loading[reference], reference, events)
            elif reference in self._embedding:
                self._embedded(*self._embedding.pop(reference), reference, events)
            elif reference in self._writing:
                self._written(*self._writing.pop(reference), reference, events)
        self._seat_jobs()
        self._say_who_is_missing()
        return events

    def _say_who_is_missing(self) -> None:
        """A line now and then while shards wait for a teacher of which no actor is there, or none that answers."""
        moment = time.monotonic()
        if moment - self._said < PATIENCE_SECONDS:
            return
        self._said = moment
        missing = [pool.name for pool in self.pools.values() if pool.queue and not pool.is_ready()]
        if missing:
            free = ray.available_resources().get("GPU", 0)
            logger.info("extract: waiting for %s to load or to be placed (%g GPUs free)", ", ".join(missing), free)
        for pool in self.pools.values():
            for seat in pool.seats:
                shard, since = next(iter(seat.jobs.items()), (0, moment))
                if moment - since > LONG_SECONDS:
                    logger.warning(
                        "extract: %s has been at shard %d for %s", pool.name, shard, duration(moment - since)
                    )

    def close(self) -> None:
        """End all actors and writers: a file that is nearly written is waited for, no other appears later."""
        if not ray.is_initialized():
            return  # asking Ray for anything would start another
        for pool in self.pools.values():
            pool.close()
        writing, self._writing = list(self._writing), {}
        self._writers.close(writing)

    def _seat_jobs(self) -> None:
        for pool in self.pools.values():
            while pool.queue and (seat := pool.next_seat()) is not None:
                job = pool.queue.popleft()
                facts, features = seat.process.actor.embed.options(num_returns=2).remote(job.teacher, job.block)
                seat.jobs[job.shard] = time.monotonic()
                seat.process.work.begins(job.teacher)
                self._embedding[facts] = (job, seat, features)

    def _seated(self, pool: TeacherPool, reference: Any, events: list[FileDone]) -> None:
        if pool.failure is not None:
            return
        pool.seated(reference)
        if pool.failure is not None:
            self._give_up(pool, events)

    def _embedded(self, job: Job, seat: Seat, features: Any, reference: Any, events: list[FileDone]) -> None:
        seat.process.work.ends(job.teacher)
        pool = self.pools[job.teacher]
        if pool.failure is not None:
            return
        try:
            facts: EmbedFacts = ray.get(reference)
        except ray.exceptions.ObjectLostError:  # the prepared table went with its node
            del seat.jobs[job.shard]
            self.unfinished.add((job.shard, job.teacher))
            self._close_job(job.shard, job.teacher)
            return
        except ray.exceptions.RayTaskError as error:
            if isinstance(error, ModelError):
                pool.fail(last_line(error))
                self._give_up(pool, events)
            else:
                self._again(job, seat, last_line(error), events)
            return
        except ray.exceptions.RayError as error:
            self._again(job, seat, f"its process died ({last_line(error)})", events)
            return
        del seat.jobs[job.shard]
        if facts.shard != job.shard:
            raise LakeError(f"A prepared table of shard {facts.shard} came where shard {job.shard} was expected.")
        self._note_device(pool, facts)
        if facts.decoder_kills and job.shard not in self._kills_noted:
            self._kills_noted.add(job.shard)
            self.on_note("decoder killed", f"{facts.decoder_kills} decoding processes were lost at shard {job.shard}")
        if (reason := self._too_many_rejects(pool, facts)) is not None:
            pool.fail(reason)
            self._give_up(pool, events)
            return
        handle = self._writers.begin(self.order, job.teacher, job.shard, features, facts.rejects)
        self._writing[handle] = (job, facts)

    def _written(self, job: Job, facts: EmbedFacts, handle: Handle, events: list[FileDone]) -> None:
        try:
            size, seconds = self._writers.result(handle)
        except MmkdError:  # storage is gone, or the lake is another run's
            raise
        except FileNotFoundError as error:
            raise StorageError(f"{self.order.lake_uri} is not there any more: {last_line(error)}") from error
        except Exception as error:  # noqa: BLE001 - lost with a machine, or a disk that fails now and then
            self._again(job, None, last_line(error), events)
            return
        self._close_job(job.shard, job.teacher)
        reasons = [reason for _, reason, _ in facts.rejects]
        events.append(
            FileDone(
                job.shard,
                job.teacher,
                rows=facts.rows,
                bytes=size,
                forwards=facts.forwards,
                model_seconds=facts.seconds,
                write_seconds=seconds,
                prepare_seconds=facts.prepare_seconds,
                micro_batch=facts.micro_batch,
                device=facts.device,
                started_at=facts.started_at,
                finished_at=time.time(),
                rejects={reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
            )
        )

    def _again(self, job: Job, seat: Seat | None, why: str, events: list[FileDone]) -> None:
        """Another process takes the shard, unless too many have failed on it."""
        pool = self.pools[job.teacher]
        if pool.failure is not None:
            self._close_job(job.shard, job.teacher)
            return
        if seat is not None and seat in pool.seats:
            pool.lost(seat)
            self.on_note("restart", f"a process of teacher {job.teacher} was replaced at shard {job.shard}: {why}")
        if pool.failure is not None:
            self._give_up(pool, events)
            return
        # A shard that only waited in a process that died is not to blame for it.
        attempts = job.attempts + (seat is None or seat.died_at == job.shard)
        if attempts >= MAX_ATTEMPTS:
            pool.fail(f"shard {job.shard} failed {MAX_ATTEMPTS} times, the last time with: {why}")
            self._give_up(pool, events)
            return
        logger.info("extract: shard %d goes to another process of %s: %s", job.shard, job.teacher, why)
        pool.queue.appendleft(replace(job, attempts=attempts))

    def _give_up(self, pool: TeacherPool, events: list[FileDone]) -> None:
        """Forget a failed teacher's work; what the others hold stays."""
        lost = [key for key, (job, _, _) in self._embedding.items() if job.teacher == pool.name]
        for key in lost:
            del self._embedding[key]
        # What is being written is whole; it may finish.
        kept = {job.shard for job, _ in self._writing.values() if job.teacher == pool.name}
        for shard in set(self._open) - kept:
            self._close_job(shard, pool.name)
        events.append(FileDone(-1, pool.name, error=pool.failure, finished_at=time.time()))

    def _close_job(self, shard: int, teacher: str) -> None:
        """Let go of the prepared table when the last of its teachers is done with it."""
        self._open[shard].discard(teacher)
        if not self._open[shard]:
            del self._open[shard]

    def _note_device(self, pool: TeacherPool, facts: EmbedFacts) -> None:
        """What a user would want to know of an actor: that its GPU is of no use, or too small."""
        teacher = pool.name
        here = (teacher, facts.device)  # several teachers may share a process
        if pool.gpus and "/cpu/" in facts.device and here not in self._micro_batches:
            text = f"{teacher} at {facts.device} holds a GPU but torch finds no CUDA there; it runs on the CPU"
            logger.warning("extract: %s", text)
            self.on_note("GPU not used", text)
        before = self._micro_batches.get(here, pool.micro_batch)
        self._micro_batches[here] = facts.micro_batch
        if facts.micro_batch < before:
            self.on_note(
                "out of memory",
                f"{teacher} at {facts.device}: the GPU ran out of memory; its micro-batch went from {before} to "
                f"{facts.micro_batch}",
            )

    def _too_many_rejects(self, pool: TeacherPool, facts: EmbedFacts) -> str | None:
        """Count a shard's rejects; why the teacher must stop, if it must."""
        bad = len({sample_id for sample_id, _, _ in facts.rejects})
        pool.rows += facts.rows
        pool.rejected += bad
        pool.reasons.update(reason for _, reason, _ in facts.rejects)
        # A few bad rows of a small lake are still only bad rows, unless there is nothing else.
        if pool.rejected <= max(self.max_reject_fraction * pool.rows, min(FEW_REJECTS, max(pool.rows - 1, 1))):
            return None
        top = ", ".join(f"{rows} x {reason}" for reason, rows in pool.reasons.most_common(3))
        return f"{pool.rejected} of {pool.rows} rows were rejected ({top})"
