"""``massl-fast bench train``: time loader and model together and alone, and say what bounds the run."""

from __future__ import annotations

import argparse
import os
from statistics import median

from massl_fast import records
from massl_fast.benchmarks.step import case_of, describe
from massl_fast.benchmarks.train import KINDS, Situation, measure, verdict
from massl_fast.commands.arguments import keeping, keeps_records, takes_a_run
from massl_fast.config import load_config
from massl_fast.data.loaders import loader_without_run, open_data
from massl_fast.distributed.world import join_world
from massl_fast.models.precision import choose_precision
from massl_fast.profiling.out_of_memory import explained
from massl_fast.profiling.synthetic import micro_batches_of

TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    takes_a_run(parser, "bench train", "[--seconds S] [--output FILE]")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each of the three measurements (default: 10)")
    keeps_records(parser)


def run(args: argparse.Namespace) -> int:
    if args.seconds <= 0:
        raise ValueError("--seconds takes more than 0.")
    with keeping(args) as keep:
        config = load_config(args.recipe, args.settings)
        world = join_world(config.train.device)
        precision = choose_precision(config.train.precision, world.device)
        accumulation, batch = micro_batches_of(config)
        config.train.global_batch = accumulation * batch
        print(describe(config, precision, world))
        source = open_data(config.data.train, "data.train", "train")
        running = loader_without_run(config, source, world, device_batch=batch, accumulation=accumulation)
        with explained(config, world), running as loader:
            print(f"Loader {loader.name} ({loader.reason}), {loader.num_workers} workers; {len(source)} images of {source.path}")
            found = measure(config, world, precision, loader, args.seconds)
        situation = Situation(
            **{name: median(found[name]) for name in (*KINDS, "waited")},
            on_gpu=world.device.type == "cuda",
            loader_name=loader.name,
            workers=loader.num_workers,
            cores=len(os.sched_getaffinity(0)),
            compiled=config.model.compile,
            precision=precision.name,
            decode=config.data.decode,
            augment=config.data.augment,
        )
        for name, words in KINDS.items():
            rates = found[name]
            print(f"{words:<14}{median(rates):>10.1f} images/s  ({min(rates):.1f} to {max(rates):.1f})")
        print(f"{'data wait':<14}{100 * situation.waited:>10.1f} % of the time of both together")
        sentences = verdict(situation)
        print("\n".join(sentences))
        case = case_of(config, args.recipe, precision, batch, accumulation, world.device)
        case |= {"loader": loader.name, "workers": loader.num_workers, "images": config.data.train}
        figures = {f"{name}_images_per_second": records.figure(found[name], "images/s", "higher") for name in KINDS}
        figures["data_wait"] = records.figure([100 * share for share in found["waited"]], "%")
        keep(records.record("train", case, figures, {"verdict": sentences}))
    return 0
