"""Line charts, bars and histograms as SVG text for the pages of a run and of a lake: no scripts, no fonts, no library.

Every label is escaped, so that a modality or reason of any spelling can stand in a chart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

# Okabe and Ito's palette for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#000000", "#B8A000")
MARKED, PLAIN = "#D55E00", "#56B4E9"
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 64, 12, 10, 40
_LABEL_LETTERS = 34

Points = Sequence[tuple[float, float | None]]
"""(x, y) in ascending x; a y of None is not known and leaves a gap."""


class Histogram(NamedTuple):
    """Counts between equally spaced edges."""

    low: float
    high: float
    counts: Sequence[int]


def line_chart(title: str, series: Mapping[str, Points], x_label: str, y_label: str, height: int = 260) -> str:
    """One line per series with a legend; empty where no series has a known value."""
    known = [(x, y) for points in series.values() for x, y in points if y is not None]
    if not known:
        return ""
    x_ticks = ticks(min(x for x, _ in known), max(x for x, _ in known))
    y_ticks = ticks(0.0, max(y for _, y in known))
    frame = _Frame(x_ticks, y_ticks, height)
    lines = []
    for number, points in enumerate(series.values()):
        colour = COLOURS[number % len(COLOURS)]
        for piece in _pieces(points):
            path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in piece)
            if len(piece) == 1:
                (x, y) = piece[0]
                lines.append(f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" fill="{colour}"/>')
            else:
                lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return legend(list(series)) + _svg(title, height, frame.axes(x_label, y_label) + "".join(lines))


def bar_chart(title: str, bars: Mapping[str, float], unit: str = "", marked: str | None = None) -> str:
    """Horizontal bars from zero, one per name, each with its figure; ``marked`` stands out. Empty without bars."""
    if not bars:
        return ""
    row, left = 26, 250
    longest = max(max(bars.values()), 1e-12)
    parts = []
    for place, (name, value) in enumerate(bars.items()):
        y, width = place * row + 4, max(0.0, value) / longest * (_WIDTH - left - 110)
        colour = MARKED if name == marked else PLAIN
        parts.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(_shortened(name))}</text>'
            f'<rect x="{left}" y="{y}" width="{width:.1f}" height="18" fill="{colour}">'
            f"<title>{escape(name)}</title></rect>"
            f'<text x="{left + width + 6:.1f}" y="{y + 14}">{number_text(value)}{escape(unit)}</text>'
        )
    return _svg(title, len(bars) * row + 6, "".join(parts))


def histogram_chart(title: str, series: Mapping[str, Histogram], x_label: str, height: int = 180) -> str:
    """Outlines of histograms over one axis, each as shares of its own total; empty without counts."""
    full = {name: found for name, found in series.items() if sum(found.counts)}
    if not full:
        return ""
    shares = {name: [count / sum(found.counts) for count in found.counts] for name, found in full.items()}
    x_ticks = ticks(min(found.low for found in full.values()), max(found.high for found in full.values()))
    frame = _Frame(x_ticks, ticks(0.0, max(max(share) for share in shares.values())), height)
    parts = []
    for number, (name, found) in enumerate(full.items()):
        step = (found.high - found.low) / len(found.counts)
        corners = [(found.low, 0.0)]
        for place, share in enumerate(shares[name]):
            corners += [(found.low + place * step, share), (found.low + (place + 1) * step, share)]
        corners.append((found.high, 0.0))
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in corners)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f'<polygon points="{path}" fill="{colour}" fill-opacity="0.22" stroke="{colour}" stroke-width="1.5"/>'
        )
    return legend(list(full)) + _svg(title, height, frame.axes(x_label, "share") + "".join(parts))


def legend(names: Sequence[str]) -> str:
    """What the colours of a chart stand for, in the order they are given out; a single series needs none."""
    if len(names) < 2:
        return ""
    items = "".join(
        f'<li><b style="color:{COLOURS[number % len(COLOURS)]}">&#9632;</b> {escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that enclose a range; at least two of them."""
    span = high - low
    if not span > max(abs(low), abs(high)) * 1e-9:
        span = max(abs(high), 1.0)
        low, high = (0.0, high) if high > 0 else (low, low + span)
        span = high - low
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def number_text(value: float) -> str:
    """A figure as people write it: 1,234, 56.7, 0.089."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


class _Frame:
    """Axes of a chart: where a value lies on the paper, and the lines and figures around it."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float], height: int) -> None:
        self.x_ticks, self.y_ticks, self.height = x_ticks, y_ticks, height

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def axes(self, x_label: str, y_label: str) -> str:
        bottom = self.height - _BOTTOM
        parts = [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{number_text(tick)}</text>'
            for tick in self.y_ticks
        ]
        parts += [
            f'<text x="{self.x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number_text(tick)}</text>'
            for tick in self.x_ticks
        ]
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle" class="soft">{escape(x_label)}</text>'
        )
        parts.append(
            f'<text x="14" y="{(_TOP + bottom) / 2:.0f}" text-anchor="middle" class="soft" '
            f'transform="rotate(-90 14 {(_TOP + bottom) / 2:.0f})">{escape(y_label)}</text>'
        )
        return "".join(parts)


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _shortened(name: str) -> str:
    return name if len(name) <= _LABEL_LETTERS else f"{name[: _LABEL_LETTERS - 3]}..."


def _svg(title: str, height: int, inner: str) -> str:
    return f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {_WIDTH} {height}">{inner}</svg>'
