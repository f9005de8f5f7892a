"""The account of a run for people: its figures (``report.json``) as Markdown and as one self-contained HTML page.

Both are made from the figures alone, so that the report of a killed run can be closed by the next one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from common.logs import duration, size_text
from extractor.pages.charts import Points, bar_chart, line_chart, number_text
from extractor.pages.page import Table, html_table, markdown_table, render_page, section, tiles

Figures = Mapping[str, Any]
UNKNOWN = "-"
CHART_POINTS = 80
FILES_PER_POINT = 2
"""A point of the curve stands for about this many files: fewer would draw the arrival of files, not the rate."""


def headline(figures: Figures) -> str:
    """What happened, in a sentence or two."""
    files, rows = figures["files"], figures["rows"]
    said = (
        f"{figures['status'].capitalize()}: {files['done']} of {files['planned']} files and {rows['done']:,} of "
        f"{rows['planned']:,} rows in {duration(figures['seconds'])}"
    )
    rate = figures["rows_per_second"]
    said += f" ({number_text(rate)} rows/s)." if rate else "."
    if figures["bottleneck"]:
        share = figures["stages"][figures["bottleneck"]]["busy_share"]
        said += f" The bottleneck is {figures['bottleneck']}, busy {100 * share:.0f} % of the time."
    return f"{said} {figures['message']}".strip()


def render_markdown(figures: Figures) -> str:
    """Headline, tables and settings as Markdown."""
    parts = [f"# Extraction {figures['run']}", headline(figures), byline(figures), _facts_line(figures)]
    parts += [markdown_table(table) for table in _tables(figures)]
    notes = figures["notes"]["last"]
    if notes:
        parts.append("## Last notes")
        parts.append("\n".join(f"- {note['at']:.0f} s, {note['kind']}: {_one_line(note['text'])}" for note in notes))
    parts.append("## Settings")
    parts.append("```json\n" + _settings(figures).replace("```", "'''") + "\n```")
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def render_html(figures: Figures) -> str:
    """The whole page as text."""
    shown = [(figures["status"], figures["message"] or "status")]
    shown += [(f"{figures['files']['done']} / {figures['files']['planned']}", "files written / to do in this run")]
    shown += [(_number(figures["rows_per_second"]), "rows per second, all teachers together")]
    shown += [(size_text(figures["bytes"]), "written")]
    shown += [(_seconds(figures["first_file_seconds"]), "until the first file was there")]
    shown += [(figures["bottleneck"] or UNKNOWN, "bottleneck: busy for the largest share of the time")]
    stages, teachers, devices, rejects, notes, versions = _tables(figures)
    shares = {n: 100 * s["busy_share"] for n, s in figures["stages"].items() if s["busy_share"] is not None}
    busy = bar_chart("Busy share by stage", shares, " %", figures["bottleneck"])
    last = [[f"{n['at']:.0f} s", n["kind"], n["text"]] for n in figures["notes"]["last"]]
    return render_page(
        f"Extraction {figures['run']}",
        byline(figures),
        [
            section("In short", headline(figures), tiles(shown)),
            section("Rows per second", "By teacher, as files were finished.", _rate_chart(figures)),
            section("Stages", STAGES_HINT, busy + html_table(stages)),
            section("Teachers", "", html_table(teachers)),
            section("Devices", "Busy is above 100 % where several teachers share a device.", html_table(devices)),
            section("The driver's machine", "Other nodes are not in these curves.", _host_charts(figures)),
            section("Rows without a vector", "By reason.", _reject_chart(figures) + html_table(rejects)),
            section("Out of the ordinary", "", html_table(notes) + html_table(Table("", ("at", "what", "text"), last))),
            section("Settings", "", f"<pre><code>{escape(_settings(figures))}</code></pre>" + html_table(versions)),
        ],
    )


STAGES_HINT = (
    "Busy is the time a stage's workers spent working, divided by the run's time and their number; the bottleneck is "
    "the stage where it is highest. Capacity is what the stage could do were it never waiting, expected what the plan "
    "said of it."
)


def byline(figures: Figures) -> str:
    """Where, when and with what."""
    end = figures["ended_at"] or f"still running at {figures['updated_at']}"
    return (
        f"{figures['lake']}, {figures['started_at']} to {end}, on {figures['machine']['host']}, "
        f"mmkd {figures['versions']['mmkd']}."
    )


def _facts_line(figures: Figures) -> str:
    facts = [
        f"{size_text(figures['bytes'])} written",
        f"{figures['files']['skipped']} files were there already",
        f"first file after {_seconds(figures['first_file_seconds'])}",
        f"{_number(figures['rows_per_core_second'])} rows/s prepared per busy core",
    ]
    return "; ".join(facts) + "."


def _tables(figures: Figures) -> list[Table]:
    """Stages, teachers, devices, rejects, notes and versions."""
    stages = [
        [
            name,
            f"{stage['rows']:,}",
            _number(stage["workers"]),
            _number(stage["busy_seconds"], " s"),
            _percent(stage["busy_share"]),
            _number(stage["rows_per_second"]),
            _number(stage["rows_per_worker_second"]),
            _number(stage["capacity"]),
            _number(stage["expected"]),
            _percent(stage["of_expected"]),
        ]
        for name, stage in figures["stages"].items()
    ]
    head = ("stage", "rows", "workers", "busy time", "busy", "rows/s", "of one busy worker", "capacity", "expected")
    teachers = [
        [
            name,
            f"{one['files']} / {one['files_planned']}",
            f"{one['rows']:,}",
            size_text(one["bytes"]),
            f"{one['forwards']:,}",
            _number(one["smallest_micro_batch"]),
            f"{sum(one['rejects'].values()):,}",
        ]
        for name, one in figures["teachers"].items()
    ]
    devices = [
        [
            name or "(not told)",
            ", ".join(device["teachers"]),
            f"{device['rows']:,}",
            _number(device["rows_per_second"]),
            _percent(device["busy_share"]),
        ]
        for name, device in figures["devices"].items()
    ]
    rejects = [
        [reason, *(f"{one['rejects'].get(reason, 0):,}" for one in figures["teachers"].values())]
        for reason in figures["rejects"]
    ]
    return [
        Table("Stages", (*head, "capacity / expected"), stages, figures["bottleneck"]),
        Table(
            "Teachers", ("teacher", "files", "rows", "size", "forwards", "micro-batch", "without a vector"), teachers
        ),
        Table("Devices", ("device", "teachers", "rows", "rows/s", "busy"), devices),
        Table("Rows without a vector", ("reason", *figures["teachers"]), rejects),
        Table("Notes", ("kind", "times"), [[kind, str(count)] for kind, count in figures["notes"]["counts"].items()]),
        Table("Versions", ("what", "version"), [[n, found or UNKNOWN] for n, found in figures["versions"].items()]),
    ]


def _rate_chart(figures: Figures) -> str:
    span, rows = figures["timeline"]["seconds"], figures["timeline"]["rows"]
    # Up to the end, also where a teacher stood still before it.
    bins = max(1, int(figures["seconds"] / span), *(len(series) for series in rows.values()))
    files = max((one["files"] for one in figures["teachers"].values()), default=0)
    points = max(1, min(CHART_POINTS, bins, files // FILES_PER_POINT))
    width = -(-bins // points)
    starts = range(0, bins, width)
    if len(starts) > 1 and bins - starts[-1] < width / 2:  # too short a rest to say anything: part of the last point
        starts = starts[:-1]
    ends = [*starts[1:], bins]
    curves: dict[str, Points] = {}
    for teacher, series in rows.items():
        curve: list[tuple[float, float | None]] = []
        for start, end in zip(starts, ends, strict=True):
            length = max(min(end * span, figures["seconds"]) - start * span, span / 2)
            curve.append((start * span + length / 2, sum(series[start:end]) / length))
        curves[teacher] = curve
    return line_chart("Rows per second by teacher", curves, "seconds since the start", "rows/s")


def _host_charts(figures: Figures) -> str:
    samples = figures["host"]

    def curve(name: str, scale: float = 1.0) -> Points:
        return [(sample["at"], sample[name] * scale if name in sample else None) for sample in samples]

    use = {"CPU": curve("cpu_percent"), "GPU": curve("gpu_percent"), "memory": curve("memory_percent")}
    store = {"object store": curve("object_store_bytes", 1e-9), "driver process": curve("rss_bytes", 1e-9)}
    known = {name: points for name, points in use.items() if any(y is not None for _, y in points)}
    kept = {name: points for name, points in store.items() if any(y is not None for _, y in points)}
    return line_chart("Use of the machine", known, "seconds since the start", "percent", 200) + line_chart(
        "Memory", kept, "seconds since the start", "GB", 200
    )


def _reject_chart(figures: Figures) -> str:
    return bar_chart("Rows without a vector by reason", figures["rejects"])


def _settings(figures: Figures) -> str:
    return json.dumps(figures["settings"], indent=2, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _number(value: float | None, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{number_text(value)}{unit}"


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.0f} %"


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else duration(value)
