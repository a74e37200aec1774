"""The book of a step in words and as a record: whose the bytes are at the peak, the way there, and what lies beside."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from massl_fast import records
from massl_fast.config import Config
from massl_fast.profiling import ledger
from massl_fast.profiling.estimate import MIB, Estimate, gib, precision_on
from massl_fast.profiling.ledger import Change, Peak, Piece, highest_by_section, timeline
from massl_fast.profiling.memory import Measured

BAR = 40
"""Characters of the longest bar."""
COLUMNS = 120
MIN_LEAK = 4096  # bytes per step


def table(columns: dict[str, dict[str, int]], totals: dict[str, int], first: str) -> list[str]:
    """Lines of a table of MiB, a row an owner: columns by name, the last with its share of ``totals``; none below 0.05 MiB."""
    names = in_order({name: 0 for column in columns.values() for name in column})
    width = max(len(name) for name in [*names, first]) + 2
    last = list(columns)[-1]
    lines = [f"{first:<{width}}" + "".join(f"{title:>12}" for title in columns) + f"{'share':>9}"]
    for name in [*names, "peak"]:
        values = [(totals if name == "peak" else column).get(title if name == "peak" else name, 0) for title, column in columns.items()]
        if max(values) >= 0.05 * MIB:
            cells = "".join(f"{value / MIB:>12,.1f}" for value in values)
            lines.append(f"{name:<{width}}{cells}{100 * values[-1] / max(1, totals[last]):>7.1f} %")
    return lines


def peak_sentence(peak: Peak) -> str:
    if peak.last is None:
        return "Nothing was allocated."
    made = peak.last
    where = f" at {made.line}" if made.line else ""
    return f"The peak comes in '{peak.section}', when {made.operator or 'a tensor'}{where} takes {gib(made.bytes)}."


def largest_pieces(pieces: list[Piece], most: int = 6) -> list[str]:
    """Storages of equal shape, operator and owner taken together."""
    groups: dict[tuple, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.owner.split(":")[0], piece.operator, piece.shape, piece.line].append(piece)
    ordered = sorted(groups.items(), key=lambda item: -sum(piece.bytes for piece in item[1]))
    lines = []
    for (owner, operator, shape, line), members in ordered[:most]:
        made = " ".join(part for part in (operator, f"at {line}" if line else "") if part)
        size = sum(piece.bytes for piece in members)
        lines.append(f"{size / MIB:>9,.1f} MiB  {owner}, {len(members)} × {list(shape)}" + (f", by {made}" if made else ""))
    return lines


def way_through(changes: list[Change], always: int = 0) -> list[str]:
    """The highest moment of each part of a step, in order, with bars from zero; ``always`` bytes are added to each."""
    heights = {name: size + always for name, size in highest_by_section(changes).items()}
    top = max(heights.values(), default=1)
    return [f"  {name:<20}{size / MIB:>10,.1f} MiB  {'█' * max(1, round(BAR * size / top))}" for name, size in heights.items()]


def memory_lines(estimate: Estimate, measured: Measured | None) -> list[str]:
    """The book as lines of text."""
    if measured is None:
        return estimate_lines(estimate)
    inside = max(0, measured.peak_bytes - measured.peak.bytes)
    columns = {"estimated": estimate.by_owner, "measured": measured.peak.by_owner | {"inside operators": inside}}
    lines = table(columns, {"estimated": estimate.bytes, "measured": measured.peak_bytes}, "At the peak, MiB")
    lines.append(f"The estimate is {100 * (estimate.bytes / measured.peak_bytes - 1):+.1f} % off the measured peak.")
    lines += [*story_of(measured.peak, measured.changes, ", measured"), *beside_lines(measured.rest)]
    if estimate.beside:
        lines.append("Estimated of these: " + ", ".join(f"{name} {gib(size)}" for name, size in estimate.beside.items()) + ".")
    return lines + leak_sentences(measured)


def estimate_lines(estimate: Estimate) -> list[str]:
    """An estimate alone: the book at its peak, the way there and what lies beside."""
    lines = table({"estimated": estimate.by_owner}, {"estimated": estimate.bytes}, "At the peak, MiB")
    lines += story_of(estimate.peak, estimate.changes, always=sum(estimate.extras.values()))
    if estimate.beside:
        lines += beside_lines(estimate.beside)
        lines.append(f"{(estimate.bytes + sum(estimate.beside.values())) / MIB:>9,.1f} MiB  of the device in all, estimated")
    return lines


def story_of(peak: Peak, changes: list[Change], how: str = "", always: int = 0) -> list[str]:
    """What makes the peak, and the way there; ``always`` bytes are added to each part's."""
    head = f"Highest in each part of a step{how} (parts that allocate nothing are not listed):"
    return [peak_sentence(peak), "Largest storages at that moment:", *largest_pieces(peak.pieces), head, *way_through(changes, always)]


def beside_lines(sizes: dict[str, int]) -> list[str]:
    lines = [f"{size / MIB:>9,.1f} MiB  {name}" for name, size in sizes.items()]
    return ["Beside the step's own bytes, not in the peak above:", *lines]


def leak_sentences(measured: Measured) -> list[str]:
    growing = [size for size in measured.growth if size >= MIN_LEAK]
    if len(growing) < len(measured.growth) or not growing:
        return [f"No leak: {len(measured.growth)} steps in a row ended with as much memory as they began with."]
    lines = [f"Leak: each step ends with about {gib(sum(growing) / len(growing))} more than the one before it."]
    for leak in measured.leaks[:5]:
        where = f" at {leak.line}" if leak.line else ""
        lines.append(f"  {gib(leak.bytes_per_step)} per step made by {leak.operator}{where}, in '{leak.section}', outlive their step.")
        lines.append(f"    Kept by {leak.referrer or 'no Python object that could be found'}.")
    return lines


def as_record(
    config: Config, recipe: str, device_type: str, estimate: Estimate, measured: Measured | None, prediction: dict[str, Any] | None
) -> dict[str, Any]:
    case = {
        "recipe": Path(recipe).stem,
        "architecture": config.model.architecture,
        "batch": estimate.device_batch,
        "accumulation": estimate.accumulation,
        "precision": precision_on(config, device_type).name,
        "memory": getattr(config.objective, "memory_size", 0),
        "device": device_type,
    }
    figures = {"estimated_peak": records.figure(estimate.bytes / MIB, "MiB", exact=True)}
    details: dict[str, Any] = {"estimated": in_order(estimate.by_owner), "estimated_timeline": timeline(estimate.changes)}
    details["estimated_peak_section"] = estimate.peak.section
    if measured:
        figures["measured_peak"] = records.figure(measured.peak_bytes / MIB, "MiB", "lower", exact=True)
        figures["estimate_error"] = records.figure(100 * (estimate.bytes / measured.peak_bytes - 1), "%", exact=True)
        details |= {
            "measured": in_order(measured.peak.by_owner) | {"inside operators": max(0, measured.peak_bytes - measured.peak.bytes)},
            "measured_timeline": timeline(measured.changes),
            "peak_section": measured.peak.section,
            "largest": largest_pieces(measured.peak.pieces, 10),
            "rest": measured.rest,
            "leaks": leak_sentences(measured),
        }
    if prediction:
        details["prediction"] = prediction
    return records.record("memory", case, figures, details)


def folded(lines: Iterable[str]) -> str:
    """Lines as text of at most ``COLUMNS`` characters a line, continued further in; a longer word stays whole."""
    text = []
    for line in lines:
        inward = " " * (len(line) - len(line.lstrip()) + 4)
        text += textwrap.wrap(line, COLUMNS, subsequent_indent=inward, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join(text)


def in_order(sizes: dict[str, int]) -> dict[str, int]:
    """Sizes by category as in the ledger, and activations by the way through the network."""

    def rank(name: str) -> int:
        return next((rank for rank, category in enumerate(ledger.CATEGORIES) if name.startswith(category)), len(ledger.CATEGORIES))

    return dict(sorted(sizes.items(), key=lambda item: (rank(item[0]), natural(item[0]))))


def natural(name: str) -> list[Any]:
    """A sort key that puts block 10 after block 9, the embedding before the blocks and the head last."""
    part = name.partition(": ")[2]
    place = 0 if part == "embedding" else 2 if part in ("pooling", "head") else 1
    return [place, part == "head", [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]]
