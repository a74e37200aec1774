"""Curves as inline SVG that takes its colours and font from the page, so that it reads on a light and on a dark ground."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

MAX_POINTS = 300

# matplotlib wants colours, the page has CSS variables: unmistakable colours stand in and are replaced in the SVG text.
STAND_INS = {
    "--ink": "#010203",
    "--muted": "#010204",
    "--grid": "#010205",
    "--blue": "#010206",
    "--orange": "#010207",
    "--green": "#010208",
    "--violet": "#010209",
}


@dataclass(frozen=True)
class Curve:
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    """NaN where a step has no value."""
    colour: str
    """A CSS variable of the page: --blue, --orange, --green, --violet, --muted."""
    markers: bool = False
    """Mark every point (few points); otherwise a line, and a band from smallest to largest where points were joined."""
    line: str = "-"
    """Solid -, dashed -- or dotted :, as matplotlib writes it."""


@dataclass(frozen=True)
class Level:
    """A horizontal dashed line."""

    label: str
    value: float


def curve_figure(
    curves: Sequence[Curve],
    *,
    unit: str = "",
    levels: Sequence[Level] = (),
    logarithmic: bool = False,
    from_zero: bool = False,
    wide: bool = False,
    named: bool = False,
) -> str:
    """An SVG of curves over steps, with a legend where there are several or ``named`` says so.

    At most 300 points per curve: longer ones are averaged over equal runs of points.
    """
    with drawing(wide=wide) as (axes, finish):
        for curve in curves:
            _draw(axes, curve)
        for level in levels:
            axes.axhline(level.value, color=STAND_INS["--muted"], linewidth=1, linestyle=(0, (4, 3)), label=level.label, zorder=1)
        # A logarithmic axis needs something to show.
        logarithmic = logarithmic and any(value > 0 for curve in curves for value in curve.values)
        _dress(axes, unit, logarithmic, from_zero, several=named or len(curves) + len(levels) > 1)
        return finish()


@contextlib.contextmanager
def drawing(*, wide: bool = False, height: float = 2.7) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes to draw on in the colours of ``STAND_INS``, and a function that gives the SVG; equal drawings give equal text."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "massl-fast", "font.size": 9, "axes.unicode_minus": True}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(11.4 if wide else 5.6, height), layout="constrained")
        FigureCanvasSVG(figure)

        def finish() -> str:
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
            return _inline(buffer.getvalue())

        yield figure.add_subplot(), finish


def binned(steps: np.ndarray, values: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, means, smallest, largest) of at most `most` runs of points. Points that are not finite are dropped."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= most:
        return steps, values, values, values
    starts = np.linspace(0, len(values), most, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(values)))
    mean = [np.add.reduceat(column, starts) / counts for column in (steps, values)]
    return mean[0], mean[1], np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def _draw(axes, curve: Curve) -> None:
    colour = STAND_INS[curve.colour]
    steps, means, low, high = binned(np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float))
    alone = len(steps) == 1
    marker = "o" if curve.markers or alone else None
    axes.plot(steps, means, curve.line, color=colour, linewidth=1.6, marker=marker, markersize=4, label=curve.label, zorder=3)
    if not np.array_equal(low, high):
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)


def plain(axes, grid: bool = False) -> None:
    """Axes with a line below and nothing else, but for lines across with ``grid``."""
    if grid:
        axes.grid(axis="y", color=STAND_INS["--grid"], linewidth=0.8)
        axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(STAND_INS["--grid"])
    axes.tick_params(length=0, colors=STAND_INS["--muted"], which="both")


def _dress(axes, unit: str, logarithmic: bool, from_zero: bool, several: bool) -> None:
    plain(axes, grid=True)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.set_xlabel("step", color=STAND_INS["--muted"], loc="right")
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    if logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1,)) if high > 30 * low else ticker.LogLocator(subs=(1, 2, 3, 5), numticks=12))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        if from_zero:
            low, high = axes.get_ylim()
            axes.set_ylim(min(0.0, low), high + 0.04 * (high - min(0.0, low)))  # room for a point at the top
    if unit:
        axes.set_ylabel(unit, color=STAND_INS["--muted"])
    if several:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=legend_columns(axes.get_legend_handles_labels()[1], axes.figure.get_figwidth()),
            frameon=False,
            borderaxespad=0.1,
            handlelength=1.4,
            columnspacing=1.4,
            labelcolor=STAND_INS["--ink"],
        )


def legend_columns(labels: Sequence[str], inches: float) -> int:
    """Most columns, up to four, in which the labels fit the width: the layout would shrink the axes to make room for a wider legend."""
    for columns in range(min(4, len(labels)), 1, -1):
        # matplotlib fills columns one after the other; a character takes about 0.065 inches, a handle and the space after it five of them.
        rows = -(-len(labels) // columns)
        widest = [max(len(label) for label in labels[start : start + rows]) + 5 for start in range(0, len(labels), rows)]
        if 0.065 * sum(widest) <= inches - 0.7:
            return columns
    return 1


def _inline(svg: str) -> str:
    """The <svg> element alone, without a fixed size, with the page's colours and font and no ids that nothing refers to."""
    svg = svg[svg.index("<svg") :]
    for variable, colour in STAND_INS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    return re.sub(r' id="([^"]+)"', lambda m: m.group(0) if m.group(1) in referred else "", svg)
