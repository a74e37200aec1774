"""``massl-fast runs [FOLDER ...]``: all runs below folders as a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from massl_fast.run.catalogue import Entry, differing, entry_of, find_runs

LONGEST_VALUE = 60
WIDTH_OF_FILES = 200


def _rounded(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


# Name of a column: title, what it is sorted by, what it shows. Numbers come largest first, words in alphabetical order.
COLUMNS: dict[str, tuple[str, Callable[[Entry], Any], Callable[[Entry], str]]] = {
    "name": ("run", lambda e: e.name, lambda e: e.name),
    "objective": ("objective", lambda e: e.objective, lambda e: e.objective or "–"),
    "network": ("network", lambda e: e.network, lambda e: e.network or "–"),
    "data": ("data", lambda e: e.data, lambda e: "/".join(Path(e.data).parts[-2:]) or "–"),
    "steps": ("steps", lambda e: e.step, lambda e: f"{e.step}/{'?' if e.total_steps is None else e.total_steps}"),
    "speed": ("images/s", lambda e: e.images_per_second, lambda e: _rounded(e.images_per_second)),
    "knn": ("k-NN %", lambda e: e.knn_percent, lambda e: _rounded(e.knn_percent)),
    "linear": ("linear %", lambda e: e.linear_percent, lambda e: _rounded(e.linear_percent)),
    "state": ("state", lambda e: e.state, lambda e: f"{e.state} since {e.since.replace('T', ' ')}" if e.since else e.state),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List all runs below folders: objective, network, data, steps, speed, k-NN, linear probe and state, and the\n"
        "settings in which they differ. States: complete; running; stopped as set (train.stop_at_step); stopped, by a\n"
        "signal or an error, after a last checkpoint; dead, which left its lock behind. The same command continues a run."
    )
    parser.epilog = "massl-fast runs compare RUN RUN ... draws their curves on one page."
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], metavar="FOLDER", help="where to look (default: runs)")
    parser.add_argument("--sort", choices=tuple(COLUMNS), default="name", help="column to sort by (default: name)")
    parser.add_argument("--reverse", action="store_true", help="turn the order around")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of tables, settings included")


def run(args: argparse.Namespace) -> int:
    entries = in_order([entry_of(path) for path in find_runs(args.folders)], args.sort, args.reverse)
    if args.json:
        print(json.dumps([asdict(entry) for entry in entries]))
        return 0
    if not entries:
        print(f"There are no runs below {', '.join(map(str, args.folders))}. massl-fast train makes one; its folder is run.folder.")
        return 0
    # Into a file or a pipe goes the whole table, whatever the width of the terminal.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
    console.print(table_of(entries))
    if differences := differing([entry.settings for entry in entries]):
        console.print(differences_table(differences))
    return 0


def in_order(entries: Sequence[Entry], column: str, reverse: bool) -> list[Entry]:
    """Sorted by a column; runs that have no value there come last either way."""
    value = COLUMNS[column][1]
    known = [entry for entry in entries if value(entry) is not None]
    largest_first = bool(known) and not isinstance(value(known[0]), str)
    unknown = [entry for entry in entries if value(entry) is None]
    return sorted(known, key=value, reverse=largest_first != reverse) + unknown


def table_of(entries: Sequence[Entry]) -> Table:
    """One row per run, numbered. Where the terminal is narrow, names take several lines and figures stay whole."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="right", no_wrap=True)
    for name, (title, _, _) in COLUMNS.items():
        figures = name in ("steps", "speed", "knn", "linear")
        table.add_column(title, justify="right" if figures else "left", no_wrap=figures or name in ("objective", "state"), overflow="fold")
    for number, entry in enumerate(entries, start=1):
        table.add_row(str(number), *(escape(shown(entry)) for _, _, shown in COLUMNS.values()))
    return table


def differences_table(differences: dict[str, list[tuple[str, list[int]]]]) -> Table:
    """One row per setting: each value with the numbers of the runs that have it."""
    table = Table(box=None, pad_edge=False, header_style="bold", title="Settings that differ", title_justify="left", title_style="")
    table.add_column("setting", no_wrap=True)
    table.add_column("value: runs", overflow="fold")
    for key, values in differences.items():
        table.add_row(key, escape(" · ".join(f"{_short(value)}: {_ranges(where)}" for value, where in values)))
    return table


def _ranges(positions: Sequence[int]) -> str:
    """Numbers of runs, from 1: [0, 1, 2, 5] is 1-3, 6."""
    runs = [[number for _, number in group] for _, group in groupby(enumerate(positions, start=1), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0] + 1}-{run[-1] + 1}" if len(run) > 1 else str(run[0] + 1) for run in runs)


def _short(value: str) -> str:
    value = value or "empty"
    return value if len(value) <= LONGEST_VALUE else value[: LONGEST_VALUE - 1] + "…"
