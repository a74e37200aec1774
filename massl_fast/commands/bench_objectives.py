"""``massl-fast bench objectives``: time the other losses beside the published way."""

from __future__ import annotations

import argparse
from dataclasses import replace

from massl_fast.benchmarks import beside, objectives
from massl_fast.benchmarks.beside import DTYPES
from massl_fast.benchmarks.kernels import RESULTS, slug
from massl_fast.benchmarks.objectives import CASES, QUICK
from massl_fast.commands.arguments import keeping, keeps_records
from massl_fast.hardware import chosen_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [case.loss for case in CASES]
    parser.add_argument("--losses", nargs="+", default=names, choices=names, help="which losses (default: all)")
    parser.add_argument("--images", type=int, default=0, help="N of dino and carp (default: 16 and 32)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of rows and prototypes (default: float32)")
    parser.add_argument("--rounds", type=int, default=0, help="calls of each way (default: 30 on a GPU, else 5)")
    parser.add_argument("--quick", action="store_true", help="small shapes, 3 rounds: does it run")
    parser.add_argument("--device", default="", help="device (default: the GPU, else the CPU)")
    keeps_records(parser, f"{RESULTS}/DEVICE/objectives.jsonl")


def run(args: argparse.Namespace) -> int:
    device = chosen_device(args.device)
    if args.rounds < 0 or args.images < 0:
        raise ValueError(f"--rounds and --images take no negative number; found {args.rounds} and {args.images}.")
    rounds = args.rounds or (3 if args.quick else 30 if device.type == "cuda" else 5)
    args.output = args.output or str(RESULTS / slug(device) / "objectives.jsonl")
    wrong = 0
    with keeping(args) as keep:
        for case in (c for c in CASES if c.loss in args.losses):
            changes = dict(QUICK.get(case.loss, {})) if args.quick else {}
            if args.images and case.N and case.loss != "ibot":
                changes["N"] = args.images
            rows, mistakes = beside.measure(objectives, replace(case, **changes, dtype=args.dtype), rounds, device)
            wrong += len(mistakes)
            for row in rows:
                keep(row)
        if wrong:
            print(f"{wrong} results are wrong; they have no time.")
    return int(wrong > 0)
