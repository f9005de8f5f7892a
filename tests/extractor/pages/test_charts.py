import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from extractor.pages.charts import Histogram, bar_chart, histogram_chart, line_chart, number_text, ticks
from extractor.pages.page import Table, html_table, markdown_table, text_table


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 0), (5, 5), (-3, -3), (0.1234, 0.1235), (-1, 1), (0, 1e-9), (1e9, 3e9), (0, 7), (99.9, 100.1)],
)
def test_ticks_are_round_few_and_enclose_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    steps = np.diff(found)
    assert (steps > 0).all()
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert found[0] <= low + abs(low) * 1e-6
    assert found[-1] >= high - abs(high) * 1e-6
    assert re.fullmatch(r"[125]\.?0*e.*", f"{steps[0]:.6e}")


def points_of(svg: str, tag: str) -> list[list[tuple[float, float]]]:
    shapes = [element.get("points") for element in ET.fromstring(svg).iter(tag)]
    return [[tuple(map(float, point.split(","))) for point in shape.split()] for shape in shapes]


def test_a_line_lies_where_its_values_are_and_breaks_where_they_are_not_known():
    svg = line_chart("t", {"a": [(0, 0.0), (5, 10.0), (6, None), (8, 2.0), (10, 4.0)]}, "x", "y", height=250)
    first, second = points_of(svg, "polyline")
    assert first == [(64.0, 210.0), (506.0, 10.0)]  # of 884 x 200, from the lower left corner
    assert second == [(771.2, 170.0), (948.0, 130.0)]
    assert line_chart("t", {"a": [(0, None)]}, "x", "y") == ""


def test_bars_are_in_proportion_and_one_stands_out():
    bars = list(ET.fromstring(bar_chart("t", {"a": 10.0, "b": 5.0, "c": 0}, marked="b")).iter("rect"))
    widths = [float(bar.get("width")) for bar in bars]
    assert widths == pytest.approx([600, 300, 0])
    assert len({bar.get("fill") for bar in bars}) == 2
    assert bar_chart("t", {}) == ""


def test_histograms_are_shares_of_their_own_total():
    chart = histogram_chart("t", {"few": Histogram(0, 1, [1, 1]), "many": Histogram(0, 1, [500, 500])}, "x")
    few, many = points_of(chart[chart.index("<svg") :], "polygon")
    assert few == many
    assert histogram_chart("t", {"none": Histogram(0, 1, [0, 0])}, "x") == ""


@pytest.mark.parametrize("name", ["$\\frac$", "_hidden", "<b>&\"'", "\u4e2d\u6587", "x" * 500])
def test_any_name_can_stand_in_a_chart_and_a_table(name):
    assert name in "".join(ET.fromstring(bar_chart(name, {name: 1.0})).itertext())
    table = Table(name, ("a", name), [[name, "1"]])
    assert name in "".join(ET.fromstring(f"<x>{html_table(table)}</x>").itertext())
    assert name in text_table(table)


def test_a_cell_stays_in_its_cell():
    table = Table("", ("a", "b"), [["x|y\nz", "1"]])
    assert markdown_table(table).splitlines()[-1] == "| x\\|y z | 1 |"
    assert text_table(table).splitlines()[-1] == "x|y z  1"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (16, "16"), (1234.5, "1,234"), (12.34, "12.3"), (0.0456, "0.0456"), (-3, "-3")]
)
def test_figures_read_well(value, text):
    assert number_text(value) == text
