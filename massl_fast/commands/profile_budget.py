"""``massl-fast profile budget``: operations and bytes of a step, part by part, and the least time that a GPU takes for them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from massl_fast.benchmarks.step import memory_words
from massl_fast.commands.arguments import prints_json, takes_a_run
from massl_fast.config import load_config
from massl_fast.hardware import GPUS
from massl_fast.profiling.budget import as_rows, count_step, measured_parts, table
from massl_fast.profiling.synthetic import micro_batches_of

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    takes_a_run(parser, "profile budget", "[--gpu NAME] [--record FILE]", default="vit_small_in1k")
    parser.add_argument("--gpu", default="H200", choices=[*GPUS], help="whose data sheet gives peak and bandwidth (default: H200)")
    parser.add_argument("--record", default="", help="file of records that holds a `bench step` of the same batch, for measured times")
    prints_json(parser, "a row per part and group of operators")


def run(args: argparse.Namespace) -> int:
    config = load_config(args.recipe, args.settings)
    gpu = GPUS[args.gpu]
    if config.train.precision == "auto" and gpu.name.startswith("V100"):
        config.train.precision = "fp16"  # what the trainer chooses there
    accumulation, batch = micro_batches_of(config)
    measured = measured_parts(args.record, config, Path(args.recipe).stem, batch, accumulation) if args.record else {}
    budget = count_step(config, batch, accumulation)
    if args.json:
        print(json.dumps(as_rows(budget, gpu, measured)))
        return 0
    print(
        f"{config.model.architecture}, {accumulation} × {batch} images, 2 crops of {config.crops.global_size} px and "
        f"{config.crops.num_local} of {config.crops.local_size} px, {memory_words(config)}; "
        f"{gpu.name}: {gpu.peak_flops / 1e12:.4g} TFLOP/s, {gpu.bandwidth / 1e12:.3g} TB/s (data sheet)\n"
    )
    print("\n".join(table(budget, gpu, batch * accumulation, measured)))
    return 0
