"""The comparison report: one self-contained HTML page (no scripts, no outside links) and its tables as Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import pyarrow as pa

from common.errors import EvaluateError
from common.storage import Storage
from common.version import VERSION
from trainer.evaluation.charts import Chart, bar_chart, loss_chart, map_chart
from trainer.evaluation.gallery import EmbeddingMap, GalleryItem
from trainer.evaluation.scores import MEAN
from trainer.evaluation.summary import Headline, headlines, summarise
from trainer.evaluation.tables import Section, data_of, format_markdown, sections

TEMPLATE = Path(__file__).parent / "report.html"


@dataclass(frozen=True)
class ReportContent:
    """Everything a report shows; a part that is empty leaves no trace in the page."""

    title: str
    scores: pa.Table
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Run -> metric rows with ``step`` and the loss terms, as ``trainer.record.read_metrics`` gives them."""
    terms: Sequence[str] = ("total", "contrastive", "image_text", "image_image", "text_text", "heads", "validation")
    """Which of a row's entries are drawn, in this order; those a run does not have are left out."""
    gallery: Sequence[GalleryItem] = ()
    embedding_map: EmbeddingMap | None = None
    notes: Sequence[str] = ()
    """Sentences on how the figures came about, shown under the summary."""
    places: Mapping[str, str] = field(default_factory=dict)
    """What -> where it lies."""
    next_steps: Sequence[str] = ()
    """Sentences; commands go between backquotes."""


def write_report(folder: str, content: ReportContent) -> str:
    """Write ``report.html`` and ``report.md``; equal content gives equal bytes.

    Args:
        folder: Where, local or any fsspec address.
        content: What to show.

    Returns:
        The address of the HTML page.

    Raises:
        EvaluateError: There are no scores to show.
    """
    if not content.scores.num_rows:
        raise EvaluateError("There are no scores to report. Run `mmkd evaluate` first.")
    storage = Storage(folder.rstrip("/"))
    storage.write_bytes("report.html", render_html(content).encode())
    storage.write_bytes("report.md", render_markdown(content).encode())
    return f"{storage.uri}/report.html"


def render_markdown(content: ReportContent) -> str:
    """Title, summary and tables as Markdown."""
    lines = [f"# {content.title}", *summarise(content.scores), *content.notes]
    return "\n\n".join(lines) + "\n\n" + format_markdown(content.scores, ("accuracy", "auc", "f1"))


def render_html(content: ReportContent) -> str:
    """The whole page as text."""
    dated = max(content.scores["created_at"].to_pylist()).replace("T", " ").removesuffix("+00:00")
    datasets = ", ".join("/".join(place) for place in data_of(content.scores))
    parts = [
        _summary(content),
        _bars(content),
        _tables(content),
        _losses(content),
        _gallery(content),
        _map(content),
        _places(content),
        _next(content),
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(content.title),
        byline=escape(f"Measured on {datasets}, {dated} UTC, by mmkd {VERSION}."),
        body="\n".join(part for part in parts if part),
    )


def _section(title: str, hint: str, inner: str) -> str:
    lead = f'<p class="hint">{hint}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{lead}\n{inner}</section>"


def _summary(content: ReportContent) -> str:
    tiles = "".join(_tile(headline) for headline in headlines(content.scores))
    texts = "".join(f"<p>{_prose(text)}</p>" for text in (*summarise(content.scores), *content.notes))
    return _section("In short", "", f'<div class="tiles">{tiles}</div>{texts}')


def _tile(headline: Headline) -> str:
    kind = "tile" if headline.is_student else "tile teacher"
    return f'<div class="{kind}"><b>{escape(headline.figure)}</b><span>{escape(headline.words)}</span></div>'


def _bars(content: ReportContent) -> str:
    charts = [chart for chart in (bar_chart(content.scores, metric) for metric in ("accuracy", "auc")) if chart]
    hint = (
        "The thin line on a bar is the 95 % interval. Blue bars are students, the pale ones teachers. "
        "The dashed line is what guessing gives."
    )
    return _section("By modality", hint, "\n".join(_chart(chart) for chart in charts)) if charts else ""


def _chart(chart: Chart) -> str:
    entries = "".join(f'<li><b style="color:{e.colour}">{e.mark}</b> {escape(e.label)}</li>' for e in chart.legend)
    return f'<ul class="legend">{entries}</ul>\n{chart.svg}'


def _tables(content: ReportContent) -> str:
    hint = (
        "In percent, with 95 % bootstrap intervals; the best of a column is bold, students are tinted. Where intervals "
        "overlap widely, the difference may be chance. The last rows say what guessing gives and how many samples the "
        "figures are of."
    )
    tables = [_table(section) for section in sections(content.scores, ("accuracy", "auc", "f1"))]
    return _section("All figures", hint, "\n".join(tables))


def _table(section: Section) -> str:
    kinds = ["mean" if column == MEAN else "" for column in section.columns]
    head = "".join(f'<th class="{k}">{escape(c)}</th>' for c, k in zip(section.columns, kinds, strict=True))
    lines = []
    for model, kind, row in zip(section.models, section.kinds, section.cells, strict=True):
        cells = []
        for cell, place in zip(row, kinds, strict=True):
            if cell is None:
                cells.append(f'<td class="{place}">-</td>')
                continue
            interval = "" if cell.low is None else f"<small>{cell.low:.1f} to {cell.high:.1f}</small>"
            best = " best" if cell.best else ""
            cells.append(f'<td class="{place}{best}">{cell.value:.1f}{interval}</td>')
        lines.append(f'<tr class="{escape(kind)}"><td>{escape(model)}</td>{"".join(cells)}</tr>')
    for name, *texts in section.footer:
        cells = [f'<td class="{place}">{escape(text)}</td>' for text, place in zip(texts, kinds, strict=True)]
        lines.append(f'<tr class="footer"><td>{escape(name)}</td>{"".join(cells)}</tr>')
    body = "\n".join(lines)
    return (
        f'<h3>{escape(section.title)}</h3><div class="scroll"><table><thead><tr><th>model</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _losses(content: ReportContent) -> str:
    chart = loss_chart(content.curves, content.terms)
    hint = "Loss terms before weighting; total is their weighted sum, validation the contrastive loss on the val split."
    return _section("How training went", hint, _chart(chart)) if chart else ""


def _gallery(content: ReportContent) -> str:
    if not content.gallery:
        return ""
    hint = (
        "Test pictures with the captions the student puts first, out of all test captions. A check mark says that the "
        "caption belongs to the picture; others may still describe it well. The number is the cosine."
    )
    figures = "\n".join(_figure(item) for item in content.gallery)
    return _section("What the student sees", hint, f'<div class="gallery">{figures}</div>')


def _figure(item: GalleryItem) -> str:
    picture = base64.b64encode(item.jpeg).decode()
    where = ", ".join([item.modality, *item.labels])
    found = "".join(
        f'<li class="{"right" if f.right else "other"}">{escape(f.caption)} {"<b>&#10003;</b> " if f.right else ""}'
        f'<span class="cosine">{f.cosine:.2f}</span></li>'
        for f in item.found
    )
    return (
        f'<figure><img alt="{escape(item.captions[0])}" src="data:image/jpeg;base64,{picture}"><figcaption>'
        f'<div class="where">{escape(where)}</div>its caption: {escape(item.captions[0])}'
        f'<ol class="found">{found}</ol></figcaption></figure>'
    )


def _map(content: ReportContent) -> str:
    if content.embedding_map is None:
        return ""
    hint = (
        f"Test pictures where {escape(content.embedding_map.model)} puts them, seen from the side from which they "
        "spread most (principal components). Pictures that lie close together look alike to the model."
    )
    return _section("A map of the embeddings", hint, _chart(map_chart(content.embedding_map)))


def _places(content: ReportContent) -> str:
    if not content.places:
        return ""
    entries = "".join(f"<dt>{escape(k)}</dt><dd><code>{escape(v)}</code></dd>" for k, v in content.places.items())
    return _section("Where everything is", "", f"<dl>{entries}</dl>")


def _next(content: ReportContent) -> str:
    if not content.next_steps:
        return ""
    items = "".join(f"<li>{_prose(step)}</li>" for step in content.next_steps)
    return _section("What to try next", "", f'<ul class="next">{items}</ul>')


def _prose(text: str) -> str:
    """Escape a sentence; what stands between backquotes becomes code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
