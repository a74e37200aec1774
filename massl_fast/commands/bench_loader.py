"""``massl-fast bench loader``: time the loaders alone."""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from massl_fast.benchmarks.loader import (
    GENERATED,
    HEIGHT,
    PLACES,
    WIDTH,
    Setup,
    as_record,
    describe,
    measure,
    obstacle,
    read_step_rate,
    write_images,
)  # fmt: skip
from massl_fast.commands.arguments import keeping, keeps_records
from massl_fast.data.sources import open_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", default="", help=f"folder or tars to load (default: {GENERATED} generated images, {WIDTH} × {HEIGHT})")
    parser.add_argument(
        "--loaders",
        nargs="+",
        default=[*PLACES],
        choices=[*PLACES],
        help="published: one image and one Pillow operation at a time, as in the published code (default: all)",
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[os.cpu_count() or 1], help="processes or threads (default: all cores)")
    parser.add_argument("--batch", type=int, default=0, help="images of a batch (default: 64 for a GPU, else 16)")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a measurement (default: 6)")
    parser.add_argument("--global-size", type=int, default=224, help="side of the 2 global crops (default: 224)")
    parser.add_argument("--local-size", type=int, default=96, help="side of the local crops (default: 96)")
    parser.add_argument("--num-local", type=int, default=10, help="local crops (default: 10)")
    parser.add_argument("--step-rate", default="", help="images/s that a model trains on, or a run's folder, whose summary tells it")
    keeps_records(parser)


def run(args: argparse.Namespace) -> int:
    if min(args.workers) < 1 or args.seconds <= 0 or args.batch < 0:
        raise ValueError("--workers take at least 1, --seconds more than 0, --batch at least 1.")
    with keeping(args) as keep, tempfile.TemporaryDirectory(prefix="massl_fast_bench_") as folder:
        step_rate = read_step_rate(args.step_rate) if args.step_rate else None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batch = args.batch or (64 if device == "cuda" else 16)
        if not args.images:
            write_images(Path(folder), max(GENERATED, batch))
        images = args.images or folder
        source = open_source(images)
        if len(source) < batch:
            raise ValueError(f"{images} holds {len(source)} images, fewer than a batch of {batch}. Set --batch.")
        print(describe(source, bool(args.images)))
        rest = (images, batch, device, args.seconds, args.global_size, args.local_size, args.num_local)
        header = f"{'loader':<12}{'workers':>8}{'decode':>8}{'augment':>9}{'images/s':>10}{'per core':>10}{'host MiB':>10}"
        on_gpu = f"{'DALI GPU MiB':>14}{'torch GPU MiB':>15}" if device == "cuda" else ""
        print(header + on_gpu + ("   of the model's" if step_rate else ""))
        for name, workers in itertools.product(args.loaders, args.workers):
            for decode, augment in PLACES[name]:
                setup = Setup(name, workers, decode, augment, *rest)
                row = f"{name:<12}{workers:>8}{decode:>8}{augment:>9}"
                if reason := obstacle(setup):
                    print(f"{row}  skipped: {reason}")
                    continue
                # A process of its own: DALI's memory pools never shrink.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                    try:
                        result = executor.submit(measure, setup).result()
                    except OSError as error:  # the published path takes no unreadable image
                        print(f"{row}  ended by an image: {str(error).splitlines()[-1]}")
                        continue
                found = {name: median(samples) for name, samples in result.items()}
                row += f"{found['images_per_second']:>10.1f}{found['images_per_core_second']:>10.1f}{found['host_memory_mib']:>10.0f}"
                row += f"{found['dali_gpu_memory_mib']:>14.0f}{found['torch_gpu_memory_mib']:>15.0f}" if device == "cuda" else ""
                row += f"{100 * found['images_per_second'] / step_rate:>14.0f} %" if step_rate else ""
                print(row, flush=True)
                keep(as_record(setup, result, args.images or "generated", step_rate))
    return 0
