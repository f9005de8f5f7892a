"""The comparison of models as a table: rows are models, columns are modalities or cut-offs; plain text and Markdown."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from trainer.evaluation.scores import ALL, MEAN

METRIC_TITLES = {"accuracy": "accuracy", "auc": "AUC (one against the rest, macro)", "f1": "F1 (macro)"}
DIRECTIONS = {"image_to_text": "I2T", "text_to_image": "T2I"}
GUESSING, COUNT = "(guessing)", "(n)"
"""First cells of the rows below the models: what guessing gives in percent, and how many samples a figure is of."""
DIRECTION_WORDS = "I2T: image to text, T2I: text to image"


@dataclass(frozen=True)
class Cell:
    """A figure in percent with its 95 % interval; ``best`` if every other model does worse in the column."""

    value: float
    low: float | None
    high: float | None
    best: bool

    def text(self, interval: bool) -> str:
        """Such as ``71.3`` or ``71.3 [68.0, 74.1]``."""
        bounds = f" [{self.low:.1f}, {self.high:.1f}]" if interval and self.low is not None else ""
        return f"{self.value:.1f}{bounds}"


@dataclass(frozen=True)
class Section:
    """One table: a model has one cell per column, None where it was not measured."""

    title: str
    columns: list[str]
    models: list[str]
    kinds: list[str]
    cells: list[list[Cell | None]]
    chances: list[float | None]
    """For each column what guessing gives, in percent; None where that is no one number."""
    counts: list[int]
    """For each column how many samples its figures are of."""

    @property
    def footer(self) -> list[list[str]]:
        """Rows below the models: a name, then a text for each column. What guessing gives only where it is known."""
        rows = [[COUNT, *(str(count) for count in self.counts)]]
        if any(chance is not None for chance in self.chances):
            rows.insert(0, [GUESSING, *("-" if chance is None else f"{chance:.1f}" for chance in self.chances)])
        return rows


def sections(scores: pa.Table, metrics: tuple[str, ...] = ("accuracy", "auc")) -> list[Section]:
    """Arrange scores for people: zero-shot figures by modality, then recall by cut-off, per lake and split.

    Args:
        scores: Of the SCORES schema; models stay in the order they have there.
        metrics: Zero-shot metrics to show.
    """
    rows = scores.to_pylist()
    models = list(dict.fromkeys((row["model"], row["model_kind"]) for row in rows))
    places = data_of(scores)
    found = []
    for place in places:
        mine = [row for row in rows if (row["dataset"], row["split"]) == place]
        suffix = f" on {'/'.join(place)}" if len(places) > 1 else ""
        for metric in metrics:
            chosen = {
                (r["model"], r["modality"]): r for r in mine if r["task"] == "zero_shot" and r["metric"] == metric
            }
            title = f"Zero-shot {METRIC_TITLES.get(metric, metric)}, percent{suffix}"
            found.append(_section(title, models, chosen, _mean_last(chosen)))
        recall = [row for row in mine if row["task"] == "retrieval"]
        for modality, words in ((MEAN, "mean over modalities"), (ALL, "all modalities mixed")):
            chosen = {(r["model"], _recall_title(r["metric"])): r for r in recall if r["modality"] == modality}
            columns = list(dict.fromkeys(column for _, column in chosen))
            found.append(_section(f"Retrieval, {words}, percent{suffix} ({DIRECTION_WORDS})", models, chosen, columns))
    return [section for section in found if section.columns]


def data_of(scores: pa.Table) -> list[tuple[str, str]]:
    """The lakes and splits that scores are of, in order of first occurrence."""
    return list(dict.fromkeys(zip(scores["dataset"].to_pylist(), scores["split"].to_pylist(), strict=True)))


def _mean_last(chosen: dict[tuple[str, str], dict]) -> list[str]:
    columns = list(dict.fromkeys(column for _, column in chosen))
    return [column for column in columns if column != MEAN] + [column for column in columns if column == MEAN]


def _recall_title(metric: str) -> str:
    direction, _, k = metric.partition("_recall@")
    return f"{DIRECTIONS.get(direction, direction)} R@{k}"


def _section(
    title: str, models: list[tuple[str, str]], chosen: dict[tuple[str, str], dict], columns: list[str]
) -> Section:
    shown = [(name, kind) for name, kind in models if any((name, column) in chosen for column in columns)]
    best: dict[str, float | None] = {}
    for wanted in columns:
        values = sorted(row["value"] for (_, column), row in chosen.items() if column == wanted)
        # Two that are level are neither the best.
        best[wanted] = values[-1] if len(values) == 1 or values[-1] > values[-2] else None
    cells: list[list[Cell | None]] = []
    for name, _ in shown:
        rows = [chosen.get((name, column)) for column in columns]
        cells.append([_cell(r, best[c]) if r else None for r, c in zip(rows, columns, strict=True)])
    first = {wanted: next(row for (_, column), row in chosen.items() if column == wanted) for wanted in columns}
    return Section(
        title,
        columns,
        [name for name, _ in shown],
        [kind for _, kind in shown],
        cells,
        [None if row["chance"] is None else 100 * row["chance"] for row in first.values()],
        [row["n"] for row in first.values()],
    )


def _cell(row: dict, best: float | None) -> Cell:
    low, high = (None if row[bound] is None else 100 * row[bound] for bound in ("low", "high"))
    return Cell(100 * row["value"], low, high, row["value"] == best)


def format_table(scores: pa.Table, width: int = 120) -> str:
    """The comparison as aligned plain text; ``*`` marks the best of a column.

    Intervals are shown for every figure if that fits into ``width`` characters, else for the means alone.
    """
    return "\n\n".join(_format_section(section, width) for section in sections(scores))


def _format_section(section: Section, width: int) -> str:
    lines = _aligned(section, intervals=True)
    if len(lines[0]) > width:
        lines = _aligned(section, intervals=False)
    return "\n".join([section.title, *lines])


def _aligned(section: Section, intervals: bool) -> list[str]:
    def show(cell: Cell | None, column: str) -> str:
        if cell is None:
            return "- "
        return cell.text(intervals or column == MEAN) + ("*" if cell.best else " ")

    grid = [["model", *(f"{column} " for column in section.columns)]]
    for model, row in zip(section.models, section.cells, strict=True):
        grid.append([model, *(show(cell, column) for cell, column in zip(row, section.columns, strict=True))])
    grid += [[name, *(f"{text} " for text in texts)] for name, *texts in section.footer]
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    texts = [
        line[0].ljust(widths[0]) + "".join("  " + text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))
        for line in grid
    ]
    return [texts[0].rstrip(), "-" * max(map(len, texts)), *(text.rstrip() for text in texts[1:])]


def format_markdown(scores: pa.Table, metrics: tuple[str, ...] = ("accuracy", "auc")) -> str:
    """The comparison as Markdown tables; the best of a column is bold."""
    parts = []
    for section in sections(scores, metrics):
        lines = [f"**{section.title}**", "", f"| model | {' | '.join(section.columns)} |"]
        lines.append("|---" * (len(section.columns) + 1) + "|")
        for model, row in zip(section.models, section.cells, strict=True):
            texts = ["-" if c is None else f"**{c.text(True)}**" if c.best else c.text(True) for c in row]
            lines.append(f"| {model} | {' | '.join(texts)} |")
        lines += [f"| {' | '.join(row)} |" for row in section.footer]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
