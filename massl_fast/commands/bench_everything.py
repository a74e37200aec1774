"""``massl-fast bench everything``: the tests that need a GPU, then every benchmark and profile, within eight minutes."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from massl_fast.benchmarks import everything
from massl_fast.benchmarks.everything import IN_A_REHEARSAL, clocks, line_of, obstacle, read_whole, run_parts, summary
from massl_fast.hardware import device_slug

MINUTES = 8.0
START_SECONDS, PAGE_SECONDS = 10.0, 15.0
"""What the imports of this program took, and what is kept for page and summary."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", default="", help="folder for records, logs, summary and page (default: bench/results/DEVICE)")
    parser.add_argument(
        "--minutes", type=float, help=f"time for all of it (default: {MINUTES:g}, of a rehearsal {MINUTES * IN_A_REHEARSAL:g})"
    )
    parser.add_argument("--parts", nargs="+", default=[], help="words of the names of parts to run (default: all)")
    parser.add_argument("--device", default="", choices=["", "cpu", "cuda"], help="cpu: a rehearsal in small (default: the GPU if any)")


def run(args: argparse.Namespace) -> int:
    if args.minutes is not None and args.minutes <= 0:
        raise ValueError("--minutes takes more than 0.")
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not on_gpu:
        raise ValueError("--device is cuda, and torch finds no GPU here.")
    folder = Path(args.to or Path("bench", "results", device_slug() if on_gpu else "cpu")).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "records.jsonl").open("a").close()
    except OSError as error:
        raise ValueError(f"Nothing can be written to the folder {folder}: {error.strerror}. Name another with --to.") from None
    chosen = [part for part in everything.PARTS if not args.parts or any(word in part.name for word in args.parts)]
    if not chosen:
        raise ValueError(
            f"--parts: no part has {', '.join(args.parts)} in its name; there are {'; '.join(p.name for p in everything.PARTS)}."
        )
    minutes = args.minutes or MINUTES * (1.0 if on_gpu else IN_A_REHEARSAL)
    deadline = time.monotonic() + 60 * minutes - START_SECONDS - PAGE_SECONDS
    with tempfile.TemporaryDirectory(prefix="massl_fast_bench_") as images, clocks(folder):
        if any("{images}" in part.on_gpu and not obstacle(part, on_gpu) for part in chosen):
            from massl_fast.benchmarks.loader import write_images

            write_images(Path(images), 256 if on_gpu else 8)
        outcomes = run_parts(chosen, folder, deadline, on_gpu, images)
    rows = read_whole(folder / "records.jsonl")
    (folder / "summary.md").write_text(summary(outcomes, rows), encoding="utf-8")
    page = ""
    try:
        from massl_fast.benchmarks.page import page_of

        if rows:
            (folder / "benchmarks.html").write_text(page_of(rows), encoding="utf-8")
            page = ", page"
    except (ImportError, ValueError) as error:  # the records are whole without
        print(f"No page: {error} Elsewhere: massl-fast bench page {folder}.")
    print("\n" + "\n".join([*map(line_of, outcomes), "", *everything.headlines(rows)]))
    if advice := everything.advice(outcomes):
        print(f"\n{advice}")
    print(f"Records, logs, summary{page}: {folder}")
    return int(any(outcome.status == "failed" for outcome in outcomes))
