"""``massl-fast bench step``: time a training step on random crops, part by part; or find the micro-batch with the best rate."""

from __future__ import annotations

import argparse

from massl_fast.benchmarks.step import describe, measure, search
from massl_fast.commands.arguments import keeping, keeps_records, takes_a_run
from massl_fast.config import load_config
from massl_fast.distributed.world import join_world
from massl_fast.models.precision import choose_precision

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    takes_a_run(parser, "bench step", "[--search-batch] [--output FILE]")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure for; at least 8 rounds are taken (default: 20)")
    parser.add_argument("--search-batch", action="store_true", help="find the micro-batch with the best rate and the largest that fits")
    parser.add_argument("--max-batch", type=int, default=None, help="largest that the search tries (default: 64 on a CPU, 65536 on a GPU)")
    keeps_records(parser)


def run(args: argparse.Namespace) -> int:
    if args.seconds <= 0 or (args.max_batch is not None and args.max_batch < 1):
        raise ValueError("--seconds takes more than 0, --max-batch at least 1.")
    with keeping(args) as keep:
        config = load_config(args.recipe, args.settings)
        world = join_world(config.train.device)
        precision = choose_precision(config.train.precision, world.device)
        print(describe(config, precision, world))
        if args.search_batch:
            most = args.max_batch or (65536 if world.device.type == "cuda" else 64)
            keep(search(config, args.recipe, world, precision, most))
        else:
            row, lines = measure(config, args.recipe, world, precision, args.seconds)
            print("\n".join(lines))
            keep(row)
    return 0
