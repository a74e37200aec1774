"""``massl-fast bench compare A B``: what differs between two records beyond the noise, for pull requests and CI.

A figure counts as changed where three things hold: it shifted by more than ``--threshold`` percent; the 99.9% interval of the shift
(intervals.shift) lies on one side of zero; and of a case that was measured several times, every record of B lies on that side of every
record of A. A figure whose interval is too wide to show a change of twice the threshold, or whose records contradict each other, is called
too noisy, which is not the same as unchanged. Exact figures (bytes, counts) need no interval. Exit code 1: something got worse.

The interval speaks of what varies within a record. What changed between two records beside the code (clocks, heat, other work) shows only
in several: take both in turn (A, B, A, B), or judge by the figures that are ratios within a round (``--figures ratio``).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

from massl_fast.benchmarks import records
from massl_fast.benchmarks.intervals import FEWEST_OF_BOTH, shift

WORSE, BETTER, SAME, NOISY, FEW = "worse", "better", "same", "too noisy", "too few samples"


@dataclass(frozen=True)
class Difference:
    """One figure of one case, before (A) and after (B)."""

    case: str
    figure: str
    unit: str
    before: float
    """Median, as after."""
    after: float
    percent: float
    """The shift (intervals.shift) in percent of the median before."""
    verdict: str
    resolution_percent: float | None
    """The smallest change that would have been seen; None where there are too few samples."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="A", help="file of records, or a folder of them")
    parser.add_argument("after", metavar="B", help="the same cases, measured later")
    parser.add_argument("--threshold", type=float, default=5.0, help="smallest change that counts, in percent (default: 5)")
    parser.add_argument("--figures", nargs="+", default=[], help="words of the names of figures to judge (default: all)")
    parser.add_argument("--all", action="store_true", help="list what did not change, too")


def run(args: argparse.Namespace) -> int:
    if not args.threshold > 0:
        raise ValueError(f"--threshold is {args.threshold:g}; it takes more than 0 percent.")
    before, after = records.read(args.before), records.read(args.after)
    for sentence in circumstances(before, after):
        print(sentence)
    differences, only_before, only_after = compare(before, after, args.threshold)
    if not differences:
        raise ValueError(f"{args.before} and {args.after} have no figure of a case in common that has a better side.")
    if args.figures:
        names = sorted({d.figure for d in differences})
        differences = [d for d in differences if any(word in d.figure for word in args.figures)]
        if not differences:
            raise ValueError(f"No figure is named by --figures {' '.join(args.figures)}; there are {', '.join(names)}.")
    for name, cases in ((args.before, only_before), (args.after, only_after)):
        if cases:
            print(f"Only in {name}: {'; '.join(cases[:5])}{f' and {len(cases) - 5} more' if len(cases) > 5 else ''}.")
    shown = [d for d in differences if args.all or d.verdict in (WORSE, BETTER)]
    print_table(shown)
    counts = Counter(d.verdict for d in differences)
    print(
        f"{len(differences)} figures compared: "
        + ", ".join(f"{counts[v]} {v}" for v in (WORSE, BETTER, SAME, NOISY, FEW) if counts[v])
        + "."
    )
    noisy = [d.resolution_percent for d in differences if d.verdict == NOISY]
    if noisy:
        print(
            f"Too noisy means that changes below {median(noisy):.0f} % (their median) would not have been seen. Measure longer, on a "
            f"quieter machine, or both sides several times in turn: records of equal cases are put together."
        )
    if counts[FEW]:
        print(f"An interval needs at least {FEWEST_OF_BOTH} samples on both sides.")
    return 1 if counts[WORSE] else 0


def compare(
    before: list[dict[str, Any]], after: list[dict[str, Any]], threshold_percent: float = 5.0
) -> tuple[list[Difference], list[str], list[str]]:
    """(differences of every judged figure that both have, cases only before, cases only after)."""
    old, new = by_case(before), by_case(after)
    differences = []
    for key, (name, figures) in old.items():
        if key in new:
            for figure, value in figures.items():
                other = new[key][1].get(figure)
                if other and value["better"]:
                    differences.append(judge(name, figure, value, other, threshold_percent))
    return differences, [old[k][0] for k in old if k not in new], [new[k][0] for k in new if k not in old]


def by_case(rows: list[dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Case → (its name, its figures), samples of records of equal cases put together, beside the median of each record."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for row in rows:
        key = json.dumps([row["kind"], row["case"]], sort_keys=True)
        _, figures = cases.setdefault(key, (records.name_of_case(row), {}))
        for name, value in row["figures"].items():
            if name in figures:
                known = figures[name]
                medians = known["medians"] + [median(value["samples"])]
                figures[name] = {**value, "samples": known["samples"] + value["samples"], "medians": medians}
            else:
                figures[name] = {**value, "medians": [median(value["samples"])]}
    return cases


def judge(case: str, figure: str, before: dict[str, Any], after: dict[str, Any], threshold_percent: float) -> Difference:
    """Whether a figure changed, by the criterion of this module."""
    a, b = median(before["samples"]), median(after["samples"])
    exact = before.get("exact") and after.get("exact")
    moved, interval = (b - a, None) if exact else shift(before["samples"], after["samples"])
    percent = _percent(moved, a)
    common = (case, figure, before["unit"], a, b, percent)
    changed = WORSE if (moved > 0) == (before["better"] == "lower") else BETTER
    if exact:
        return Difference(*common, changed if abs(percent) > threshold_percent else SAME, threshold_percent)
    if interval is None:
        return Difference(*common, FEW, None)
    low, high = interval
    resolution = max(threshold_percent, _percent(max(moved - low, high - moved), a))
    if abs(percent) > threshold_percent and (low > 0 or high < 0):
        ours, theirs = before["medians"], after["medians"]
        agreed = min(theirs) > max(ours) if moved > 0 else max(theirs) < min(ours)
        return Difference(*common, changed if agreed else NOISY, resolution if agreed else abs(percent))
    return Difference(*common, SAME if resolution <= 2 * threshold_percent else NOISY, resolution)


def _percent(amount: float, whole: float) -> float:
    return 100 * amount / abs(whole) if whole else math.copysign(math.inf, amount) if amount else 0.0


def circumstances(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """What else differs between two sets of records, as sentences."""
    sentences = []
    for part in ("hardware", "versions"):
        ours, theirs = ({k: v for row in rows for k, v in row[part].items()} for rows in (before, after))
        changed = [k for k in {**ours, **theirs} if k != "load_1_minute" and ours.get(k) != theirs.get(k)]
        if changed:
            what = "; ".join(f"{k} {ours.get(k, 'absent')} → {theirs.get(k, 'absent')}" for k in changed)
            sentences.append(f"Not the same {part}: {what}.")
    for name, rows in (("A", before), ("B", after)):
        commits = ", ".join(dict.fromkeys(_commit(row) for row in rows))
        dates = sorted(row["date"] for row in rows)
        sentences.append(f"{name}: commit {commits}, {dates[0]}{'' if dates[0] == dates[-1] else f' to {dates[-1]}'}.")
        busiest = max(row["hardware"].get("load_1_minute", 0) / (row["hardware"].get("cores") or 1) for row in rows)
        if busiest > 1.5:
            sentences.append(f"{name} was measured on a busy machine (up to {busiest:.1f} processes waiting for each core).")
    return sentences


def _commit(row: dict[str, Any]) -> str:
    git = row["git"]
    return (git["commit"][:10] or "unknown") + (" with changes" if git["dirty"] else "")


def print_table(differences: list[Difference]) -> None:
    order = {WORSE: 0, BETTER: 1, NOISY: 2, FEW: 3, SAME: 4}
    for d in sorted(differences, key=lambda d: (order[d.verdict], -abs(d.percent))):
        print(f"{d.verdict:<15} {d.percent:+7.1f} %  {d.before:.5g} → {d.after:.5g} {d.unit}  {d.figure} of {d.case}")
