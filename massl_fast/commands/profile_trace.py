"""``massl-fast profile trace``: trace steps; parts, operators, gaps, and lines that wait for the device."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from massl_fast import records
from massl_fast.benchmarks.step import WARM_UP, case_of, describe
from massl_fast.commands.arguments import prints_json, sentences_aside, takes_a_run
from massl_fast.config import load_config
from massl_fast.distributed.world import join_world
from massl_fast.models.precision import choose_precision
from massl_fast.profiling.memory_report import folded
from massl_fast.profiling.out_of_memory import demand_host_memory, explained
from massl_fast.profiling.synthetic import micro_batches_of, synthetic_run
from massl_fast.profiling.trace import lines_of, trace_steps
from massl_fast.profiling.waits import find_waits

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    takes_a_run(parser, "profile trace", "[--steps N] [--to FOLDER] [--top N]")
    parser.add_argument("--steps", metavar="N", type=int, default=3, help=f"steps to trace, after {WARM_UP} to warm up (default: 3)")
    parser.add_argument("--to", metavar="FOLDER", default="", help="folder for the trace and the record (default: runs/RECIPE/trace)")
    parser.add_argument("--top", metavar="N", type=int, default=12, help="operators in the table (default: 12)")
    prints_json(parser, "the record")


def run(args: argparse.Namespace) -> int:
    if args.steps < 1 or args.top < 1:
        raise ValueError("--steps and --top take at least 1.")
    config = load_config(args.recipe, args.settings)
    world = join_world(config.train.device)
    precision = choose_precision(config.train.precision, world.device)
    folder = Path(args.to or f"runs/{Path(args.recipe).stem}/trace")
    make_writable(folder)
    demand_host_memory(config, world)
    accumulation, batch = micro_batches_of(config)
    with sentences_aside(args):
        print(folded([f"{describe(config, precision, world)}; {batch} images per micro-batch × {accumulation}"]))
        with explained(config, world):
            synthetic = synthetic_run(config, world, precision, device_batch=batch, accumulation=accumulation)
            for _ in range(WARM_UP):
                synthetic.step()
            found = trace_steps(synthetic, args.steps, folder / "trace.json.gz")
            waits = find_waits(synthetic)
        print(folded(lines_of(found, waits, args.top)))
        details = {
            "operators": [vars(row) for row in found.operators[: args.top]],
            "parts": found.parts,
            "gaps": asdict(found.gaps) if found.gaps else None,
            "waits": [vars(wait) for wait in waits],
            "steps": args.steps,
        }
        figures = {"waits_per_step": records.figure(sum(wait.count for wait in waits), "1", "lower", exact=True)}
        if found.gaps:
            figures["device_idle"] = records.figure(100 * found.gaps.idle_share, "%")
        row = records.record("trace", case_of(config, args.recipe, precision, batch, accumulation, world.device), figures, details)
        records.append(folder / "trace.jsonl", [row])
        print(f"Trace: {folder / 'trace.json.gz'} (ui.perfetto.dev opens it); record: {folder / 'trace.jsonl'}")
    if args.json:
        print(json.dumps([row]))
    return 0


def make_writable(folder: Path) -> None:
    """Make the folder before minutes are spent on what could not be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"Nothing can be written to the folder {folder}: {error.strerror}. Name another with --to.") from None
