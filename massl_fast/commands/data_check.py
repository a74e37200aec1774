"""``massl-fast data check PATH``: find unreadable, tiny, duplicated and rotated images."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path

from massl_fast.data.bad_files import UNREADABLE, format_line
from massl_fast.data.check import PROBLEMS, check_source
from massl_fast.data.sources import open_source

HEADER = """\
# massl-fast data check {path}
# {checked} images checked, {count} problems: name, problem, detail, between tabs. Training with data.bad_files set to this file leaves
# out the images called unreadable; to leave out another, put its name on a line of its own.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a folder of class folders, a folder of images, WebDataset tars or Parquet")
    parser.add_argument(
        "--output", default="bad_files.txt", help="the list to write, for data.bad_files (default: bad_files.txt in this folder)"
    )
    parser.add_argument("--smallest", type=int, default=32, help="a side shorter than this many pixels is tiny (default: 32)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def run(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; at least one process must do the work.")
    output = Path(args.output)
    if not output.parent.is_dir():
        raise ValueError(f"The list cannot be written to {output}: there is no folder {output.parent}.")
    source = open_source(args.path)
    found = check_source(source, smallest=args.smallest, workers=args.workers, show_progress=not args.json)
    text = HEADER.format(path=args.path, checked=len(source), count=len(found)) + "".join(format_line(*row) for row in found)
    try:
        output.write_bytes(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise ValueError(f"The list cannot be written to {output}: {error.strerror}.") from None
    counts = Counter(problem for _, problem, _ in found)
    if args.json:
        print(json.dumps({"images": len(source), "list": str(output), "notes": source.notes} | {p: counts[p] for p in PROBLEMS}))
        return 0
    for note in source.notes:
        print(note)
    listed = f"{output} names them." if found else f"{output} is an empty list."
    print(f"{len(source)} images: " + ", ".join(f"{counts[p]} {p.replace('_', ' ')}" for p in PROBLEMS) + f". {listed}")
    if counts[UNREADABLE]:
        print(f"Train with --data.bad_files {output} to leave out the unreadable ones from the start.")
    return 0
