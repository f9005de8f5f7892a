"""Extraction as one streaming Ray Data pipeline: shard -> prepare -> every teacher at once -> one file per teacher."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from common.errors import ClusterError, ConfigError, ModelError
from common.lake import Lake, check_partition, claim_partition, open_lake
from common.logs import Progress, duration, logger
from common.models.load import describe_model, find_spec, read_catalog
from common.models.spec import ModelSpec
from common.schemas import SCHEMA_VERSION
from extractor.config import ExtractConfig
from extractor.prepare import Prepare, TeacherInput
from extractor.sink import check_no_orphans, pair_rows, valid_shards, write_features
from extractor.teachers import STORED_PRECISION, Teacher
from extractor.terms import check_terms

Todo = dict[int, tuple[str, ...]]
"""Shard -> names of the teachers that still lack it."""
START_PATIENCE_SECONDS = 30
FEW_REJECTS = 10
"""So many bad rows of a shard never stop a run by themselves."""
Pools = dict[str, list[Any]]
"""Teacher -> handles of its actors."""


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


def extract(lake_uri: str, config: ExtractConfig) -> ExtractReport:
    """Embed all pairs of a lake with the named teachers, computing only what is missing. Ray must be initialised.

    Raises:
        LakeError: No lake, or a partition there was produced by something else.
        ModelError: A teacher is unknown, does not load, or rejects too many rows.
        ClusterError: The cluster has fewer GPUs than asked for.
    """
    started = time.monotonic()
    lake = open_lake(lake_uri)
    specs = find_teachers(config)
    accepted = check_terms(lake, specs, config.accept_terms)
    inputs = {spec.name: TeacherInput(spec, describe_model(spec)) for spec in specs}
    rows = pair_rows(lake)
    todo = plan_todo(lake, inputs, rows)
    files = sum(len(names) for names in todo.values())
    report = ExtractReport(skipped=len(rows) * len(inputs) - files)
    if not todo:
        logger.info("extract: all %d shards of %s are there; nothing to do", len(rows), ", ".join(inputs))
        return report
    logger.info("extract: %d of %d files to compute (%s)", files, len(rows) * len(inputs), ", ".join(inputs))
    pools = start_teachers({name for names in todo.values() for name in names}, inputs, config)
    try:
        record_teachers(lake, inputs, pools, accepted)
        stream = build_stream(lake, inputs, todo, pools, config)
        follow(stream, todo, rows, report)
    finally:
        for actor in (actor for pool in pools.values() for actor in pool):
            ray.kill(actor)
    report.seconds = time.monotonic() - started
    logger.info(
        "extract: %d files, %d rows, %.1f MB in %s (%.0f rows/s); rejects: %s",
        report.shards,
        report.rows,
        report.bytes / 1e6,
        duration(report.seconds),
        report.rows / report.seconds,
        dict(report.rejects) or "none",
    )
    return report


def find_teachers(config: ExtractConfig) -> list[ModelSpec]:
    """Look the teachers up, before anything is read or loaded."""
    if not config.teachers:
        raise ConfigError("No teacher was named. Give --teachers NAME,NAME (see `mmkd teachers list`).")
    catalog = read_catalog(config.catalog)
    specs = [find_spec(reference, catalog, config.store) for reference in config.teachers]
    repeated = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if repeated:
        raise ConfigError(f"Teacher {repeated[0]!r} is named twice. Give each folder its own name: NAME=FOLDER.")
    return specs


def identity_of(teacher: TeacherInput) -> dict[str, Any]:
    """Everything that determines a teacher's files, as recorded in ``teacher.json``."""
    return {
        **teacher.description.identity(),
        "normalised": "l2",
        "stored_precision": STORED_PRECISION,
        "schema_version": SCHEMA_VERSION,
    }


def manifest_of(lake: Lake, teacher: str) -> str:
    """Path of a teacher's manifest, relative to the lake."""
    return f"{lake.features_folder(teacher)}/teacher.json"


def _remedy(name: str) -> str:
    return f"Nothing was mixed. Extract under another name (NAME=FOLDER), or delete features/teacher={name} first."


def plan_todo(lake: Lake, inputs: dict[str, TeacherInput], rows: dict[int, int]) -> Todo:
    """Shard -> teachers that still lack it; refuses partitions that something else produced."""
    check_no_orphans(lake, inputs, rows)
    missing: dict[int, list[str]] = {}
    for name, teacher in inputs.items():
        identity = identity_of(teacher)
        exists = check_partition(lake.storage, manifest_of(lake, name), identity, _remedy(name))
        done = valid_shards(lake, name, rows, identity) if exists else set()
        for index in rows:
            if index not in done:
                missing.setdefault(index, []).append(name)
    return {index: tuple(missing[index]) for index in sorted(missing)}


def share_gpus(gpus: float, actors: int, asked: float | None) -> float:
    """GPUs for each of ``actors``: as asked, or one each where there are enough, else an equal share of one.

    Raises:
        ClusterError: More was asked for than there is.
    """
    if asked is not None:
        if asked > 1 and asked != int(asked):
            raise ClusterError(f"gpus_per_teacher={asked}: above 1, only whole GPUs can be held by an actor.")
        # A fraction never spans two GPUs: three actors of 0.6 need three GPUs, not 1.8.
        needed = asked * actors if asked >= 1 or asked == 0 else -(-actors // int(1 / asked))
        if needed > gpus:
            raise ClusterError(
                f"{actors} teacher actors with {asked} GPUs each need {needed:g} GPUs and the cluster has {gpus:g}. "
                "Lower gpus_per_teacher or actors_per_teacher, name fewer teachers, or leave gpus_per_teacher unset."
            )
        return asked
    if gpus < 1:
        return 0.0
    per_gpu = -(-actors // int(gpus))
    return 1.0 / per_gpu


def start_teachers(names: set[str], inputs: dict[str, TeacherInput], config: ExtractConfig) -> Pools:
    """Start every teacher's actors, each on GPUs of its own, and wait until all have loaded their weights."""
    resources = ray.cluster_resources()
    actors = len(names) * config.actors_per_teacher
    gpus = share_gpus(resources.get("GPU", 0), actors, config.gpus_per_teacher)
    device = "cuda" if gpus else "cpu"
    threads = config.threads or max(1, int(resources.get("CPU", 1)) // actors)
    pools: Pools = {}
    for name in sorted(names):
        # A class of its own name, so that `ray status` and the dashboard tell the teachers apart.
        kind: Any = ray.remote(type(f"Teacher_{name}", (Teacher,), {}))
        options = kind.options(num_gpus=gpus, num_cpus=0, max_restarts=4, max_task_retries=4)
        pools[name] = [
            options.remote(inputs[name], device, config.micro_batch, threads) for _ in range(config.actors_per_teacher)
        ]
    for name, pool in pools.items():
        waiting = [actor.__ray_ready__.remote() for actor in pool]
        while len(ray.wait(waiting, num_returns=len(waiting), timeout=START_PATIENCE_SECONDS)[0]) < len(waiting):
            free = ray.available_resources().get("GPU", 0)
            logger.info("extract: waiting for teacher %s to load or to be placed (%g GPUs free)", name, free)
        try:
            ray.get(waiting)
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
            raise ModelError(f"Teacher {name!r} did not start: {_root_message(error)}") from error
    return pools


def _root_message(error: BaseException) -> str:
    """The last line of a remote traceback: what actually went wrong."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def record_teachers(lake: Lake, inputs: dict[str, TeacherInput], pools: Pools, accepted: dict[str, str]) -> None:
    """Write ``teacher.json`` of each partition before its first shard."""
    for name, pool in pools.items():
        spec = inputs[name].spec
        facts: dict[str, Any] = {
            "logit_scale": ray.get(pool[0].describe_scale.remote()),
            "license": spec.license,
            "gated": spec.gated,
            "derivatives": spec.derivatives,
            "derivative_terms": spec.derivative_terms,
            "terms_accepted_at": accepted.get(name),
            "spec": spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
        }
        manifest = manifest_of(lake, name)
        claim_partition(lake.storage, manifest, identity_of(inputs[name]), _remedy(name), facts)
        recorded = lake.read_teacher(name)
        if name in accepted and not recorded.get("terms_accepted_at"):  # a partition from before the terms were known
            lake.storage.write_json(manifest, {**recorded, **facts})


def build_stream(
    lake: Lake,
    inputs: dict[str, TeacherInput],
    todo: Todo,
    pools: Pools,
    config: ExtractConfig,
) -> ray.data.Dataset:
    """The lazy pipeline; one block is one shard from reading to writing."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None  # a shard is never split
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    identities = {name: identity_of(inputs[name]) for name in inputs}
    shards = ray.data.from_items([{"shard": index} for index in todo], override_num_blocks=len(todo))
    call: Any = _call  # Ray's stubs know functions of one argument only
    # Tasks, not actors: a dead worker is retried by Ray, and what is worth keeping (tokenizers) stays in its process.
    prepared = shards.map_batches(
        call,
        fn_args=(Prepare(lake.uri, inputs, todo),),
        compute=ray.data.TaskPoolStrategy(size=max(1, min(len(todo), int(ray.cluster_resources()["CPU"]) - 1))),
        num_cpus=1,
        batch_size=1,
    )
    fan_out = FanOut(lake.uri, pools, todo, identities, config.max_reject_fraction)
    return prepared.map_batches(
        call,
        fn_args=(fan_out,),
        compute=ray.data.TaskPoolStrategy(size=min(config.shards_in_flight, len(todo))),
        num_cpus=0.1,  # mostly waiting; another number than Prepare's, so that Ray keeps the two apart
        batch_size=None,
        batch_format="pyarrow",
    )


def _call(batch: Any, step: Callable[[Any], Any]) -> Any:
    """Apply a step to a block: Ray Data takes plain functions with arguments for its tasks."""
    return step(batch)


class FanOut:
    """Give one prepared shard to all teachers that lack it, and write each answer as it comes.

    The pixels are put into the object store once; every teacher reads the same copy.
    """

    def __init__(
        self,
        lake_uri: str,
        pools: Pools,
        todo: Todo,
        identities: dict[str, dict[str, Any]],
        max_reject_fraction: float,
    ) -> None:
        self.lake = Lake(lake_uri)
        self.pools = pools
        self.todo = todo
        self.identities = identities
        self.max_reject_fraction = max_reject_fraction

    def __call__(self, prepared: pa.Table) -> pa.Table:
        """One row per teacher: shard, teacher, rows, bytes, forwards, seconds, rejects by reason, error."""
        shards = prepared["shard"].unique().to_pylist()
        assert len(shards) == 1, f"a block spans shards {shards}"
        shard = shards[0]
        shared = ray.put(prepared)
        waiting = {
            self.pools[name][shard % len(self.pools[name])].embed.remote(shared): name for name in self.todo[shard]
        }
        rows = []
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            rows.append(self._finish(shard, waiting.pop(ready), ready))
        return pa.Table.from_pylist(rows)

    def _finish(self, shard: int, name: str, reference: ray.ObjectRef) -> dict[str, Any]:
        row: dict[str, Any] = {
            "shard": shard,
            "teacher": name,
            "rows": 0,
            "bytes": 0,
            "forwards": 0,
            "seconds": 0.0,
        }
        row.update({"rejects": [], "error": None})
        try:
            embedded = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            return {**row, "error": _root_message(error)}
        except ray.exceptions.RayActorError as error:
            return {
                **row,
                "error": f"its process died more often than it may be restarted ({_root_message(error)})",
            }
        count = embedded.features.num_rows
        reasons = [reason for _, reason, _ in embedded.rejects]
        bad = len({sample_id for sample_id, _, _ in embedded.rejects})
        # A few bad rows in a small last shard are still only bad rows.
        if bad > max(self.max_reject_fraction * count, min(FEW_REJECTS, count - 1)):
            top = ", ".join(f"{number} x {reason}" for reason, number in Counter(reasons).most_common(3))
            return {**row, "error": f"{bad} of {count} rows of shard {shard} were rejected ({top})"}
        size = write_features(self.lake, name, shard, embedded.features, embedded.rejects, self.identities[name])
        return {
            **row,
            "rows": count,
            "bytes": size,
            "forwards": embedded.forwards,
            "seconds": embedded.seconds,
            "rejects": reasons,
        }


def follow(stream: ray.data.Dataset, todo: Todo, rows: dict[int, int], report: ExtractReport) -> None:
    """Run the pipeline and tell how it goes; stop at the first teacher that cannot go on."""
    total = sum(rows[index] * len(names) for index, names in todo.items())
    progress = Progress("extract", total, "rows")
    for row in stream.iter_rows():
        if row["error"]:
            raise ModelError(
                f"Teacher {row['teacher']!r} stopped: {row['error']}. Shards that were finished are kept; mend the "
                "cause (or raise max_reject_fraction) and run the same command again to go on."
            )
        report.shards += 1
        report.rows += row["rows"]
        report.bytes += row["bytes"]
        report.forwards[row["teacher"]] += row["forwards"]
        report.rejects.update(row["rejects"])
        progress.advance(row["rows"], f"{report.shards} files")
