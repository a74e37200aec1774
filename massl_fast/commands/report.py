"""``massl-fast report RUN``: write report.html of a run anew, from its folder alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from massl_fast.hardware import chosen_device
from massl_fast.report.page import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write report.html of a run, finished or not: settings, curves, k-NN over time, and attention\n"
        "maps and nearest neighbours computed from its last checkpoint."
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder, for example runs/demo")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--max-train-images",
        type=int,
        metavar="N",
        help="search neighbours among a fixed random subset of N training images; 0: all (default: 20000 on a GPU, 4000 on a CPU)",
    )


def run(args: argparse.Namespace) -> int:
    print(write_report(args.run_folder, max_train_images=args.max_train_images, device=chosen_device(args.device)))
    return 0
