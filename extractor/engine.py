"""One run of extract at work: teachers seated, shards dealt out as they come, the account kept whatever happens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from common.errors import ClusterError, LeaseError, MmkdError, ModelError, StoppedError, root_cause
from common.lake import Lake
from common.lease import Leases
from common.logs import duration, logger
from common.processes import usable_cores
from common.stopping import StopSignals
from common.teachers_table import refresh_teachers
from extractor.account.display import Display
from extractor.account.metrics import Metrics
from extractor.account.report import FAILED, FINISHED, RUNNING, STOPPED, RunReport
from extractor.config import ExtractConfig
from extractor.dispatch import Dispatcher
from extractor.events import ExtractReport, FileDone
from extractor.partitions import (
    Todo,
    record_teacher,
)
from extractor.placement import TeacherPlacement, place, read_cluster
from extractor.planning.plan import make_plan
from extractor.planning.survey import Survey
from extractor.pools import QUEUE, TeacherPool, group_teachers, start_pools, wait_until_seated
from extractor.prepare import Prepare, TeacherInput
from extractor.sink import record_valid
from extractor.stream import Feeder, PreparedShards
from extractor.teachers import CoreShare, Teacher
from extractor.tending.ledger import Pairs
from extractor.writing import WriteOrder

POLL_SECONDS = 0.05
CALM_SECONDS = 0.25
"""Likewise while no further shard is wanted: what happens to those that are at work ends the wait anyway."""
ROOMY_CORES = 4
"""With so many cores for each teacher a process of its own pays; with fewer, memory is short as a rule, too."""
MAX_ROUNDS = 3
"""So often in a row may shards be lost with their machines before the run gives up."""


@dataclass
class Engine:
    """One run's teachers, stream and account."""

    lake: Lake
    config: ExtractConfig
    inputs: dict[str, TeacherInput]
    identities: dict[str, dict[str, Any]]
    pairs: Pairs
    leases: Leases
    stop: StopSignals
    kind: type = Teacher

    def work(self, todo: Todo, report: ExtractReport, accepted: Mapping[str, str]) -> None:
        """Compute what is missing, write the account whatever happens, and end in the error that stopped it, if any."""
        started = time.monotonic()
        placements, expected = self._place(todo, self.pairs.rows)
        account = self._account(report, todo, self.pairs.rows, placements, expected)
        dispatcher = Dispatcher(
            {},
            WriteOrder(self.lake.uri, {}, {lease.name: lease for lease in self.leases.leases}),
            self.config.max_reject_fraction,
            account.note,
        )
        account.at_work = dispatcher.at_work
        written: dict[str, dict[int, int]] = {}
        status, message = FAILED, ""
        try:
            account.save(RUNNING)  # a kill in the next seconds leaves a report too
            with Display(account) as display:
                dispatcher.pools.update(self._start(placements))
                for event in self._rounds(todo, dispatcher, account, accepted, display.show):
                    account.add(event)
                    if event.error is None:
                        report.add(event)
                        written.setdefault(event.teacher, {})[event.shard] = event.bytes
            status = FINISHED
            if dispatcher.failures:
                raise ModelError(_failures_text(dispatcher.failures))
        except StoppedError as error:
            status, message = STOPPED, str(error)
            raise
        except (MmkdError, ray.exceptions.RayError, KeyboardInterrupt) as error:
            # Ray's wrapper of a sentence of ours is a traceback with colours, and this becomes a headline.
            status, message = FAILED, str(root_cause(error) or error)
            raise
        finally:
            dispatcher.close()
            report.seconds = time.monotonic() - started
            self._remember(written)
            if dispatcher.order.manifests:
                self._refresh_teachers()
            account.save(status, message)
            self._say(report)

    def _rounds(
        self,
        todo: Todo,
        dispatcher: Dispatcher,
        account: RunReport,
        accepted: Mapping[str, str],
        show: Callable[[], None],
    ) -> Iterator[FileDone]:
        """Everything once; then what was lost with a machine, again."""
        lost_in_a_row = 0
        while todo:
            finished = 0
            for event in self._stream(todo, dispatcher, accepted, show):
                finished += event.error is None
                yield event
            todo = _as_todo(dispatcher.unfinished)
            dispatcher.unfinished = set()
            lost_in_a_row = 0 if finished else lost_in_a_row + 1
            if todo and lost_in_a_row >= MAX_ROUNDS:
                raise ClusterError(
                    f"Shards {sorted(todo)[:5]} were lost with their machines {MAX_ROUNDS} times in a row. Look at "
                    "what ends the machines (memory, preemption), then run the same command again to go on."
                )
            if todo:
                account.note("prepared again", f"{len(todo)} shards were lost with a machine and are prepared again")

    def _stream(
        self, todo: Todo, dispatcher: Dispatcher, accepted: Mapping[str, str], show: Callable[[], None]
    ) -> Iterator[FileDone]:
        """Prepared shards to the teachers, as many at once as may be in memory; events as they come."""
        config = self.config
        prepare = Prepare(self.lake.uri, self.inputs, todo, config.views, config.decode, config.limits)
        most = max(len(pool.seats) for pool in dispatcher.pools.values())
        room = config.hardware.shards_in_flight or QUEUE * most
        # The first shards are prepared while the teachers load.
        tasks = config.hardware.prepare_tasks or _spare_cpus()
        prepared = PreparedShards(prepare, tasks)
        prepared.allow(room + tasks)
        feeder = Feeder(prepared, on_stop=prepared.close)
        try:
            wait_until_seated(dispatcher.pools, lambda: self.stop.asked)
            self._record_teachers(dispatcher, accepted)
            taken, failed, last = 0, -1, len(todo)
            while dispatcher.in_flight or not (feeder.is_done or taken > last):
                if len(dispatcher.failures) != failed:
                    failed = len(dispatcher.failures)
                    last = _last_wanted(todo, dispatcher.failures)
                if self.leases.lost:
                    raise LeaseError(
                        f"{self.lake.uri}: the lease was lost: another run took over, or the storage was out of reach "
                        f"for {config.lease_seconds:g} s. What was finished is kept; run the same command again."
                    )
                if self.stop.asked:
                    yield from self._wind_up(dispatcher)
                while dispatcher.in_flight < room and (item := feeder.next()) is not None:
                    shard, block = item
                    taken += 1
                    dispatcher.submit(shard, block, todo[shard])
                yield from dispatcher.poll(POLL_SECONDS if dispatcher.in_flight < room else CALM_SECONDS)
                # Every task has one at hand beside those that the teachers hold; more would only take memory.
                prepared.allow(taken - dispatcher.in_flight + room + tasks)
                show()
        finally:
            feeder.stop()

    def _record_teachers(self, dispatcher: Dispatcher, accepted: Mapping[str, str]) -> None:
        for name, pool in dispatcher.pools.items():
            if pool.is_ready():
                teacher = self.inputs[name]
                accepted_at = accepted.get(teacher.spec.name)
                identity, catalog = self.identities[name], self.config.catalog
                manifest = record_teacher(self.lake, teacher, identity, pool.logit_scale, accepted_at, catalog)
                dispatcher.order.manifests[name] = manifest
        refresh_teachers(self.lake, dispatcher.order.manifests)

    def _wind_up(self, dispatcher: Dispatcher) -> Iterator[FileDone]:
        """Let files at work be finished for a moment, then stop.

        Raises:
            StoppedError: Always.
        """
        deadline = time.monotonic() + self.config.grace_seconds
        while dispatcher.in_flight and time.monotonic() < deadline:
            yield from dispatcher.poll(POLL_SECONDS)
        raise StoppedError(
            f"{self.stop.asked} came: the run stopped with {dispatcher.in_flight} shards abandoned. Every file in the "
            "lake is whole; run the same command again to go on from there."
        )

    def _place(self, todo: Todo, rows: dict[int, int]) -> tuple[dict[str, TeacherPlacement], dict[str, float] | None]:
        """Who gets which hardware, and (after a plan) the rates to expect."""
        hardware, names = self.config.hardware, sorted({name for names in todo.values() for name in names})
        cluster = read_cluster()
        if hardware.gpus == "auto":
            plan = make_plan(Survey(self.lake, self.config, self.inputs, todo, rows), cluster=cluster)
            logger.info("extract: %s", plan.summary())
            return plan.placement, plan.expected_rates()
        actors, gpus = hardware.actors_per_teacher, hardware.gpus_per_teacher
        return place(names, cluster, hardware.teachers, actors, gpus), None

    def _start(self, placements: dict[str, TeacherPlacement]) -> dict[str, TeacherPool]:
        share = self.config.hardware.share_process
        if share is None:
            alone = _core_share(placements, False)
            share = alone.cpus // alone.teachers < ROOMY_CORES
        together, apart = (self._arguments(placements, _core_share(placements, shared)) for shared in (share, False))
        return start_pools(placements, self.kind, together, lambda: self.stop.asked, share, apart)

    def _arguments(self, placements: dict[str, TeacherPlacement], share: CoreShare) -> dict[str, tuple[Any, ...]]:
        """Teacher -> arguments of its constructor."""
        threads = self.config.hardware.threads or share
        return {
            name: (self.inputs[name], "auto", placement.micro_batch or self.config.micro_batch, threads)
            for name, placement in placements.items()
        }

    def _remember(self, written: dict[str, dict[int, int]]) -> None:
        """Spare the next run a look into the files of this one; that this fails must hide no other error."""
        for name, files in written.items():
            try:
                record_valid(self.lake, name, self.identities[name], files, self.pairs)
            except (MmkdError, OSError) as error:
                logger.warning("extract: the next run will check the files of %s again: %s", name, error)

    def _refresh_teachers(self) -> None:
        """Once more: another run may have written the table meanwhile without this one's teachers."""
        try:
            refresh_teachers(self.lake)
        except (MmkdError, OSError) as error:
            logger.warning("extract: teachers.parquet was not written; `mmkd verify` writes it: %s", error)

    def _account(
        self,
        report: ExtractReport,
        todo: Todo,
        rows: dict[int, int],
        placements: dict[str, TeacherPlacement],
        expected: dict[str, float] | None,
    ) -> RunReport:
        missing = [(shard, name) for shard, names in todo.items() for name in names]
        return RunReport(
            self.lake,
            report.run,
            planned=dict(Counter(name for _, name in missing)),
            rows={name: sum(rows[shard] for shard, other in missing if other == name) for name in placements},
            skipped=report.skipped,
            settings=self.config.model_dump(mode="json"),
            expected=expected,
            workers={"prepare": self.config.hardware.prepare_tasks or _spare_cpus()},
            metrics=Metrics(),
        )

    def _say(self, report: ExtractReport) -> None:
        logger.info(
            "extract: %d files, %d rows, %.1f MB in %s (%.0f rows/s); rejects: %s",
            report.shards,
            report.rows,
            report.bytes / 1e6,
            duration(report.seconds),
            report.rows / max(report.seconds, 1e-9),
            dict(report.rejects) or "none",
        )
        logger.info("extract: the account is in %s/runs/%s", self.lake.uri, report.run)


def _core_share(placements: Mapping[str, TeacherPlacement], share: bool) -> CoreShare:
    """What each process may use of the smallest machine, when teachers share processes or do not."""
    processes = sum(placements[names[0]].actors for names in group_teachers(placements, share))
    machines = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    cpus = int(min((node["Resources"]["CPU"] for node in machines), default=1))
    return CoreShare(max(1, cpus), max(1, -(-processes // max(1, len(machines)))))


def _spare_cpus() -> int:
    """Shards to prepare at the same time: one per CPU, but for one that writes."""
    spare = int(ray.cluster_resources().get("CPU", 2)) - 1
    if len(ray.nodes()) == 1:  # a local Ray counts more CPUs than there are
        spare = min(spare, usable_cores())
    return max(1, spare)


def _last_wanted(todo: Todo, failures: Mapping[str, str]) -> int:
    """Position of the last shard that a teacher which still works lacks; -1 if there is none."""
    wanted = (place for place, names in enumerate(todo.values()) if not failures.keys() >= set(names))
    return max(wanted, default=-1)


def _as_todo(missing: set[tuple[int, str]]) -> Todo:
    names: dict[int, list[str]] = {}
    for shard, name in sorted(missing):
        names.setdefault(shard, []).append(name)
    return {shard: tuple(found) for shard, found in names.items()}


def _failures_text(failures: dict[str, str]) -> str:
    listing = " ".join(f"Teacher {name!r} stopped: {reason}." for name, reason in failures.items())
    return (
        f"{listing} What was finished is kept; mend the cause (or raise max_reject_fraction) and run the same command "
        "again to go on."
    )
