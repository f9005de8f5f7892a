"""The report's charts as SVG text: equal input gives equal bytes, and colours stay apart for all kinds of eyes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainer.evaluation.gallery import EmbeddingMap
from trainer.evaluation.scores import MEAN
from trainer.evaluation.tables import Section, sections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers, blue and vermilion (the strongest contrast) kept for students.
STUDENT_COLOURS = ("#56B4E9", "#0072B2", "#D55E00")
TEACHER_COLOURS = ("#B8B8B8", "#8C8C8C", "#D8C9A8", "#C9B0C4", "#9FB8A6", "#6E6E6E", "#E3D5D0", "#A9B4C4", "#CFCFA0")
MAP_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#000000")
MARKERS = {"o": "\u25cf", "s": "\u25a0", "^": "\u25b2", "D": "\u25c6", "v": "\u25bc", "P": "\u271a", "*": "\u2605"}
LINES = (("-", "\u2501\u2501"), ("--", "\u2505\u2505"), ("-.", "\u2501\u00b7"), (":", "\u00b7\u00b7\u00b7"))
INK, GRID = "#333333", "#E4E4E4"

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "axes.axisbelow": True,
}


class LegendEntry(NamedTuple):
    """What a colour stands for; ``mark`` is the character that shows it."""

    label: str
    colour: str
    mark: str = "\u25a0"


class Chart(NamedTuple):
    """A chart and its legend, which the page sets in its own font: browsers and matplotlib disagree on widths."""

    svg: str
    legend: list[LegendEntry]


def bar_chart(scores: pa.Table, metric: str = "accuracy") -> Chart | None:
    """Zero-shot figures by modality, one bar per model with its 95 % interval; None if there are none.

    A dashed line across the bars of a modality is what guessing gives there.
    """
    found = sections(scores, (metric,))
    if not found or not found[0].title.startswith("Zero-shot"):
        return None
    section = found[0]
    groups, bars = len(section.columns), len(section.models)
    colours = _colours(section)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        width = 0.82 / bars
        for position, colour in enumerate(colours):
            _bars(axes, section, position, np.arange(groups) + (position - (bars - 1) / 2) * width, width, colour)
        for place, chance in enumerate(section.chances):
            if chance is not None:
                axes.plot([place - 0.45, place + 0.45], [chance] * 2, color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
        if MEAN in section.columns:
            axes.axvline(section.columns.index(MEAN) - 0.5, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xticks(np.arange(groups), section.columns)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 100)
        axes.set_ylabel(f"{metric.upper() if len(metric) < 4 else metric}, %")

    svg = _svg(draw, (max(7.5, 0.16 * groups * bars + 2.2), 3.2), f"{section.title}, by modality and model")
    return Chart(svg, [LegendEntry(model, colour) for model, colour in zip(section.models, colours, strict=True)])


def _bars(axes: Axes, section: Section, position: int, at: np.ndarray, width: float, colour: str) -> None:
    cells = section.cells[position]
    shown = [i for i, cell in enumerate(cells) if cell is not None]
    values = [cells[i].value for i in shown]  # type: ignore[union-attr]  # filtered just above
    axes.bar(at[shown], values, width * 0.92, color=colour, linewidth=0)
    for i in shown:
        cell = cells[i]
        if cell is not None and cell.low is not None and cell.high is not None:
            axes.plot([at[i], at[i]], [cell.low, cell.high], color=INK, linewidth=1, solid_capstyle="butt")


def _colours(section: Section) -> list[str]:
    students = section.kinds.count("student")
    # The last student, the distilled one, gets the strong blue.
    strong = iter(
        STUDENT_COLOURS[:2] if students == 2 else (STUDENT_COLOURS[1], STUDENT_COLOURS[2], STUDENT_COLOURS[0])
    )
    teachers = iter(TEACHER_COLOURS * (1 + len(section.models) // len(TEACHER_COLOURS)))
    spare = iter(MAP_COLOURS * (1 + students // len(MAP_COLOURS)))
    return [next(strong, None) or next(spare) if kind == "student" else next(teachers) for kind in section.kinds]


def loss_chart(curves: Mapping[str, Sequence[Mapping[str, Any]]], terms: Sequence[str]) -> Chart | None:
    """One small chart per loss term, one line per run.

    Args:
        curves: Run -> metric rows; a row has ``step`` and any of the terms, others are ignored.
        terms: Which to draw, in order; those that are nowhere, or always 0, are left out.
    """
    # A term of weight 0 is logged as 0 throughout.
    present = [t for t in terms if any(_finite(row.get(t)) and row[t] for rows in curves.values() for row in rows)]
    if not present:
        return None
    columns = min(3, len(present))
    lines = -(-len(present) // columns)

    def draw(figure: Figure) -> None:
        for place, term in enumerate(present):
            axes = figure.add_subplot(lines, columns, place + 1)
            axes.set_title(term.replace("_", " "), loc="left", fontsize=10)
            for number, rows in enumerate(curves.values()):
                kept = [(row["step"], row[term]) for row in rows if _finite(row.get(term))]
                if any(value for _, value in kept):
                    axes.plot(*zip(*kept, strict=True), LINES[number % 4][0], color=_nth(number), linewidth=1.4)
            axes.set_xlabel("step")

    svg = _svg(draw, (9.3, 2.5 * lines), "Loss terms by training step")
    return Chart(svg, [LegendEntry(run, _nth(number), LINES[number % 4][1]) for number, run in enumerate(curves)])


def _nth(number: int) -> str:
    return MAP_COLOURS[number % len(MAP_COLOURS)]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def map_chart(embedding_map: EmbeddingMap) -> Chart:
    """The 2-D map: one point per picture, colour and marker by modality."""
    names = sorted(set(embedding_map.modalities))
    # Seven markers and eight colours: the pair repeats only after 56 modalities.
    markers = [list(MARKERS)[number % len(MARKERS)] for number in range(len(names))]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(visible=False)
        modalities = np.array(embedding_map.modalities, dtype=object)
        look: dict[str, Any] = {"linestyle": "", "markersize": 4.5, "alpha": 0.65, "markeredgewidth": 0}
        for number, name in enumerate(names):
            points_N2 = embedding_map.points_N2[modalities == name]
            axes.plot(*points_N2.T, marker=markers[number], color=_nth(number), **look)
        axes.set_xlabel(f"first direction ({100 * embedding_map.explained[0]:.0f} % of the variance)")
        axes.set_ylabel(f"second direction ({100 * embedding_map.explained[1]:.0f} %)")
        axes.set_xticks([])
        axes.set_yticks([])

    svg = _svg(draw, (7.5, 4.4), f"Map of the picture embeddings of {embedding_map.model}")
    legend = [LegendEntry(name, _nth(number), MARKERS[markers[number]]) for number, name in enumerate(names)]
    return Chart(svg, legend)


def _svg(draw: Any, size: tuple[float, float], title: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A salt of its own per chart keeps the ids of several charts in one page apart, and every run the same.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Nothing refers to the ids of groups, and they would repeat from chart to chart.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The page scales the chart; a fixed size in points would not fit a phone.
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", text)
    text = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
