"""``massl-fast inspect``: resources of the fused kernels, or a model of their speed; compiled here, no GPU needed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import triton

from massl_fast.kernels import machine_code

UNITS = ("tensor_cores", "transcendental", "issue", "shared_memory", "second_cache")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    architectures = list(machine_code.ARCHITECTURES)
    parser.add_argument("--arch", choices=architectures, default="sm_90", help="architecture to compile for (default: sm_90)")
    parser.add_argument("--model", action="store_true", help="clocks per unit of the inner loop instead, and the share that follows")
    parser.add_argument("--json", action="store_true", help="print one JSON array of rows")


def run(args: argparse.Namespace) -> int:
    """Print the resources of every shipped configuration, or the model of its speed; 0 if each keeps its registers, else 1."""
    if args.model:
        rows = machine_code.modelled(args.arch)
        print(json.dumps(rows, indent=1) if args.json else "\n".join(model_lines(args.arch, rows)))
        return 0
    found = [machine_code.resources(variant, args.arch) for variant in machine_code.shipped(args.arch)]
    print(json.dumps([asdict(row) for row in found], indent=1) if args.json else "\n".join(resource_lines(args.arch, found)))
    return int(any(row.spill_bytes for row in found))


def resource_lines(arch: str, rows: list[machine_code.Resources]) -> list[str]:
    lines = [f"{arch}, Triton {triton.__version__}"]
    lines.append(f"{'configuration':62} {'regs':>4} {'spill':>5} {'shared':>7} {'mma':>4} {'async':>5} {'buffers':>7} {'occupancy':>9}")
    for row in rows:
        lines.append(
            f"{row.configuration:62} {row.registers:4} {row.spill_bytes:5} {row.shared_bytes:7} "
            f"{row.tensor_core_instructions:4} {row.async_copy_instructions:5} {row.pipeline_buffers:7} {row.occupancy_percent:8}%"
        )
    return lines


def model_lines(arch: str, rows: list[dict]) -> list[str]:
    lines = [
        f"{arch}, Triton {triton.__version__}: a model, not a measurement. Clocks of one multiprocessor per turn of the inner loop,",
        "each unit at its peak; share of the nominal rate where products and the rest take turns, and where the busiest never waits.",
        f"{'configuration':62}" + "".join(f"{unit.replace('_', ' '):>15}" for unit in UNITS) + f"{'share':>14}",
    ]
    for row in rows:
        share = f"{row['share_in_turns_percent']:.0f} to {row['share_overlapped_percent']:.0f}%"
        lines.append(f"{row['configuration']:62}" + "".join(f"{row[unit]:15.0f}" for unit in UNITS) + f"{share:>14}")
    return lines
