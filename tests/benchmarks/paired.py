"""Comparisons in one run: options, ways measured in turn, medians and ratios, a row in docs/benchmarks.md."""

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import IO

from material import ROOT, default_data

RECORD = ROOT / "docs" / "benchmarks.md"
LIBRARIES = ("ray", "torch", "open_clip_torch", "pillow", "pyarrow")


def parser(description: str, runs: int = 5, rows: int = 0) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--runs", type=int, default=runs, help=f"paired runs (default {runs})")
    if rows:
        made.add_argument("--rows", type=int, default=rows, help=f"rows of the lake (default {rows})")
    made.add_argument("--data", type=Path, default=default_data(), help="folder of real JPEGs (default: shared data)")
    made.add_argument("--work", type=Path, help="folder for lakes and models (default: the temporary one)")
    made.add_argument("--record", action="store_true", help="append the result to docs/benchmarks.md")
    return made


@contextlib.contextmanager
def workplace(options: argparse.Namespace) -> Iterator[Path]:
    """A temporary folder, removed at the end. A cache of our own keeps measurements from meeting a user's."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the folder goes then, too
    with tempfile.TemporaryDirectory(prefix="mmkd-bench-", dir=options.work) as folder:
        os.environ["MMKD_CACHE"] = f"{folder}/cache"
        yield Path(folder)


def run_way(way: str, order: dict[str, object]) -> dict[str, float]:
    """Measure one way of :mod:`ways` in a fresh process, so that no way inherits another's memory, threads or imports.

    Raises:
        SystemExit: The process failed; what it said stands above.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, log = (Path(folder) / name for name in ("order.json", "answer.json", "log"))
        asked.write_text(json.dumps(order))
        command = [sys.executable, str(Path(__file__).with_name("ways.py")), way, str(asked), str(answered)]
        # The session of mmkd sets the same two: spinning threads would slow the baselines down as well.
        quiet = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
        environment = {**os.environ, **quiet, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with log.open("wb") as stream:
            status = _run_and_never_leave(command, environment, stream)
        if status:
            sys.exit(f"{log.read_text(errors='replace')[-6000:]}\nThe way {way!r} ended with status {status}.")
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("WARNING: ")]
        print("\n".join(said), file=sys.stderr, end="\n" if said else "")
        return json.loads(answered.read_text())


def _run_and_never_leave(command: list[str], environment: dict[str, str], stream: IO[bytes]) -> int:
    """Exit status of a process that ends with us, whatever ends us: an orphan would disturb the next measurement."""
    with subprocess.Popen(command, env=environment, stdout=stream, stderr=stream) as process:
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()


@dataclass
class Comparison:
    """Numbers of several ways of doing the same, run by run; the first way is the baseline.

    Attributes:
        title: What is compared.
        unit: Of the numbers.
        target: Least ratio wanted of the last way, or, with ``at_most``, the greatest.
    """

    title: str
    unit: str
    target: float | None = None
    at_most: bool = False
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def add(self, way: str, number: float) -> None:
        """Note one way's number of one run."""
        self.numbers.setdefault(way, []).append(number)

    def ratio(self, way: str) -> float:
        """Median over the runs of a way's number divided by the baseline's of the same run."""
        baseline = next(iter(self.numbers.values()))
        return median(mine / base for mine, base in zip(self.numbers[way], baseline, strict=True))

    def verdict(self) -> str:
        """Whether the last way keeps to the target; empty without one."""
        if self.target is None:
            return ""
        ratio = self.ratio(list(self.numbers)[-1])
        met = ratio <= self.target if self.at_most else ratio >= self.target
        return f"target {'<=' if self.at_most else '>='} {self.target:g}: {'met' if met else 'missed'}"

    def table(self) -> str:
        """The comparison for a terminal."""
        runs = len(next(iter(self.numbers.values())))
        lines = [f"{self.title} ({self.unit}; {runs} paired run{'s' if runs > 1 else ''})"]
        width = max(map(len, self.numbers))
        lines.append(f"  {'way':<{width}} {'median':>10} {'least':>10} {'most':>10} {'ratio':>8}")
        lines.extend(
            f"  {way:<{width}} {median(found):>10.4g} {min(found):>10.4g} {max(found):>10.4g} {self.ratio(way):>8.3f}"
            for way, found in self.numbers.items()
        )
        return "\n".join([*lines, f"  {self.verdict()}" if self.target is not None else ""]).rstrip()

    def row(self, settings: str) -> str:
        """The comparison as a row of the table in docs/benchmarks.md."""
        found = "; ".join(
            f"{way} {median(many):.4g} ({min(many):.4g} to {max(many):.4g})" for way, many in self.numbers.items()
        )
        ratios = ", ".join(f"{self.ratio(way):.3f}" for way in list(self.numbers)[1:])
        verdict = self.verdict()
        runs = len(next(iter(self.numbers.values())))
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        cells = (
            *(day, f"{self.title}, {self.unit}", found, f"{ratios} ({verdict})" if verdict else ratios),
            *(f"{runs} runs, {settings}", _machine(), _versions()),
        )
        return "| " + " | ".join(cells) + " |\n"


def in_turn(runs: int, ways: dict[str, Callable[[], None]]) -> None:
    """Measure the ways in turn, A B A B: what changes on the machine meanwhile meets all of them."""
    for run in range(runs):
        for name, measure in ways.items():
            print(f"run {run + 1} of {runs}: {name} ...", file=sys.stderr, flush=True)
            measure()


def compare_rates(
    title: str,
    baseline: str,
    order: dict[str, object],
    options: argparse.Namespace,
    target: float,
    variants: dict[str, dict[str, object]] | None = None,
) -> list[Comparison]:
    """A baseline of :mod:`ways` and extract in turn, by the clock and by the CPU time that all processes take.

    ``variants`` are orders for extract with other settings, by the names they get; the target is for ``order``'s.
    """
    by_clock = Comparison(title, "rows/s", target)
    by_work = Comparison(title, "rows per CPU second of all processes")
    shares: list[float] = []

    def measure(name: str, way: str, order: dict[str, object]) -> None:
        found = run_way(way, order)
        by_clock.add(name, found["per_second"])
        by_work.add(name, found["per_cpu_second"])
        shares.extend([found["driver_share"]] if "driver_share" in found else [])

    ways = {baseline: partial(measure, baseline, baseline, order)}
    for name, its_order in {**(variants or {}), "extract": order}.items():
        ways[name] = partial(measure, name, "extract", its_order)
    in_turn(options.runs, ways)
    # A driver that burns a core is the half of a machine of two, and one of many elsewhere.
    print(f"\nextract's driver took {100 * median(shares):.1f} % of all CPU seconds (most: {100 * max(shares):.1f} %)")
    return [by_clock, by_work]


def conclude(comparisons: list[Comparison], options: argparse.Namespace, settings: str) -> None:
    """Print the tables, and append them to docs/benchmarks.md if that is asked for."""
    for comparison in comparisons:
        print(f"\n{comparison.table()}")
    if options.record:
        with RECORD.open("a", encoding="utf-8") as file:
            file.writelines(comparison.row(settings) for comparison in comparisons)
        print(f"\nappended to {RECORD.relative_to(ROOT)}")


def provenance() -> str:
    """The machine and the versions behind a number, for a line of its own."""
    return f"{_machine()}; {_versions()}."


def _machine() -> str:
    from extractor.planning.measure import look_at_hardware

    hardware = look_at_hardware(0)
    return f"{hardware.gpu or hardware.cpu}, {os.cpu_count()} cores, load {os.getloadavg()[2]:.1f}"


def _versions() -> str:
    known = ("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    commit = subprocess.run(known, capture_output=True, text=True, check=False).stdout.strip() or "no git"
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"mmkd {commit}, Python {platform.python_version()}, {libraries}"
