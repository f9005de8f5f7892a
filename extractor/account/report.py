"""The account of a run of extract: ``runs/<run>/report.json``, ``report.md`` and, at the end, ``report.html``.

What is not known is null in the figures, never 0.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from common.errors import MmkdError
from common.lake import Lake, now
from common.logs import logger
from common.storage import Storage, without_secrets
from common.version import VERSION
from extractor.account.host import HostProbe, HostSample
from extractor.account.metrics import Metrics
from extractor.account.report_page import render_html, render_markdown
from extractor.account.tally import StageFigures, Tally, bottleneck
from extractor.events import FileDone

RUNNING, FINISHED, STOPPED, FAILED, KILLED = "running", "finished", "stopped", "failed", "killed"
FORMAT = 1
"""Of ``report.json``; raised when a key changes its meaning."""
REPORT_JSON, REPORT_MD, REPORT_HTML = "report.json", "report.md", "report.html"
LIBRARIES = ("ray", "torch", "open_clip_torch", "transformers", "timm", "pyarrow", "numpy", "pillow")
KEPT_NOTES = 100
NOTE_LETTERS = 500
MAX_SAMPLES = 360


class RunReport:
    """Collects what a run does and writes it down; nothing it does can stop the run.

    Args:
        lake: Where the report goes.
        run: Name of the folder under ``runs/``.
        planned: Teacher -> files to do.
        rows: Teacher -> rows to do.
        skipped: Files that were there and valid.
        settings: The run's settings; secrets in addresses are removed before they are written.
        expected: ``prepare`` or a teacher -> rows per second that the plan expects of it; None without a plan.
        workers: ``prepare``, ``write`` or a teacher -> processes. A teacher's are counted from the events where this
            does not name it; the share of time that ``prepare`` and ``write`` are busy is known only with it.
        metrics: Gets the same figures, for Ray's Prometheus endpoint.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        lake: Lake,
        run: str,
        planned: dict[str, int],
        rows: dict[str, int],
        skipped: int,
        settings: dict[str, Any],
        expected: Mapping[str, float] | None = None,
        *,
        workers: Mapping[str, int] | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.lake, self.run, self.skipped, self.clock = lake, run, skipped, clock
        self.settings = _cleaned(settings)
        self.started = clock()
        self.tally = Tally(self.started, planned, rows, workers or {}, expected or {})
        self.metrics = metrics
        self.at_work: Callable[[], Mapping[str, float]] = dict
        """Teacher -> seconds spent on shards that are not done yet; the engine knows."""
        self.notes: Counter[str] = Counter()
        self.last_notes: deque[dict[str, Any]] = deque(maxlen=KEPT_NOTES)
        self.samples: list[HostSample] = []
        self.last_sample: HostSample | None = None
        self._keep_every, self._looks = 1, 0
        self._probe: HostProbe | None = None
        self._writing: threading.Thread | None = None
        self._ended = False

    @property
    def folder(self) -> Storage:
        """Where the report lies."""
        return self.lake.storage.child(f"runs/{self.run}")

    def add(self, event: FileDone) -> None:
        """Count a file that a teacher finished, or failed."""
        is_new = self.tally.add(event, self.clock())
        if event.error is not None:
            self.note("failed file", f"teacher {event.teacher}, shard {event.shard}: {event.error}")
        elif not is_new:
            self.note("repeated file", f"teacher {event.teacher}, shard {event.shard} was computed more than once")
        if self.metrics is not None:
            self.metrics.add(event, is_new)

    def note(self, kind: str, text: str) -> None:
        """Count something out of the ordinary: ``restart``, ``out of memory``, ``lost lease``, ``decoder killed``.

        All are counted; the text is kept of the last hundred.
        """
        self.notes[kind] += 1
        said = without_secrets(text)[:NOTE_LETTERS]
        self.last_notes.append({"at": round(self.clock() - self.started, 1), "kind": kind, "text": said})
        if self.metrics is not None:
            self.metrics.note(kind)

    def sample_host(self) -> HostSample:
        """Look at the machine and keep what was seen; a few milliseconds, and a bounded number is kept."""
        if self._probe is None:
            self._probe = HostProbe()
        sample = self.last_sample = self._probe.look(round(self.clock() - self.started, 1))
        if self._looks % self._keep_every == 0:
            self.samples.append(sample)
        self._looks += 1
        if len(self.samples) > MAX_SAMPLES:  # a long run is seen at half the rate rather than cut off
            self.samples = self.samples[::2]
            self._keep_every *= 2
        if self.metrics is not None:
            self.metrics.measure(self.stages(), sample)
        return sample

    def stages(self) -> list[StageFigures]:
        """The stages as they are now."""
        return self.tally.stages(self.clock(), self.at_work())

    def figures(self, status: str, message: str = "") -> dict[str, Any]:
        """Everything that is known of the run, as plain values: the content of ``report.json``."""
        tally, moment = self.tally, self.clock()
        seconds = moment - self.started
        stages = tally.stages(moment, self.at_work())
        teachers = tally.teachers
        rows = sum(one.rows for one in teachers.values())
        prepared = stages[0]
        return {
            "format": FORMAT,
            "run": self.run,
            "lake": without_secrets(self.lake.uri),
            "status": status,
            "message": without_secrets(message)[: 4 * NOTE_LETTERS],
            "started_at": _iso(self.started),
            "updated_at": _iso(moment),
            "ended_at": None if status == RUNNING else _iso(moment),
            "seconds": seconds,
            "files": {
                "planned": sum(one.files_planned for one in teachers.values()),
                "done": sum(len(one.shards) for one in teachers.values()),
                "skipped": self.skipped,
                "failed": sum(one.failed for one in teachers.values()),
            },
            "rows": {"planned": sum(one.rows_planned for one in teachers.values()), "done": rows},
            "bytes": sum(one.bytes for one in teachers.values()),
            "rows_per_second": rows / seconds if rows and seconds > 0 else None,
            "first_file_seconds": tally.first_file_seconds,
            "rows_per_core_second": prepared.rows_per_worker_second,
            "bottleneck": bottleneck(stages),
            "stages": {stage.name: _stage_json(stage) for stage in stages},
            "teachers": {
                name: {
                    "files": len(one.shards),
                    "files_planned": one.files_planned,
                    "rows": one.rows,
                    "rows_planned": one.rows_planned,
                    "bytes": one.bytes,
                    "forwards": one.forwards,
                    "model_seconds": one.model_seconds,
                    "write_seconds": one.write_seconds,
                    "smallest_micro_batch": one.smallest_micro_batch,
                    "rejects": dict(one.rejects),
                }
                for name, one in teachers.items()
            },
            "devices": {
                name: {
                    "teachers": sorted(device.teachers),
                    "files": device.files,
                    "rows": device.rows,
                    "busy_seconds": device.busy_seconds,
                    "rows_per_second": device.rows / seconds if device.rows and seconds > 0 else None,
                    "busy_share": device.busy_seconds / seconds if seconds > 0 else None,
                }
                for name, device in sorted(tally.devices.items())
            },
            "rejects": dict(tally.rejects()),
            "notes": {"counts": dict(self.notes), "last": list(self.last_notes)},
            "timeline": {
                "seconds": tally.timeline.seconds,
                "rows": {name: tally.timeline.series(name) for name in teachers},
            },
            "host": [sample.to_json() for sample in self.samples],
            "settings": self.settings,
            "versions": _versions(),
            "machine": {"host": platform.node(), "pid": os.getpid(), "cpus": os.cpu_count()},
        }

    def save(self, status: str, message: str = "") -> None:
        """Write the report; a storage that fails is a line in the log, since the embeddings matter more.

        Args:
            status: ``running`` writes JSON and Markdown on a thread of its own and returns at once (and does nothing
                while the write before is still going on, or after the end); ``finished``, ``stopped`` and ``failed``
                write the page too, and return when it is there.
            message: Why the run ended as it did.
        """
        if status != RUNNING:
            self._ended = True
            if self._writing is not None:
                self._writing.join()  # an older account must not land on top of the last one
            write_report(self.folder, self.figures(status, message))
        elif not self._ended and (self._writing is None or not self._writing.is_alive()):
            figures = self.figures(status, message)
            self._writing = threading.Thread(target=write_report, args=(self.folder, figures), daemon=True)
            self._writing.start()


def write_report(folder: Storage, figures: dict[str, Any]) -> None:
    """Write the figures as JSON and Markdown, and as a page unless the run is still going on."""
    try:
        folder.write_json(REPORT_JSON, figures)
        folder.write_bytes(REPORT_MD, render_markdown(figures).encode())
        if figures["status"] != RUNNING:
            folder.write_bytes(REPORT_HTML, render_html(figures).encode())
    except (MmkdError, OSError) as error:
        logger.warning("extract: the run's report could not be written: %s", error)


def close_killed(lake: Lake, is_alive: Callable[[str], bool]) -> list[str]:
    """Close the reports of runs that were killed before they could: status ``killed``, the last figures, the page.

    Args:
        lake: The lake.
        is_alive: Whether the run of this name is still going on somewhere.

    Returns:
        The runs that were closed.
    """
    closed = []
    for run in lake.storage.list_folders("runs"):
        folder = lake.storage.child(f"runs/{run}")
        if _read_running(folder) is None or is_alive(run):
            continue
        figures = _read_running(folder)  # it may have ended by itself since the first look
        if figures is None:
            continue
        message = f"The process ended without a word; the figures are those of {figures['updated_at']}, its last."
        closing = {"status": KILLED, "message": message, "ended_at": figures["updated_at"], "closed_at": now()}
        write_report(folder, {**figures, **closing})
        closed.append(run)
    return closed


def _read_running(folder: Storage) -> dict[str, Any] | None:
    try:
        figures = folder.read_json(REPORT_JSON)
    except (FileNotFoundError, MmkdError):  # a training run, or a report that is not ours to mend
        return None
    ours = isinstance(figures, dict) and figures.get("status") == RUNNING and figures.get("format") == FORMAT
    return figures if ours else None


def _stage_json(stage: StageFigures) -> dict[str, Any]:
    figures = {name: value for name, value in asdict(stage).items() if name != "name"}
    known = stage.capacity is not None and stage.expected
    figures["of_expected"] = stage.capacity / stage.expected if known and stage.capacity and stage.expected else None
    return figures


def _cleaned(value: Any) -> Any:
    """A copy of plain values in which every address has lost its secrets."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {str(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_cleaned(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else without_secrets(str(value))


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"mmkd": VERSION, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return found
