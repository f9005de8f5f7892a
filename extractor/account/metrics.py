"""A run's figures on Ray's Prometheus endpoint, as ``ray_mmkd_extract_*``; without Ray nothing happens."""

from __future__ import annotations

import sys
from typing import Any

from extractor.account.host import HostSample
from extractor.account.tally import StageFigures
from extractor.events import FileDone

# name -> (kind, what it counts, tags); Ray puts "ray_" before the names and "_total" after those of counters.
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "mmkd_extract_files": ("Counter", "Files written", ("teacher",)),
    "mmkd_extract_rows": ("Counter", "Rows of the files written", ("teacher",)),
    "mmkd_extract_bytes": ("Counter", "Bytes of the files written", ("teacher",)),
    "mmkd_extract_rejected_rows": ("Counter", "Rows without a vector", ("teacher", "reason")),
    "mmkd_extract_failed_files": ("Counter", "Files that a teacher failed", ("teacher",)),
    "mmkd_extract_model_seconds": ("Counter", "Time that teachers spent embedding", ("teacher",)),
    "mmkd_extract_write_seconds": ("Counter", "Time spent encoding and storing files", ("teacher",)),
    "mmkd_extract_notes": ("Counter", "Restarts, memory shortages and the like", ("kind",)),
    "mmkd_extract_rows_left": ("Gauge", "Rows still to do", ("stage",)),
    "mmkd_extract_recent_rows_per_second": ("Gauge", "Rows per second over the last minute", ("stage",)),
    "mmkd_extract_busy_share": ("Gauge", "Share of the time that a stage's workers are busy", ("stage",)),
    "mmkd_extract_object_store_bytes": ("Gauge", "Used of the cluster's object store", ()),
}


class Metrics:
    """Made when the first figure comes and Ray is initialised by then; a run whose Ray is gone just stops counting."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def add(self, event: FileDone, is_new: bool = True) -> None:
        """Count an event; ``is_new`` says that its file was not there before."""
        tags = {"teacher": event.teacher}
        if event.error is not None:
            self._count("mmkd_extract_failed_files", 1, tags)
            return
        self._count("mmkd_extract_model_seconds", event.model_seconds, tags)
        self._count("mmkd_extract_write_seconds", event.write_seconds, tags)
        if not is_new:
            return
        self._count("mmkd_extract_files", 1, tags)
        self._count("mmkd_extract_rows", event.rows, tags)
        self._count("mmkd_extract_bytes", event.bytes, tags)
        for reason, rows in event.rejects.items():
            self._count("mmkd_extract_rejected_rows", rows, {**tags, "reason": reason})

    def note(self, kind: str) -> None:
        """Count something out of the ordinary."""
        self._count("mmkd_extract_notes", 1, {"kind": kind})

    def measure(self, stages: list[StageFigures], host: HostSample) -> None:
        """Set the gauges; a figure that is not known is left as it was."""
        for stage in stages:
            tags = {"stage": stage.name}
            if stage.rows_planned is not None:
                self._set("mmkd_extract_rows_left", max(0, stage.rows_planned - stage.rows), tags)
            self._set("mmkd_extract_recent_rows_per_second", stage.recent_rows_per_second, tags)
            self._set("mmkd_extract_busy_share", stage.busy_share, tags)
        self._set("mmkd_extract_object_store_bytes", host.object_store_bytes, {})

    def _count(self, name: str, by: float, tags: dict[str, str]) -> None:
        metric = self._metric(name)
        if metric is not None and by > 0:  # Ray refuses a step of 0
            metric.inc(by, tags=tags)

    def _set(self, name: str, value: float | None, tags: dict[str, str]) -> None:
        metric = self._metric(name)
        if metric is not None and value is not None:
            metric.set(value, tags=tags)

    def _metric(self, name: str) -> Any:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return None
        if name not in self._made:
            import ray.util.metrics

            kind, description, tags = METRICS[name]
            make = {"Counter": ray.util.metrics.Counter, "Gauge": ray.util.metrics.Gauge}[kind]
            self._made[name] = make(name, description=description, tag_keys=tags)
        return self._made[name]
