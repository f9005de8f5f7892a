"""The speed of decoding and of each teacher's towers, measured on pairs of the lake itself."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import PositiveFloat

from common.config import StrictModel, fingerprint
from common.parquet_reading import single_chunk
from extractor.config import ExtractConfig
from extractor.prepare import Prepare, TeacherInput, fixed_rows, restrict

if TYPE_CHECKING:
    from extractor.teachers import Teacher

PASSES = 5
"""Timed calls, of which the median counts; fewer when they take longer than the patience."""
PATIENCE_SECONDS = 10.0
GPU_MICRO_BATCHES = 4
"""Micro-batches per timed call on a GPU, so that what a run overlaps is overlapped here too."""


@dataclass(frozen=True)
class Hardware:
    """What one actor of a teacher runs on."""

    cpu: str
    """Model of the processor."""
    gpu: str | None = None
    threads: int = 0
    """torch threads of an actor, where there is no GPU."""

    @property
    def actor(self) -> str:
        """Name for people and for the cache."""
        return self.gpu or f"{self.cpu}, {self.threads} thread{'' if self.threads == 1 else 's'}"


class TowerRates(StrictModel):
    """Rows a second through each tower of a teacher, on one actor; None where it lacks the tower."""

    image: PositiveFloat | None = None
    text: PositiveFloat | None = None


@dataclass(frozen=True)
class ShardShape:
    """What a shard costs: its rows, and what goes through the towers for them."""

    rows: int
    pictures: int
    captions: int
    """Distinct ones, each of which is embedded once."""

    def pairs_per_second(self, rates: TowerRates, micro_batch: int) -> float:
        """Rows of such shards a teacher embeds in a second; the last micro-batch of a shard is padded."""
        seconds = 0.0
        for count, rate in ((self.pictures, rates.image), (self.captions, rates.text)):
            if rate is not None:
                # One pass where a shard has no captions: no teacher is for nothing.
                seconds += -(-max(count, 1) // micro_batch) * micro_batch / rate
        return self.rows / seconds


@dataclass(frozen=True)
class Measurement:
    """What to measure on: one shard of a lake, prepared as the run would prepare it. Small, so that it travels."""

    lake_uri: str
    inputs: Mapping[str, TeacherInput]
    shard: int
    sample: str
    """Names the shard's content."""
    config: ExtractConfig

    def micro_batch(self, name: str) -> int:
        """Rows per forward pass of a teacher."""
        placement = self.config.hardware.teachers.get(name)
        return (placement and placement.micro_batch) or self.config.micro_batch

    def prepare(self, teachers: Iterable[str]) -> Prepare:
        """The step that prepares the shard for some of the teachers."""
        config = self.config
        todo = {self.shard: tuple(teachers)}
        return Prepare(self.lake_uri, dict(self.inputs), todo, config.views, config.decode, config.limits)

    def teacher_key(self, name: str, hardware: Hardware) -> str:
        """Equal exactly when a remembered rate of a teacher still holds."""
        description = self.inputs[name].description
        return fingerprint([hardware.actor, description.identity(), self.micro_batch(name), description.dtype])

    def decode_key(self, hardware: Hardware) -> str:
        """The same for preparing, which depends on the pictures and on all that is made of them."""
        columns = {column for item in self.inputs.values() for column in (item.pixels, item.tokens)}
        towers = [self.config.towers, self.config.views.count, self.config.decode]
        return fingerprint([hardware.cpu, self.sample, sorted(columns), towers])


def look_at_hardware(threads: int) -> Hardware:
    """What this process would run an actor on; runs on the machine in question."""
    import torch

    if torch.cuda.is_available():
        return Hardware(_cpu_model(), torch.cuda.get_device_name(0))
    return Hardware(_cpu_model(), None, min(threads, os.cpu_count() or 1))


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "CPU"


def measure(
    measurement: Measurement, teachers: tuple[str, ...], decode: bool, hardware: Hardware
) -> tuple[dict[str, TowerRates], float | None]:
    """Measure on the hardware this runs on.

    Returns:
        Teacher -> rates of its towers, and the pairs a second that one core prepares for all teachers of the run.
    """
    import torch

    prepare = measurement.prepare(measurement.inputs if decode else teachers)
    seconds, prepared = _timed_preparation(prepare, measurement.shard)
    if decode and seconds < PATIENCE_SECONDS:  # the first time also loads the tokenizers
        seconds, prepared = _timed_preparation(prepare, measurement.shard)
    threads_before = torch.get_num_threads()
    try:
        towers = {name: _measure_teacher(measurement, name, prepared, hardware) for name in teachers}
    finally:
        torch.set_num_threads(threads_before)
    return towers, prepared.num_rows / seconds if decode else None


def _timed_preparation(prepare: Prepare, shard: int) -> tuple[float, pa.Table]:
    started = time.perf_counter()
    prepared = prepare.prepare(shard)
    return time.perf_counter() - started, prepared


def _measure_teacher(measurement: Measurement, name: str, prepared: pa.Table, hardware: Hardware) -> TowerRates:
    from extractor.teachers import Teacher

    item, micro_batch = measurement.inputs[name], measurement.micro_batch(name)
    teacher = Teacher(item, "cuda" if hardware.gpu else "cpu", micro_batch, hardware.threads)
    rates = {}
    for tower in ("image", "text"):
        description = restrict(item.description, tower)
        if getattr(description, f"{tower}_dim") is not None:
            # To its caller, a teacher without the other tower: what is timed is the very code that a run goes through.
            teacher.teacher = replace(item, description=description)
            rows = micro_batch * (GPU_MICRO_BATCHES if hardware.gpu else 1)
            measured = with_captions(prepared, item.tokens) if tower == "text" else prepared
            rates[tower] = _median_rate(teacher, _batches(measured, rows))
    return TowerRates(**rates)


def with_captions(prepared: pa.Table, tokens: str) -> pa.Table:
    """The rows that have a caption; where none has, all of them with made-up ids, which cost a pass as much as any."""
    column = single_chunk(prepared[tokens])
    if column.null_count < len(column):
        return prepared.filter(column.is_valid())
    place = prepared.column_names.index(tokens)
    zeros = np.zeros((len(column), column.type.list_size), np.int32)
    return prepared.set_column(place, tokens, fixed_rows(zeros))


def _median_rate(teacher: Teacher, batches: Iterator[pa.Table]) -> float:
    """Rows a second that go through the one tower the teacher seems to have, pads included."""
    for _ in range(2 if teacher.device.startswith("cuda") else 1):
        teacher.embed(next(batches))  # kernels are chosen and memory is claimed the first time
    rates: list[float] = []
    started = time.perf_counter()
    while len(rates) < PASSES and (not rates or time.perf_counter() - started < PATIENCE_SECONDS):
        batch = next(batches)
        begun = time.perf_counter()
        facts, _ = teacher.embed(batch)
        rates.append(facts.forwards * facts.micro_batch / (time.perf_counter() - begun))
    return median(rates)


def _batches(prepared: pa.Table, rows: int) -> Iterator[pa.Table]:
    """Whole batches, going round and round a shard that may be smaller than one."""
    start = 0
    while True:
        yield prepared.take(pa.array(np.arange(start, start + rows) % prepared.num_rows))
        start += rows
