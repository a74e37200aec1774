"""``massl-fast bench page``: draw records as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from massl_fast import records
from massl_fast.benchmarks.page import page_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", help="files of records, or folders of them")
    parser.add_argument("--output", default="", help="the page (default: benchmarks.html beside the first record)")


def run(args: argparse.Namespace) -> int:
    rows = [row for path in args.records for row in records.read(path)]
    first = Path(args.records[0])
    output = Path(args.output) if args.output else (first if first.is_dir() else first.parent) / "benchmarks.html"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page_of(rows), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The page cannot be written to {output}: {error.strerror}. Name another place with --output.") from None
    print(output)
    return 0
