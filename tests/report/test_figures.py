import re
import xml.dom.minidom

import numpy as np
import pytest

from massl_fast.report.figures import MAX_POINTS, STAND_INS, Curve, Level, binned, curve_figure, legend_columns


def test_svg_is_well_formed_and_takes_its_colours_from_the_page():
    curves = [
        Curve("student", [1, 2, 3], [3.0, 2.0, 1.0], "--blue"),
        Curve("teacher", [1, 2, 3], [1.0, 1.5, 1.0], "--orange", markers=True),
    ]
    svg = curve_figure(curves, unit="nats", levels=[Level("ln(block size) = 7.62", 7.62)])
    xml.dom.minidom.parseString(svg)
    assert svg.startswith("<svg") and not re.search(r"<svg[^>]* (width|height)=", svg)
    for variable in ("--ink", "--muted", "--grid", "--blue", "--orange"):
        assert f"var({variable})" in svg
    assert not any(colour in svg for colour in STAND_INS.values()) and "DejaVu" not in svg
    for text in ("student", "teacher", "nats", "step", "ln(block size) = 7.62"):
        assert text in svg


def test_equal_figures_are_equal_text_and_ids_do_not_clash():
    first = curve_figure([Curve("a", [0, 1], [1.0, 2.0], "--blue")])
    assert first == curve_figure([Curve("a", [0, 1], [1.0, 2.0], "--blue")])
    ids = re.findall(r' id="([^"]+)"', first)
    assert len(ids) == len(set(ids)) and not [i for i in ids if i.startswith(("figure", "axes", "patch", "line"))]


@pytest.mark.parametrize("values", [[], [float("nan")] * 3, [1.0], [2.0, 2.0, 2.0], [1e-9, 1e9], [0.0, -1.0, 5.0]])
@pytest.mark.parametrize("style", [{}, {"logarithmic": True}, {"from_zero": True}])
def test_any_values_can_be_drawn(values, style):
    xml.dom.minidom.parseString(curve_figure([Curve("loss", range(len(values)), values, "--blue")], **style))


def test_a_legend_takes_as_many_columns_as_fit():
    assert legend_columns(["teacher", "student", "untrained"], 5.6) == 3
    assert legend_columns(["a"] * 9, 11.4) == 4
    long = ["Entropy of the student's distributions", "Entropy of the teacher's distributions", "ln(block size) = 6.93"]
    assert legend_columns(long, 5.6) == 2 and legend_columns([*long, long[0]], 5.6) == 1 and legend_columns(long, 11.4) == 3


def test_long_curves_become_means_within_their_band():
    steps = np.arange(10_007, dtype=float)
    values = np.sin(steps / 500) + np.random.default_rng(0).normal(size=len(steps))
    values[17] = np.nan
    x, mean, low, high = binned(steps, values)
    assert len(x) == MAX_POINTS and (np.diff(x) > 0).all() and (low < mean).all() and (mean < high).all()
    assert low.min() == np.nanmin(values) and high.max() == np.nanmax(values)
    # Runs differ in length by one at most, so the mean of means is nearly the mean.
    assert abs(mean.mean() - np.nanmean(values)) < 1e-3


def test_short_curves_are_left_as_they_are():
    x, mean, low, high = binned(np.array([1.0, 2, 3]), np.array([5.0, np.inf, 7]))
    assert x.tolist() == [1, 3] and mean.tolist() == low.tolist() == high.tolist() == [5, 7]
