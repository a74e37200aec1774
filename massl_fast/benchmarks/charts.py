"""Drawings of benchmark records, as SVG in the colours of the page they stand on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from massl_fast.benchmarks.intervals import median_interval
from massl_fast.report.figures import STAND_INS, drawing, plain, ticker

COLOURS = ("--blue", "--orange", "--green", "--violet", "--muted")
INK, MUTED = STAND_INS["--ink"], STAND_INS["--muted"]
MIB = 2**20
# Of memory: a colour and how opaque it is, for each category of profiling.ledger.
MEMORY_COLOURS = {
    "student weights": ("--blue", 1.0),
    "teacher weights": ("--blue", 0.55),
    "optimizer state": ("--violet", 1.0),
    "memory (ring)": ("--violet", 0.5),
    "crops": ("--muted", 0.9),
    "gradients": ("--orange", 1.0),
    "activations": ("--green", 0.85),
    "loss": ("--orange", 0.5),
    "workspace": ("--muted", 0.45),
}


@dataclass(frozen=True)
class Bar:
    label: str
    samples: Sequence[float]
    """Their median is the bar's length, the 99% interval of the median its whisker."""
    colour: str = "--blue"
    note: str = ""
    """Behind the number."""


def bars(items: Sequence[Bar], unit: str, *, wide: bool = False) -> str:
    """Horizontal bars, the first on top, each with its number."""
    with drawing(wide=wide, height=0.5 + 0.3 * len(items)) as (axes, finish):
        medians = [median(item.samples) for item in items]
        intervals = [median_interval(item.samples) for item in items]
        longest = max([*medians, *(interval[1] for interval in intervals if interval), 1e-12])
        for row, (item, value, interval) in enumerate(zip(items, medians, intervals)):
            axes.barh(row, value, height=0.62, color=STAND_INS[item.colour], linewidth=0)
            if interval:
                axes.plot(interval, [row, row], color=INK, linewidth=1)
            text = f"{_number(value)} {unit}" + (f" · {item.note}" if item.note else "")
            axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), va="center", color=INK, fontsize=8.5)
        axes.set_yticks(range(len(items)), [item.label for item in items])
        axes.invert_yaxis()
        axes.set_xlim(0, longest * 1.04)
        plain(axes)
        axes.tick_params(axis="y", colors=INK)
        axes.xaxis.set_major_locator(ticker.NullLocator())
        axes.spines["bottom"].set_visible(False)
        return finish()


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]
    """(size, value); on a roofline (operations per byte of least traffic, operations per second)."""
    colour: str
    peer: bool = False
    """Drawn dashed, or on a roofline hollow."""


def roofline(kernels: Sequence[Line], matrix_rate: float, bandwidth: float) -> str:
    """Kernels under the two roofs that were measured in the same run: bandwidth × intensity, and the rate of a large matrix product."""
    with drawing(wide=True, height=3.6) as (axes, finish):
        ridge = matrix_rate / bandwidth
        intensities, heights = zip(*(point for kernel in kernels for point in kernel.points))
        left, right = min(ridge / 8, min(intensities) / 3), max(ridge * 8, max(intensities) * 3)
        axes.plot([left, ridge, right], [left * bandwidth, matrix_rate, matrix_rate], color=INK, linewidth=1.4, zorder=2)
        axes.text(right, matrix_rate * 1.12, f"matrix product {_number(matrix_rate / 1e12)} TFLOP/s", ha="right", color=INK)
        axes.text(left * 1.3, left * bandwidth, f"copy {_number(bandwidth / 1e9)} GB/s", color=INK)
        for kernel in kernels:
            colour = STAND_INS[kernel.colour]
            look = dict(color=colour, markerfacecolor="none" if kernel.peer else colour, markersize=6, zorder=3)
            axes.plot(*zip(*kernel.points), "o", label=kernel.label, **look)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        lowest, highest = min(left * bandwidth, min(heights) / 2), matrix_rate * 2.2
        axes.set_ylim(lowest, highest)
        plain(axes)
        _powers(axes.xaxis, "")
        _powers(axes.yaxis, "FLOP/s")
        if highest < 100 * lowest:
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.set_xlabel("operations per byte of least traffic", color=MUTED, loc="right")
        axes.set_ylabel("FLOP/s", color=MUTED)
        _legend(axes)
        return finish()


def over_sizes(lines: Sequence[Line], x_label: str, unit: str) -> str:
    """One line per variant over a size, both axes logarithmic."""
    with drawing(height=3.2) as (axes, finish):
        for line in lines:
            xs, ys = zip(*sorted(line.points))
            look = dict(color=STAND_INS[line.colour], linestyle="--" if line.peer else "-", linewidth=1.5, marker="o", markersize=4)
            axes.plot(xs, ys, label=line.label, **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = sorted({x for line in lines for x, _ in line.points})
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        plain(axes, grid=True)
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1,)) if high > 30 * low else ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel(x_label, color=MUTED, loc="right")
        axes.set_ylabel(unit, color=MUTED)
        _legend(axes, columns=2)
        return finish()


def split(parts: dict[str, float], unit: str) -> str:
    """One whole as a bar of its parts, in order, those of at least 4% with their share inside."""
    total = sum(parts.values()) or 1.0
    with drawing(wide=True, height=1.25) as (axes, finish):
        left = 0.0
        for number, (label, value) in enumerate(parts.items()):
            colour, alpha = COLOURS[number % len(COLOURS)], (0.9, 0.5)[number // len(COLOURS) % 2]
            axes.barh(0, value, left=left, height=0.7, color=STAND_INS[colour], alpha=alpha, label=label, linewidth=0)
            if value / total >= 0.04:
                axes.text(left + value / 2, 0, f"{100 * value / total:.0f} %", ha="center", va="center", color=INK, fontsize=8.5)
            left += value
        axes.set_xlim(0, total)
        plain(axes)
        axes.yaxis.set_major_locator(ticker.NullLocator())
        axes.set_xlabel(unit, color=MUTED, loc="right")
        _legend(axes, columns=9)
        return finish()


def waterfall(estimated: dict[str, int], measured: dict[str, int] | None) -> str:
    """The peak in MiB, one step per category: measured as bars, estimated as outlines (as bars where nothing was measured)."""
    filled = measured if measured is not None else estimated
    names = [name for name in {**filled, **estimated} if max(filled.get(name, 0), estimated.get(name, 0)) >= 0.05 * MIB]
    with drawing(wide=True, height=0.5 + 0.27 * (len(names) + 1)) as (axes, finish):
        total = max(sum(filled.values()), sum(estimated.values())) / MIB
        left = left_estimated = 0.0
        for row, name in enumerate(names):
            size, guess = filled.get(name, 0) / MIB, estimated.get(name, 0) / MIB
            colour, alpha = MEMORY_COLOURS.get(name.split(":")[0], ("--muted", 0.7))
            axes.barh(row, size, left=left, height=0.6, color=STAND_INS[colour], alpha=alpha, linewidth=0)
            if measured is not None:
                axes.barh(row, guess, left=left_estimated, height=0.82, fill=False, edgecolor=INK, linewidth=0.7)
            left, left_estimated = left + size, left_estimated + guess
            axes.text(max(left, left_estimated) + 0.008 * total, row, f"{_number(size)}", va="center", color=INK, fontsize=8.5)
        axes.barh(len(names), left, height=0.6, color=INK, alpha=0.8, linewidth=0)
        axes.text(left + 0.008 * total, len(names), f"{_number(left)}", va="center", color=INK, fontsize=8.5)
        axes.set_yticks(range(len(names) + 1), [*names, "peak"])
        axes.invert_yaxis()
        axes.set_xlim(0, total * 1.09)
        plain(axes)
        axes.tick_params(axis="y", colors=INK)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
        axes.set_xlabel("MiB", color=MUTED, loc="right")
        return finish()


def memory_timeline(line: dict[str, Any], by_moment: bool) -> str:
    """Memory by category over a step, parts of the step below. ``by_moment``: over the order of events, because shapes take no time."""
    count = len(line["seconds"])
    xs = list(range(count)) if by_moment else [1000 * second for second in line["seconds"]]
    with drawing(wide=True, height=3.3) as (axes, finish):
        base = [0.0] * count
        for name, sizes in line["bytes"].items():
            if not any(sizes):
                continue
            colour, alpha = MEMORY_COLOURS.get(name, ("--muted", 0.7))
            top = [low + size / MIB for low, size in zip(base, sizes)]
            axes.fill_between(xs, base, top, step="post", color=STAND_INS[colour], alpha=alpha, linewidth=0, label=name)
            base = top
        highest = max(base, default=0.0)
        if base:
            at = base.index(highest)
            axes.plot(xs[at], highest, "v", color=INK, markersize=5, clip_on=False, zorder=4)
        edges = [0] + [i for i in range(1, count) if line["sections"][i] != line["sections"][i - 1]] + [count - 1]
        for begin, end in pairwise(edges):
            if begin:
                axes.axvline(xs[begin], color=MUTED, linewidth=0.5, linestyle=(0, (2, 3)), zorder=5)
            if count and (xs[end] - xs[begin]) > 0.07 * (xs[-1] - xs[0]):
                middle = (xs[begin] + xs[end]) / 2
                axes.text(middle, highest * 1.05, line["sections"][begin], ha="center", color=MUTED, fontsize=8)
        axes.set_xlim(xs[0] if xs else 0, xs[-1] if xs else 1)
        axes.set_ylim(0, highest * 1.13 or 1)
        plain(axes, grid=True)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.set_ylabel("MiB", color=MUTED)
        x_label = "allocations and releases, in order" if by_moment else "ms, while every operator is watched"
        axes.set_xlabel(x_label, color=MUTED, loc="right")
        _legend(axes, columns=9)
        return finish()


def _legend(axes, columns: int = 5) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        borderaxespad=0.1,
        handlelength=1.2,
        columnspacing=1.2,
        labelcolor=INK,
        fontsize=8.5,
    )


def _powers(axis, unit: str) -> None:
    axis.set_major_locator(ticker.LogLocator(numticks=10))
    axis.set_major_formatter(ticker.EngFormatter(unit=unit, sep="" if not unit else " "))
    axis.set_minor_formatter(ticker.NullFormatter())


def _number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}".replace(",", "\u202f")
