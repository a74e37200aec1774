"""``massl-fast profile memory``: whose every byte of a training step is, estimated from shapes before it runs, then measured."""

from __future__ import annotations

import argparse
import math

import torch

from massl_fast.commands.arguments import keeping, keeps_records, takes_a_run
from massl_fast.config import load_config
from massl_fast.distributed.world import join_world
from massl_fast.profiling import ledger
from massl_fast.profiling.estimate import GIB, capacity, estimate_step, gib, precision_on
from massl_fast.profiling.memory import measure, predict
from massl_fast.profiling.memory_report import as_record, folded, memory_lines
from massl_fast.profiling.out_of_memory import demand_host_memory, explained
from massl_fast.profiling.synthetic import micro_batches_of

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    takes_a_run(parser, "profile memory", "[--estimate] [--device-gib G] [--no-largest] [--loader] [--output FILE]")
    parser.add_argument("--estimate", action="store_true", help="only estimate; with --train.device cuda also where there is no GPU")
    parser.add_argument(
        "--device-gib", metavar="G", type=float, default=0, help="predict the largest batch for a device of G GiB (default: this one)"
    )
    parser.add_argument("--no-largest", action="store_true", help="do not predict the largest batch, which takes several estimates")
    parser.add_argument("--loader", action="store_true", help="also start the run's loader and count what it takes")
    keeps_records(parser)
    parser.epilog += (
        " For example, for a GPU that is not here:\n"
        "  massl-fast profile memory --recipe vit_small_in1k --train.device cuda --train.micro_batch 64 --estimate --device-gib 32"
    )


def run(args: argparse.Namespace) -> int:
    config = load_config(args.recipe, args.settings)
    if not 0 <= args.device_gib < math.inf:
        raise ValueError(f"--device-gib is {args.device_gib:g}; it takes a number of GiB, or 0 for the memory of this device.")
    here = config.train.device != "cuda" or torch.cuda.is_available()
    if not here and not args.estimate:
        raise ValueError("train.device is cuda, but PyTorch finds no GPU here. Add --estimate to have the estimate alone.")
    device_type = "cuda" if config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available()) else "cpu"
    accumulation, batch = micro_batches_of(config)
    precision = precision_on(config, device_type)
    with keeping(args) as keep:
        print(
            f"{config.model.architecture}, {batch} images per micro-batch × {accumulation}, 2 crops of {config.crops.global_size} px and "
            f"{config.crops.num_local} of {config.crops.local_size} px, {precision.name} ({precision.reason}), {device_type}"
        )
        # Micro-batches after the second only add crops, so no more than two are run.
        passes = min(accumulation, 2)
        estimate = estimate_step(config, device_type=device_type, device_batch=batch, accumulation=passes)
        measured = None
        if not args.estimate:
            world = join_world(config.train.device)
            demand_host_memory(config, world, estimate)
            with explained(config, world):
                measured = measure(config, world, device_batch=batch, accumulation=passes, with_loader=args.loader)
        print(folded(memory_lines(estimate, measured)))
        if accumulation > passes:
            more = (accumulation - passes) * estimate.peak.by_category[ledger.CROPS] // passes
            print(f"The table shows {passes} micro-batches; the other {accumulation - passes} of a step add {gib(more)} of crops.")
        total = int(args.device_gib * GIB) if args.device_gib else capacity(torch.device(device_type))[0] if here else 0
        prediction = None
        if total and not args.no_largest:
            prediction = predict(config, device_type, total, estimate, measured)
            print(folded([prediction["sentence"]]))
        elif not total:
            print("The largest batch is predicted for a device whose memory is known: for example --device-gib 80.")
        keep(as_record(config, args.recipe, device_type, estimate, measured, prediction))
    return 0
