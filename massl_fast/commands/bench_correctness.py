"""``massl-fast bench correctness``: the kernels on this device against float64. Exit code 1: something is wrong."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from massl_fast.benchmarks import correctness
from massl_fast.commands.arguments import keeping, keeps_records
from massl_fast.hardware import chosen_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small cases alone")
    parser.add_argument("--device", default="", help="device (default: the GPU, else the CPU)")
    keeps_records(parser)


def run(args: argparse.Namespace) -> int:
    device = chosen_device(args.device)
    with keeping(args) as keep:
        mistakes, count, absent = 0, 0, {}
        for case in correctness.cases(device, args.quick):
            rows, reasons, missing = correctness.check(case, device)
            name = ", ".join(f"{key} {value}" for key, value in asdict(case).items())
            for word, of in reasons.items():
                for variant, why in of.items():
                    print(f"{word:<6} {variant}: {name}: {why}", flush=True)
                    mistakes += variant not in correctness.PEERS
            absent |= missing
            for row in rows:
                keep(row)
                count += row["case"]["variant"] not in correctness.PEERS
        for variant, why in absent.items():
            print(f"Not checked: {variant}. {why[0].upper()}{why[1:]}.")
        print(f"{count} results checked against float64 on {device}, {mistakes} wrong.")
    return int(mistakes > 0)
