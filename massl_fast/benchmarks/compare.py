"""What differs between two records beyond the noise, for pull requests and CI.

A figure counts as changed where three things hold: it shifted by more than ``--threshold`` percent; the 99.9% interval of the shift
(intervals.shift) lies on one side of zero; and of a case that was measured several times, every record of B lies on that side of every
record of A. A figure whose interval is too wide to show a change of twice the threshold, or whose records contradict each other, is called
too noisy, which is not the same as unchanged. Exact figures (bytes, counts) need no interval. Exit code 1: something got worse.

The interval speaks of what varies within a record. What changed between two records beside the code (clocks, heat, other work) shows only
in several: take both in turn (A, B, A, B), or judge by the figures that are ratios within a round (``--figures ratio``).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from massl_fast import records
from massl_fast.benchmarks.intervals import shift

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
            known = figures.get(name, {"samples": [], "medians": []})
            medians = known["medians"] + [median(value["samples"])]
            figures[name] = {**value, "samples": known["samples"] + value["samples"], "medians": medians}
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
