"""How fast decoding and each teacher are: from the cache where they were measured before, else measured now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import PositiveFloat, TypeAdapter, ValidationError

from common.config import StrictModel
from common.errors import StorageError
from common.lake import now
from common.logs import logger
from common.models.files import cache_folder
from common.storage import Storage
from extractor.placement import TeacherPlacement, ray_options
from extractor.planning.measure import Hardware, Measurement, TowerRates, look_at_hardware, measure

CACHE_FILE = "rates.json"
"""In the folder that ``MMKD_CACHE`` names."""
WAIT_SECONDS = 30

Run = Callable[..., Any]
"""Calls a module-level function with arguments, in this process or on a machine of the cluster."""


@dataclass(frozen=True)
class Rates:
    """Everything a plan needs to know about speed.

    Attributes:
        hardware: What it holds for; None where all rates were given by hand.
        towers: Teacher -> rows a second through its towers.
        decode: Pairs a second that one core decodes and prepares for all teachers of the run; None: not asked for.
    """

    hardware: Hardware | None = None
    towers: Mapping[str, TowerRates] = field(default_factory=dict)
    decode: float | None = None


class Remembered(StrictModel):
    """One entry of the cache, with what a person wants to know about it."""

    what: str
    hardware: str
    towers: TowerRates = TowerRates()
    decode: PositiveFloat | None = None
    measured_at: str


def run_here(task: Callable[..., Any], *arguments: Any) -> Any:
    """A :data:`Run` in this process."""
    return task(*arguments)


def run_on_cluster(accelerator_type: str | None, gpus: float) -> Run:
    """A :data:`Run` as one small Ray task on a machine of the joined cluster.

    Args:
        accelerator_type: Kind of GPU, where Ray knows it.
        gpus: 1, or 0 in a cluster without GPUs.
    """
    import ray

    options = {**ray_options(TeacherPlacement(gpus=gpus, accelerator_type=accelerator_type)), "num_cpus": 1}

    def run(task: Callable[..., Any], *arguments: Any) -> Any:
        pending = ray.remote(task).options(**options).remote(*arguments)
        while not ray.wait([pending], timeout=WAIT_SECONDS)[0]:
            logger.info("plan: still measuring, or waiting for a free %s", accelerator_type or "place in the cluster")
        return ray.get(pending)

    return run


def find_rates(
    measurement: Measurement, teachers: Iterable[str], decode: bool, run: Run, threads: int, fresh: bool = False
) -> Rates:
    """Rates of teachers, and of decoding, from the cache; what is not there is measured and remembered.

    Args:
        measurement: What to measure on.
        teachers: Those whose rate is wanted.
        decode: Whether the rate of decoding is wanted.
        run: Where to measure: :func:`run_here` or :func:`run_on_cluster`.
        threads: torch threads of an actor, should there be no GPU.
        fresh: Measure again what is remembered.

    Raises:
        ModelError: A teacher does not load.
    """
    hardware: Hardware = run(look_at_hardware, threads)
    storage = Storage(str(cache_folder().parent))
    known = {} if fresh else read_remembered(storage)
    keys = {name: measurement.teacher_key(name, hardware) for name in teachers}
    decode_key = measurement.decode_key(hardware)
    missing = tuple(name for name, key in keys.items() if key not in known)
    lacks_decode = decode and decode_key not in known
    if missing or lacks_decode:
        what = [*(["decoding"] if lacks_decode else []), *missing]
        logger.info("plan: measuring %s on %s", ", ".join(what), hardware.actor)
        towers, decode_rate = run(measure, measurement, missing, lacks_decode, hardware)
        found = {
            keys[name]: Remembered(what=name, hardware=hardware.actor, towers=rates, measured_at=now())
            for name, rates in towers.items()
        }
        if decode_rate is not None:
            found[decode_key] = Remembered(what="decode", hardware=hardware.cpu, decode=decode_rate, measured_at=now())
        known = {**known, **found}
        _remember(storage, found)
    return Rates(
        hardware,
        {name: known[key].towers for name, key in keys.items()},
        known[decode_key].decode if decode else None,
    )


def slowest(found: list[Rates]) -> Rates:
    """One set of rates that no hardware of a mixed cluster falls short of."""

    def least(values: Iterable[float | None]) -> float | None:
        return min((value for value in values if value is not None), default=None)

    first = found[0]
    towers = {
        name: TowerRates(
            image=least(rates.towers[name].image for rates in found),
            text=least(rates.towers[name].text for rates in found),
        )
        for name in first.towers
    }
    kinds = " and ".join(dict.fromkeys(rates.hardware.gpu for rates in found if rates.hardware and rates.hardware.gpu))
    hardware = replace(first.hardware, gpu=kinds or None) if first.hardware else None
    return Rates(hardware, towers, least(rates.decode for rates in found))


def read_remembered(storage: Storage) -> dict[str, Remembered]:
    """The cache; one that is torn or of another version counts as empty."""
    try:
        return TypeAdapter(dict[str, Remembered]).validate_python(storage.read_json(CACHE_FILE))
    except FileNotFoundError:
        return {}
    except (StorageError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("plan: %s is not readable and will be written anew: %s", storage.path(CACHE_FILE), reason)
        return {}


def _remember(storage: Storage, found: dict[str, Remembered]) -> None:
    entries = {**read_remembered(storage), **found}  # read again: another plan may have measured meanwhile
    storage.write_json(CACHE_FILE, {key: entry.model_dump(mode="json") for key, entry in entries.items()})
