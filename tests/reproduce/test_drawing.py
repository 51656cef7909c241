import re
import xml.etree.ElementTree as ET

import pytest

from coterie.report.plots import Line, line_plot


def lines(count):
    return [
        Line(f"arm {i}", [1, 10, 100], [1.0 + i, 0.1, 0.01], [0.9, 0.1, 0.01], [1.1 + i, 0.2, 0.02])
        for i in range(count)
    ]


@pytest.mark.parametrize("options", [{}, {"log_x": True, "log_y": True}, {"points": True}])
def test_a_drawing_is_a_well_formed_element_in_the_pages_colours(options):
    svg = line_plot(lines(3), x="step", y="loss", **options)
    ET.fromstring(svg)
    assert not re.search(r"#[0-9a-f]{6}\b", svg.replace("#000000", ""))
    assert [f"var(--arm{i})" in svg for i in range(4)] == [True, True, True, False]
    assert "mathdefault" not in svg
    assert svg == line_plot(lines(3), x="step", y="loss", **options)


def test_past_six_lines_colours_come_again_dashed():
    svg = line_plot(lines(8), x="step", y="loss")
    assert "var(--arm5)" in svg
    assert "stroke-dasharray" in svg
    assert "stroke-dasharray" not in line_plot(lines(6), x="step", y="loss")


def test_labels_are_text_whatever_they_hold():
    svg = line_plot([Line('<b>"&', [1], [2])], x="<i>", y="$x$")
    ET.fromstring(svg)
    assert "<b>" not in svg
    assert "<i>" not in svg


def test_a_single_point_is_seen():
    assert "<use" in line_plot([Line("a", [1], [2])], x="step", y="loss")
