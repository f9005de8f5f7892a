"""How a run of extract is going, while it goes: a live table on a terminal, a line in the log everywhere else."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from common.logs import duration, logger
from extractor.account.report import RUNNING, RunReport
from extractor.account.tally import bottleneck
from extractor.pages.charts import number_text
from extractor.pages.page import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

REFRESH_SECONDS = 1.0
LOOK_SECONDS = 5.0
FIRST_LINE_SECONDS = 5.0
SAVE_SECONDS = 30.0
SHOWN_REASONS = 3


class Display:
    """Shows a run's progress and keeps its report on disk up to date; never raises into the run.

    Args:
        report: The run.
        every: Seconds between two lines in the log; the first comes after five seconds.
        console: Where to draw; standard error by default. Without a terminal there, lines are logged instead.
    """

    def __init__(self, report: RunReport, every: float = 30.0, console: Console | None = None) -> None:
        self.report, self.every, self.console = report, every, console
        self._live: Live | None = None
        self._restore = contextlib.ExitStack()
        self._broken = False
        started = time.monotonic()
        self._next_line = started + min(FIRST_LINE_SECONDS, every)
        self._next_refresh = self._next_look = started
        self._next_save = started + SAVE_SECONDS

    def __enter__(self) -> Display:
        with self._harmless():
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._harmless():
            if self._live is not None:
                self._live.update(self.table())
            self._restore.close()

    def show(self) -> None:
        """Do what is due: look at the machine, draw or log, save. Costs a few comparisons when nothing is."""
        moment = time.monotonic()
        if self._broken or moment < min(self._next_refresh, self._next_line, self._next_look, self._next_save):
            return
        with self._harmless():
            if moment >= self._next_look:
                self._next_look = moment + LOOK_SECONDS
                self.report.sample_host()
            if moment >= self._next_save:
                self._next_save = moment + SAVE_SECONDS
                self.report.save(RUNNING)
            if self._live is None:
                self._next_refresh = float("inf")
                if moment >= self._next_line:
                    self._next_line = moment + self.every
                    logger.info("%s", self.line())
            elif moment >= self._next_refresh:
                self._next_refresh = moment + REFRESH_SECONDS
                self._live.update(self.table(), refresh=True)

    def line(self) -> str:
        """Where the run stands, as one line of a log."""
        stages = self.report.stages()
        teachers = [stage for stage in stages if stage.rows_planned is not None]
        done, planned = sum(s.rows for s in teachers), sum(s.rows_planned or 0 for s in teachers)
        rates = [stage.recent_rows_per_second for stage in teachers if stage.recent_rows_per_second]
        parts = [f"{sum(s.files or 0 for s in teachers)}/{sum(s.files_planned or 0 for s in teachers)} files"]
        slow = bottleneck(stages)
        parts += [
            f"bottleneck {s.name} ({100 * s.busy_share:.0f} % busy)" for s in stages if s.name == slow and s.busy_share
        ]
        parts += [self._machine(), self._rejects()]
        share = 100 * done / max(planned, 1)
        rate = f"{sum(rates):.1f} rows/s" if rates else "nothing finished yet"
        left = [stage.seconds_left for stage in teachers]
        # A teacher that has finished nothing yet may be the last one: then nobody knows.
        known = [seconds for seconds in left if seconds is not None]
        eta = f", about {duration(max(known))} left" if known and len(known) == len(left) and max(known) > 0 else ""
        return f"extract: {done}/{planned} rows ({share:.0f} %), {rate}{eta}; " + "; ".join(
            part for part in parts if part
        )

    def table(self) -> RenderableType:
        """Where the run stands, as a table for a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        stages = self.report.stages()
        slow = bottleneck(stages)
        table = Table(title=Text(f"mmkd extract, run {printable(self.report.run)}"), title_justify="left")
        table.add_column("stage")
        for name in ("files", "rows", "rows/s", "left", "busy"):
            table.add_column(name, justify="right")
        for stage in stages:
            files = "" if stage.files is None else f"{stage.files}/{stage.files_planned}"
            rows = f"{stage.rows:,}" if stage.rows_planned is None else f"{stage.rows:,}/{stage.rows_planned:,}"
            rate = "" if stage.recent_rows_per_second is None else number_text(stage.recent_rows_per_second)
            left = "" if stage.seconds_left is None else duration(stage.seconds_left)
            busy = "" if stage.busy_share is None else f"{100 * stage.busy_share:.0f} %"
            name = f"{stage.name}  <- bottleneck" if stage.name == slow else stage.name
            cells = [Text(cell) for cell in (printable(name), files, rows, rate, left, busy)]
            table.add_row(*cells, style="bold" if stage.name == slow else "")
        notes = ", ".join(f"{kind} {count}" for kind, count in self.report.notes.items())
        below = [part for part in (self._machine(), self._rejects(), printable(notes)) if part]
        return Group(table, Text("; ".join(below)))

    def _machine(self) -> str:
        sample = self.report.last_sample
        if sample is None:
            return ""
        parts = []
        if sample.gpu_percent is not None:
            parts.append(f"GPU {sample.gpu_percent:.0f} %")
        if sample.cpu_percent is not None:
            parts.append(f"CPU {sample.cpu_percent:.0f} %")
        if sample.object_store_bytes is not None and sample.object_store_limit:
            parts.append(f"object store {sample.object_store_bytes / 1e9:.2f}/{sample.object_store_limit / 1e9:.2f} GB")
        return ", ".join(parts)

    def _rejects(self) -> str:
        counted = self.report.tally.rejects()
        shown = [f"{rows} x {printable(reason)}" for reason, rows in counted.most_common(SHOWN_REASONS)]
        more = len(counted) - len(shown)
        return f"rejects: {', '.join(shown) or 'none'}" + (f" and {more} other reasons" if more > 0 else "")

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = self.console or Console(stderr=True)
        if not console.is_terminal:
            return
        self._live = Live(self.table(), console=console, auto_refresh=False, redirect_stdout=False)
        self._restore.enter_context(self._live)
        self._restore.enter_context(_log_above(console))

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """A display that fails is switched off; the run goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a terminal or a library does, the embeddings matter more
            self._broken = True
            with contextlib.suppress(Exception):
                self._restore.close()
            logger.warning("extract: the progress display failed and is off: %s: %s", type(error).__name__, error)


@contextlib.contextmanager
def _log_above(console: Console) -> Iterator[None]:
    """Print the project's log above the live table instead of through it."""
    from rich.file_proxy import FileProxy

    # A stream that somebody closed shows nothing, and refuses to be replaced.
    handlers = [
        h for h in logger.handlers if type(h) is logging.StreamHandler and not getattr(h.stream, "closed", False)
    ]
    streams = [handler.setStream(FileProxy(console, handler.stream)) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
