"""A run reckoned in advance: what is missing, how fast this hardware is, who should get which GPU, hours and bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt, model_validator

from common.config import StrictModel
from common.errors import ConfigError
from common.logs import duration
from common.storage import without_secrets
from extractor.config import ExtractConfig
from extractor.placement import ClusterResources, Node, TeacherPlacement, place
from extractor.planning.estimate import Estimate, Stage, Workload, estimate, threads_of
from extractor.planning.rates import Rates, Run, find_rates, run_here, run_on_cluster, slowest

if TYPE_CHECKING:
    from extractor.planning.survey import Survey

MORE_GPUS, MORE_CORES = 1, 8
WORTH_SHARING = 0.95
"""A run that sharing makes no shorter than by this factor is not worth a sentence."""

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PlanConfig(StrictModel):
    """For which hardware to plan, and what is known of it."""

    gpus: PositiveInt | None = Field(None, description="GPUs to plan for; None: those that are there.")
    cpus: PositiveInt | None = Field(None, description="CPU cores to plan for; None: those that are there.")
    cluster: bool = Field(False, description="Plan for the Ray cluster, and measure on it.")
    price: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Of one GPU for one hour, in any currency."
    )
    rates: dict[str, Rate] = Field(
        default_factory=dict, description="Teacher -> pairs a second of one actor, where it need not be measured."
    )
    decode_rate: Rate | None = Field(
        None, description="Pairs a second that one core prepares, where it need not be measured."
    )
    share: bool = Field(False, description="Let small teachers share GPUs even where there are enough.")
    fresh: bool = Field(False, description="Measure again what is remembered.")

    @model_validator(mode="after")
    def _one_place(self) -> PlanConfig:
        if self.cluster and (self.gpus or self.cpus):
            raise ValueError("give either the cluster, which has the GPUs and cores it has, or their numbers")
        return self


class Missing(StrictModel):
    """What one teacher lacks."""

    teacher: str
    files: int
    rows: int
    bytes_per_row: float
    bytes: int


class WhatIf(StrictModel):
    """The same run on more hardware."""

    gpus: int
    cores: int
    seconds: float
    pairs_per_second: float


class Plan(StrictModel):
    """A run of extract, reckoned in advance."""

    lake: str
    shards: int
    pairs: int
    """All of the lake."""
    missing: tuple[Missing, ...] = ()
    pairs_to_prepare: int = 0
    pictures_to_decode: int = 0
    gpus: int = 0
    cores: int = 0
    """Cores that prepare."""
    measured_on: str | None = None
    """None: nothing was measured, or looked up."""
    stages: tuple[Stage, ...] = ()
    bottleneck: str = ""
    """``prepare`` or the name of a teacher; names joined by `` + `` share the GPU that decides."""
    seconds: float = 0.0
    pairs_per_second: float = 0.0
    more_gpus: WhatIf | None = None
    more_cores: WhatIf | None = None
    bytes: int = 0
    cost: float | None = None
    placement: dict[str, TeacherPlacement] = Field(default_factory=dict)
    """Of the teachers that lack something, in the order in which to start them."""
    notes: tuple[str, ...] = ()
    """What limits these numbers, one sentence each."""

    def summary(self) -> str:
        """Who gets what, what bounds the run and how long it takes, as one line of a log."""
        shares = ", ".join(
            f"{name} {item.actors} x {item.gpus:g} GPU" for name, item in self.placement.items() if item.gpus
        )
        return (
            f"planned for {self.gpus} GPUs and {self.cores} cores that prepare: {shares or 'no GPU to deal out'}; "
            f"bounded by {self.bottleneck} at {self.pairs_per_second:.1f} pairs/s; about {duration(self.seconds)}"
        )

    def expected_rates(self) -> dict[str, float]:
        """Stage -> pairs a second it could do, for the run's account."""
        return {stage.name: stage.rate for stage in self.stages}


def make_plan(survey: Survey, options: PlanConfig | None = None, cluster: ClusterResources | None = None) -> Plan:
    """Plan what a survey found missing.

    Args:
        survey: From :func:`extractor.planning.survey.survey_lake`.
        options: For which hardware, and what is known of it.
        cluster: The Ray cluster this process has joined: planned for and measured on. None: ``options`` says.

    Raises:
        ConfigError: A rate is given for a teacher that is not named, or cannot be measured here.
        ModelError: A teacher does not load.
        ClusterError: The cluster cannot do what the configured placements ask for.
    """
    options = options or PlanConfig()
    _check_names(options.rates, survey.inputs)
    whole = Plan(
        lake=without_secrets(survey.lake.uri),
        shards=len(survey.rows),
        pairs=sum(survey.rows.values()),
        pairs_to_prepare=survey.pairs_to_prepare,
        pictures_to_decode=survey.pictures_to_decode,
    )
    if not survey.todo:
        return whole
    ground = _ground(survey, options, cluster)
    load, measured_on = _workload(survey, options, ground)
    found = estimate(load, ground.gpus, ground.cores, options.share)
    # Where teachers share already, more GPUs must not be reckoned without it: the answer could be "slower".
    share = options.share or any(stage.shares_with for stage in found.stages)
    missing = tuple(_missing(survey, name) for name in survey.missing_shards)
    return whole.model_copy(
        update={
            "missing": missing,
            "gpus": ground.gpus,
            "cores": ground.cores,
            "measured_on": measured_on,
            "stages": found.stages,
            "bottleneck": found.bottleneck,
            "seconds": found.seconds,
            "pairs_per_second": load.prepare_rows / found.seconds,
            # Without GPUs nobody has measured what one would do.
            "more_gpus": _what_if(load, ground.gpus + MORE_GPUS, ground.cores, share) if ground.gpus else None,
            "more_cores": _what_if(load, ground.gpus, ground.cores + MORE_CORES, share),
            "bytes": sum(item.bytes for item in missing),
            "cost": _cost(options.price, ground.gpus, found.seconds),
            "placement": _placement(survey.config, found, ground),
            "notes": tuple(_notes(load, ground, found, options)),
        }
    )


@dataclass(frozen=True)
class _Ground:
    """The hardware that is planned for, and where to measure."""

    cluster: ClusterResources
    cores: int
    runs: tuple[Run, ...]
    is_real: bool
    """False: the user named numbers."""

    @property
    def gpus(self) -> int:
        return int(self.cluster.gpus)


def _ground(survey: Survey, options: PlanConfig, cluster: ClusterResources | None) -> _Ground:
    runs: tuple[Run, ...] = (run_here,)
    if cluster is not None:
        kinds = list(cluster.accelerator_types) or [None]
        runs = tuple(run_on_cluster(kind, 1 if cluster.gpus else 0) for kind in kinds)
    else:
        gpus = _gpus_here() if options.gpus is None else options.gpus
        cluster = ClusterResources((Node(gpus=gpus, cpus=options.cpus or os.cpu_count() or 1),))
        unknown = [name for name in survey.missing_shards if name not in options.rates]
        if options.gpus and unknown and not _gpus_here():
            raise ConfigError(
                f"There is no GPU on this machine to measure {', '.join(unknown)} on, and --gpus asks for a plan with "
                f"GPUs. Say how many pairs a second one GPU embeds, --rate {unknown[0]}=NUMBER for each of them, or "
                "measure on a cluster with --cluster."
            )
    # With GPUs, the run leaves one core to those that write; without, all are busy all the time.
    cores = max(1, int(cluster.cpus) - 1) if cluster.gpus else max(1, int(cluster.cpus))
    if cluster.gpus and survey.config.hardware.prepare_tasks:
        cores = survey.config.hardware.prepare_tasks
    return _Ground(cluster, cores, runs, runs != (run_here,) or options.gpus is None)


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _workload(survey: Survey, options: PlanConfig, ground: _Ground) -> tuple[Workload, str | None]:
    """The work with the rates that were given, remembered or measured, and what was measured on, if anything was."""
    names = list(survey.missing_shards)
    unknown = [name for name in names if name not in options.rates]
    threads = threads_of(ground.cores, len(names))
    measurement, measured = survey.measurement, Rates()
    if unknown or options.decode_rate is None:
        wanted = (measurement, unknown, options.decode_rate is None)
        measured = slowest([find_rates(*wanted, run, threads, options.fresh) for run in ground.runs])
    rates = {name: options.rates[name] for name in names if name in options.rates}
    # A CPU's rate is of as many threads as this machine has; an actor of the planned one may have more.
    scale = 1.0
    if measured.hardware and measured.hardware.threads and not ground.gpus:
        scale = threads / measured.hardware.threads
    for name, towers in measured.towers.items():
        rates[name] = scale * survey.shape.pairs_per_second(towers, measurement.micro_batch(name))
    prepare_rate = options.decode_rate or measured.decode
    assert prepare_rate is not None, "given or measured"
    load = Workload(
        rows={name: survey.missing_rows[name] for name in names},
        most={name: _most(survey, name, ground) for name in names},
        rates=rates,
        prepare_rows=survey.pairs_to_prepare,
        prepare_rate=prepare_rate,
        fixed=_decided(survey.config, names) if ground.gpus else {},
        threads=threads,
    )
    if measured.hardware is None:
        return load, None
    return load, measured.hardware.actor if measured.towers else measured.hardware.cpu


def _most(survey: Survey, name: str, ground: _Ground) -> int:
    """GPUs beyond which a teacher has no use for more."""
    shards = survey.missing_shards[name]
    stated = survey.config.hardware.teachers.get(name)
    if stated is None or not ground.is_real:
        return shards
    return max(1, min(shards, ground.cluster.gpus_for(stated)))


def _decided(config: ExtractConfig, names: Iterable[str]) -> dict[str, TeacherPlacement]:
    """Placements in which the user has decided how many actors or GPUs there are."""
    found = {}
    for name in names:
        placement = config.hardware.teachers.get(name, TeacherPlacement())
        if placement.gpus is not None or "actors" in placement.model_fields_set:
            gpus = 1.0 if placement.gpus is None else placement.gpus
            if gpus == 0:
                raise ConfigError(
                    f"hardware.teachers puts {name!r} on CPUs (gpus: 0) beside teachers on GPUs, which a plan cannot "
                    "estimate. Plan without that teacher, or give it a GPU."
                )
            found[name] = placement.model_copy(update={"gpus": gpus})
    return found


def _check_names(rates: Iterable[str], inputs: Iterable[str]) -> None:
    known = list(inputs)
    strange = sorted(set(rates) - set(known))
    if strange:
        raise ConfigError(f"--rate names {', '.join(strange)}, which --teachers does not ({', '.join(known)}).")


def _missing(survey: Survey, name: str) -> Missing:
    rows, each = survey.missing_rows[name], survey.bytes_per_row(name)
    files = survey.missing_shards[name]
    return Missing(teacher=name, files=files, rows=rows, bytes_per_row=each, bytes=round(rows * each))


def _cost(price: float | None, gpus: int, seconds: float) -> float | None:
    return None if price is None or not gpus else gpus * price * seconds / 3600


def _what_if(load: Workload, gpus: int, cores: int, share: bool) -> WhatIf:
    found = estimate(load, gpus, cores, share)
    return WhatIf(gpus=gpus, cores=cores, seconds=found.seconds, pairs_per_second=load.prepare_rows / found.seconds)


def _placement(config: ExtractConfig, found: Estimate, ground: _Ground) -> dict[str, TeacherPlacement]:
    """The split, with the labels and kinds of GPU that the configuration asks for; refused where that cannot be."""
    wanted = {}
    for name, placement in found.placement.items():
        stated = config.hardware.teachers.get(name, TeacherPlacement())
        wanted[name] = stated.model_copy(update={"actors": placement.actors, "gpus": placement.gpus})
    if not ground.is_real:
        return wanted
    return place(list(wanted), ground.cluster, wanted)


def _notes(load: Workload, ground: _Ground, found: Estimate, options: PlanConfig) -> Iterator[str]:
    if not ground.gpus:
        yield f"There is no GPU: {len(load.rows)} actors and the decoders share {ground.cores} cores."
        if options.price is not None:
            yield "A price per GPU hour buys nothing here."
    elif any(stage.shares_with for stage in found.stages):
        yield "Teachers that share a GPU take turns; on several machines Ray may group them otherwise."
    elif estimate(load, ground.gpus, ground.cores, share=True).seconds < WORTH_SHARING * found.seconds:
        shared = _what_if(load, ground.gpus, ground.cores, share=True)
        yield f"If small teachers shared GPUs (--share): {shared.pairs_per_second:.4g} pairs/s on the same hardware."
    if found.idle_gpus:
        yield f"{found.idle_gpus} GPUs stay idle: the slowest teacher has no more shards, or may use no others."
    kinds = ground.cluster.accelerator_types
    if len(kinds) > 1:
        listing = ", ".join(f"{count:g} x {kind or 'unknown kind'}" for kind, count in kinds.items())
        yield f"The GPUs are not alike ({listing}); all count as the slowest of them."
    yield "Loading the models, and the last shards of each teacher, come on top."
