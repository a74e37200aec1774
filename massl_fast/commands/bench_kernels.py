"""``massl-fast bench kernels``: time loss, read-out, enqueue and partition beside their peers."""

from __future__ import annotations

import argparse
import os

import torch

from massl_fast.benchmarks import beside, kernels
from massl_fast.benchmarks.beside import DTYPES
from massl_fast.benchmarks.kernels import RESULTS, check_names, chosen_cases, slug
from massl_fast.commands.arguments import keeping, keeps_records
from massl_fast.hardware import chosen_device, processor_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    operations = ["loss", "readout", "enqueue", "partition"]
    parser.add_argument("--cases", nargs="+", default=operations, choices=operations, help="what to measure (default: all)")
    parser.add_argument(
        "--variants", nargs="+", default=[], help="words of the names of variants to measure, baselines always (default: all)"
    )
    parser.add_argument("--student-views", type=int, default=12, help="V (default: 12)")
    parser.add_argument("--teacher-views", type=int, default=2, help="T (default: 2)")
    parser.add_argument("--images", nargs="+", type=int, default=[], help="N (default: 64 and 512 on a GPU, else 64)")
    parser.add_argument("--entries", nargs="+", type=int, default=[], help="K (default: 65536 and 131072 on a GPU, else 65536)")
    parser.add_argument("--block", type=int, default=16384, help="entries of a block (default: 16384)")
    parser.add_argument("--width", type=int, default=256, help="D (default: 256)")
    parser.add_argument("--dtype", default="", choices=["", *DTYPES], help="of rows and memory (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--rounds", type=int, default=0, help="calls of each variant (default: 30 on a GPU, else 9)")
    parser.add_argument(
        "--compile", action="store_true", help="the reference under torch.compile in every case (default: on a GPU in the last of them)"
    )
    parser.add_argument("--quick", action="store_true", help="N = 8, K = 8192, block 2048, 5 rounds: does it run")
    parser.add_argument("--device", default="", help="device (default: the GPU, else the CPU)")
    keeps_records(parser, f"{RESULTS}/DEVICE/kernels.jsonl")


def run(args: argparse.Namespace) -> int:
    device = chosen_device(args.device)
    cases, rounds = chosen_cases(args, device), args.rounds or (5 if args.quick else 30 if device.type == "cuda" else 9)
    args.output = args.output or str(RESULTS / slug(device) / "kernels.jsonl")
    # Compiling for one shape takes as long as measuring two: once, and last, so that what is known before it is on the disk.
    compiled = [args.compile or (device.type == "cuda" and number == len(cases)) for number in range(1, len(cases) + 1)]
    wrong = 0
    with keeping(args) as keep:
        check_names(cases, args.variants, any(compiled), device)
        print(f"{processor_name() if device.type == 'cpu' else torch.cuda.get_device_name(device)}, torch {torch.__version__}", end=", ")
        print(f"{torch.get_num_threads()} threads, {rounds} rounds, load {os.getloadavg()[0]:.1f}")
        for case, with_compiled in zip(cases, compiled):
            rows, mistakes = beside.measure(kernels, case, rounds, device, args.variants, with_compiled)
            wrong += len(mistakes)
            for row in rows:
                keep(row)
        if wrong:
            print(f"{wrong} results are wrong; they have no time.")
    return int(wrong > 0)
