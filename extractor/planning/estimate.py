"""How long a run takes on given hardware, which stage decides, and what more hardware would buy: arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from common.config import StrictModel
from common.errors import ClusterError
from extractor.account.tally import PREPARE, teacher_stage
from extractor.placement import TeacherPlacement
from extractor.planning.split import split_gpus


@dataclass(frozen=True)
class Workload:
    """What is to be done, and how fast one core or one actor does it.

    Attributes:
        rows: Teacher -> pairs it lacks.
        most: Teacher -> number of GPUs beyond which more do not help it: it has only so many shards, and may be bound
            to some kind of machine.
        rates: Teacher -> pairs a second of one actor.
        prepare_rows: Pairs to read, decode and tokenise.
        prepare_rate: Pairs a second of one core.
        fixed: Teachers whose actors and GPUs the user has decided.
        threads: torch threads that a CPU actor's rate was measured with.
    """

    rows: Mapping[str, int]
    most: Mapping[str, int]
    rates: Mapping[str, float]
    prepare_rows: int
    prepare_rate: float
    fixed: Mapping[str, TeacherPlacement] = field(default_factory=dict)
    threads: int = 1

    @property
    def work(self) -> dict[str, float]:
        """Teacher -> seconds on one actor."""
        return {name: rows / self.rates[name] for name, rows in self.rows.items()}


class Stage(StrictModel):
    """One line of a plan."""

    name: str
    """``prepare`` or ``teacher=NAME``."""
    rows: int
    rate_of_one: float
    """Pairs a second of one unit."""
    count: float
    unit: Literal["core", "GPU", "thread"]
    shares_with: tuple[str, ...] = ()
    """Teachers that take turns with this one on the same GPU."""
    rate: float
    """Pairs a second of the stage, were no other in its way."""
    busy: float
    """Share of the run's time for which it keeps its hardware busy."""


@dataclass(frozen=True)
class Estimate:
    """How a workload goes on some hardware."""

    seconds: float
    stages: tuple[Stage, ...]
    bottleneck: str
    """Name of the stage that decides, or of the teachers on the GPU that does."""
    placement: Mapping[str, TeacherPlacement]
    idle_gpus: int = 0
    """GPUs that would not make the slowest teacher faster."""


def estimate(load: Workload, gpus: int, cores: int, share: bool = False) -> Estimate:
    """How long a workload takes.

    Args:
        load: What is to be done.
        gpus: GPUs of the cluster; without any, the teachers' actors share the cores.
        cores: Cores that prepare (and, without GPUs, embed).
        share: See :func:`extractor.planning.split.split_gpus`.

    Raises:
        ClusterError: The placements that the user has decided leave no GPU for the other teachers.
    """
    return _on_gpus(load, gpus, cores, share) if gpus else _on_cpus(load, cores)


def _on_gpus(load: Workload, gpus: int, cores: int, share: bool) -> Estimate:
    work = load.work
    free = {name: seconds for name, seconds in work.items() if name not in load.fixed}
    left = gpus - sum(_gpus_taken(placement) for placement in load.fixed.values())
    if left < (1 if free else 0):
        taken = ", ".join(f"{name} {_gpus_taken(placement)}" for name, placement in load.fixed.items())
        raise ClusterError(
            f"The placements that were decided ({taken}) take {gpus - left} of {gpus} GPUs and leave none for "
            f"{', '.join(free) or 'themselves'}. Lower them in hardware.teachers, or leave their gpus and actors unset."
        )
    split = split_gpus(free, left, load.most, share)
    decided = {name: work[name] / (item.actors * min(item.gpus or 1.0, 1.0)) for name, item in load.fixed.items()}
    finish = {**split.finish(work), **decided}
    prepare_seconds = load.prepare_rows / (cores * load.prepare_rate)
    seconds = max(prepare_seconds, *finish.values())
    stages = [_prepare_stage(load, cores, prepare_seconds / seconds)]
    group_of = {name: group for group in split.groups for name in group}
    for name, rows in load.rows.items():
        group = group_of.get(name, ())
        fixed = load.fixed.get(name)
        stages.append(
            Stage(
                name=teacher_stage(name),
                rows=rows,
                rate_of_one=load.rates[name],
                count=_size(fixed) if fixed else split.whole.get(name, 1 / split.per_gpu),
                unit="GPU",
                shares_with=tuple(other for other in group if other != name),
                rate=rows / finish[name],
                busy=(work[name] if group else finish[name]) / seconds,
            )
        )
    slowest = max(finish, key=lambda name: finish[name])
    bottleneck = PREPARE
    if finish[slowest] > prepare_seconds:
        bottleneck = " + ".join(sorted(group_of.get(slowest, (slowest,))))
    idle = left - sum(split.whole.values()) - len(split.groups) if free else 0
    return Estimate(seconds, tuple(stages), bottleneck, {**load.fixed, **split.placements()}, idle)


def _size(placement: TeacherPlacement) -> float:
    return placement.actors * (placement.gpus or 0.0)


def _gpus_taken(placement: TeacherPlacement) -> int:
    """Whole GPUs that nobody else can be planned on."""
    return math.ceil(_size(placement) - 1e-9)


def _on_cpus(load: Workload, cores: int) -> Estimate:
    """Everything takes turns on the same cores, but no actor uses more of them than its threads."""
    threads = threads_of(cores, len(load.rows))
    core_seconds = {PREPARE: load.prepare_rows / load.prepare_rate}
    for name, seconds in load.work.items():
        core_seconds[teacher_stage(name)] = seconds * load.threads
    slowest = max(load.rows, key=lambda name: core_seconds[teacher_stage(name)])
    together, alone = sum(core_seconds.values()) / cores, core_seconds[teacher_stage(slowest)] / threads
    seconds = max(together, alone)
    stages = [_prepare_stage(load, cores, core_seconds[PREPARE] / cores / seconds)]
    for name, rows in load.rows.items():
        stages.append(
            Stage(
                name=teacher_stage(name),
                rows=rows,
                rate_of_one=load.rates[name] / load.threads,
                count=threads,
                unit="thread",
                rate=load.rates[name] / load.threads * threads,
                busy=core_seconds[teacher_stage(name)] / cores / seconds,
            )
        )
    is_prepare = core_seconds[PREPARE] > core_seconds[teacher_stage(slowest)] and together >= alone
    placement = {name: TeacherPlacement(gpus=0.0) for name in load.rows}
    return Estimate(seconds, tuple(stages), PREPARE if is_prepare else slowest, placement)


def threads_of(cores: int, actors: int) -> int:
    """Threads for torch in each actor on a machine without GPUs."""
    return max(1, cores // max(actors, 1))


def _prepare_stage(load: Workload, cores: int, busy: float) -> Stage:
    return Stage(
        name=PREPARE,
        rows=load.prepare_rows,
        rate_of_one=load.prepare_rate,
        count=cores,
        unit="core",
        rate=cores * load.prepare_rate,
        busy=busy,
    )
