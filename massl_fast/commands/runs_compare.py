"""``massl-fast runs compare RUN RUN ...``: the curves of several runs on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from massl_fast.report.comparison import write_comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw the curves of several runs, finished or not, on one HTML page that needs no network, with the settings\n"
        "in which they differ. Only the run folders are read."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, for example runs/demo runs/demo.1")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), metavar="FILE", help="default: comparison.html")


def run(args: argparse.Namespace) -> int:
    print(write_comparison(args.runs, args.output))
    return 0
