"""The report's charts as SVG text: equal input gives equal bytes, and colours stay apart for all kinds of eyes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

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
MARKERS = "os^DvP*X"
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
    "legend.frameon": False,
}


def bar_chart(scores: pa.Table, metric: str = "accuracy") -> str | None:
    """Zero-shot figures by modality, one bar per model with its 95 % interval; None if there are none."""
    found = sections(scores, (metric,))
    if not found or not found[0].title.startswith("Zero-shot"):
        return None
    section = found[0]
    groups, bars = len(section.columns), len(section.models)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        width = 0.82 / bars
        for position, colour in enumerate(_colours(section)):
            _bars(axes, section, position, np.arange(groups) + (position - (bars - 1) / 2) * width, width, colour)
        if MEAN in section.columns:
            axes.axvline(section.columns.index(MEAN) - 0.5, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xticks(np.arange(groups), section.columns)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 100)
        axes.set_ylabel(section.title.removeprefix("Zero-shot ").replace(", percent", ", %"))
        figure.legend(loc="outside upper left", ncols=min(bars, 6), fontsize=9)

    return _svg(draw, (max(7.5, 0.16 * groups * bars + 2.2), 3.6), f"{section.title}, by modality and model")


def _bars(axes: Axes, section: Section, position: int, at: np.ndarray, width: float, colour: str) -> None:
    cells = section.cells[position]
    shown = [i for i, cell in enumerate(cells) if cell is not None]
    values = [cells[i].value for i in shown]  # type: ignore[union-attr]  # filtered just above
    axes.bar(at[shown], values, width * 0.92, color=colour, label=section.models[position], linewidth=0)
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


def loss_chart(curves: Mapping[str, Sequence[Mapping[str, Any]]], terms: Sequence[str]) -> str | None:
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
            for number, (run, rows) in enumerate(curves.items()):
                kept = [(row["step"], row[term]) for row in rows if _finite(row.get(term))]
                if any(value for _, value in kept):
                    style = ("-", "--", "-.", ":")[number % 4]
                    colour = MAP_COLOURS[number % len(MAP_COLOURS)]
                    axes.plot(*zip(*kept, strict=True), style, color=colour, label=run, linewidth=1.4)
            axes.set_xlabel("step")
        unique = {
            label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(unique.values(), unique.keys(), loc="outside upper left", ncols=min(len(unique), 5), fontsize=9)

    return _svg(draw, (max(4.2, 3.1 * columns), 2.5 * lines + 0.4), "Loss terms by training step")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def map_chart(embedding_map: EmbeddingMap) -> str:
    """The 2-D map: one point per picture, colour and marker by modality."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(visible=False)
        modalities = np.array(embedding_map.modalities, dtype=object)
        for number, modality in enumerate(sorted(set(embedding_map.modalities))):
            points = embedding_map.points_N2[modalities == modality]
            marker = MARKERS[(number + number // len(MAP_COLOURS)) % len(MARKERS)]
            axes.plot(
                *points.T,
                linestyle="",
                marker=marker,
                markersize=4.5,
                alpha=0.65,
                markeredgewidth=0,
                color=MAP_COLOURS[number % len(MAP_COLOURS)],
                label=modality,
            )
        axes.set_xlabel(f"first direction ({100 * embedding_map.explained[0]:.0f} % of the variance)")
        axes.set_ylabel(f"second direction ({100 * embedding_map.explained[1]:.0f} %)")
        axes.set_xticks([])
        axes.set_yticks([])
        figure.legend(loc="outside right upper", fontsize=9)

    return _svg(draw, (7.5, 4.4), f"Map of the picture embeddings of {embedding_map.model}")


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
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    # The page scales the chart; a fixed size in points would not fit a phone.
    text = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", text)
    text = re.sub(r'^<svg([^>]*?) height="[^"]*"', r"<svg\1", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
