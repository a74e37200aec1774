"""``massl-fast bench everything``: correctness, then every benchmark and profile, in minutes."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from massl_fast.benchmarks import everything, records
from massl_fast.benchmarks.everything import GPU_ALONE, Outcome, Part, headlines, line_of, run_parts
from massl_fast.benchmarks.loader import write_images
from massl_fast.benchmarks.page import page_of
from massl_fast.hardware import device_slug

PAGE_SECONDS = 15.0  # kept for the page and the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", default="", help="folder for records, log and page (default: bench/results/DEVICE)")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for all parts together (default: 7.5)")
    parser.add_argument("--parts", nargs="+", default=[], help="words of the names of parts to run, correctness always (default: all)")
    parser.add_argument("--keep-going", action="store_true", help="time kernels even where they are wrong")
    parser.add_argument("--device", default="", choices=["", "cpu", "cuda"], help="(default: the GPU, else the CPU)")


def run(args: argparse.Namespace) -> int:
    if args.minutes <= 0:
        raise ValueError("--minutes takes more than 0.")
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not on_gpu:
        raise ValueError("--device is cuda, and torch finds no GPU here.")
    folder = Path(args.to or Path("bench", "results", device_slug() if on_gpu else "cpu"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").open("a").close()
    except OSError as error:
        raise ValueError(f"Nothing can be written to the folder {folder}: {error.strerror}. Name another with --to.") from None
    deadline = time.monotonic() + 60 * args.minutes - PAGE_SECONDS
    with tempfile.TemporaryDirectory(prefix="massl_fast_bench_") as images:
        write_images(Path(images), 256 if on_gpu else 32)
        parts = everything.parts(on_gpu, folder, images)
        chosen = [part for part in parts if not args.parts or not part.timing or any(word in part.name for word in args.parts)]
        outcomes = run_parts(chosen, folder, deadline, args.keep_going, on_gpu)
    if not on_gpu:
        outcomes += [Outcome(Part(name, (), 0), "left out", words="it needs a GPU") for name in GPU_ALONE]
    rows = records.read(folder) if list(folder.glob("*.jsonl")) else []
    if rows:
        (folder / "benchmarks.html").write_text(page_of(rows), encoding="utf-8")
    lines = [*map(line_of, outcomes), "", *headlines(rows)]
    print("\n" + "\n".join(lines))
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write("\n".join(lines) + "\n")
    print(f"Records, log and page: {folder}")
    return int(any(outcome.status in ("failed", "too long") for outcome in outcomes))
