"""The parts of a self-contained HTML page (no scripts, no outside links), and its tables as plain text and Markdown.

Cells and titles are text and are escaped here; what is called ``inner`` is HTML already.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

TEMPLATE = Path(__file__).parent / "page.html"


class Table(NamedTuple):
    """A table of text; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: str | None = None
    """First cell of the row that stands out."""


def render_page(title: str, byline: str, sections: Sequence[str]) -> str:
    """The whole page; empty sections leave no trace."""
    body = "\n".join(part for part in sections if part)
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), byline=escape(byline), body=body)


def section(title: str, hint: str, inner: str) -> str:
    """A framed part of the page, or nothing where there is nothing to show."""
    if not inner:
        return ""
    lead = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{lead}\n{inner}</section>"


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Large figures, each with the words below it."""
    cells = "".join(
        f'<div class="tile"><b>{escape(figure)}</b><span>{escape(words)}</span></div>' for figure, words in figures
    )
    return f'<div class="tiles">{cells}</div>'


def html_table(table: Table) -> str:
    """The table as HTML; nothing where it has no rows."""
    if not table.rows:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = []
    for row in table.rows:
        kind = ' class="marked"' if table.marked is not None and row[0] == table.marked else ""
        rows.append(f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    return (
        f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def markdown_table(table: Table) -> str:
    """The table as Markdown; the row that stands out is bold."""
    if not table.rows:
        return ""
    lines = [f"## {table.title}", ""] if table.title else []
    lines += [_markdown_row(table.head), "|" + " --- |" * len(table.head)]
    for row in table.rows:
        is_marked = table.marked is not None and row[0] == table.marked
        lines.append(_markdown_row([f"**{cell}**" if is_marked else cell for cell in row]))
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def text_table(table: Table) -> str:
    """The table as aligned plain text, first column to the left; nothing where it has no rows."""
    if not table.rows:
        return ""
    lines = [[printable(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(len(row[column]) for row in lines) for column in range(len(table.head))]
    printed = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in lines)
    ]
    return "\n".join([table.title, *printed] if table.title else printed) + "\n"


def printable(text: str) -> str:
    """A text on one line, as a terminal may show it: a lake's words may hold control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
