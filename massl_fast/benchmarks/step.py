"""``massl-fast bench step``: the trainer's own step on random crops that lie on the device, as a whole and part by part.

Steps with and without marks take turns in one process, so that whatever else the machine does meets both; the rate comes from the steps
without, the split from the steps with marks, and the difference between the two is told. Marks are events on a GPU, which nothing waits
for, and the host's clock on a CPU. Beside the published way of a step, and compiled: bench/bench_step.py.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from massl_fast.benchmarks import records
from massl_fast.benchmarks.intervals import FEWEST_SAMPLES, spread_percent
from massl_fast.benchmarks.rates import matrix_rate
from massl_fast.config import Config, load_config, recipe_names
from massl_fast.distributed.world import World, join_world
from massl_fast.engine import graphed_step
from massl_fast.engine.phases import PHASES
from massl_fast.hardware import peak_flops, synchronize
from massl_fast.models.precision import Precision, choose_precision
from massl_fast.profiling.estimate import RESERVE, capacity, explain_out_of_memory, gib, largest_batch
from massl_fast.profiling.out_of_memory import explained, is_out_of_memory
from massl_fast.profiling.sections import SectionClock, marked
from massl_fast.profiling.synthetic import SyntheticRun, micro_batches_of, synthetic_run

TAKES_SETTINGS = True
WARM_UP = graphed_step.WARM_UP + 1
"""Steps after which every further one is taken in the same way, also where one is recorded and then replayed."""
ROUND_SECONDS = 0.3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40
OVERTIME = 3
SEARCH_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "massl-fast bench step [--recipe NAME|FILE] [--search-batch] [--output FILE] [... --section.key VALUE ...]"
    parser.add_argument("--recipe", default="demo", help=f"one of {', '.join(recipe_names())}, or the path of a YAML file (default: demo)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure for; at least 8 rounds are taken (default: 20)")
    parser.add_argument("--search-batch", action="store_true", help="find the micro-batch with the best rate and the largest that fits")
    parser.add_argument("--max-batch", type=int, default=None, help="largest that the search tries (default: 64 on a CPU, 65536 on a GPU)")
    parser.add_argument("--output", default="", help="file to which the record is appended, a JSON object on a line")
    parser.epilog = "Every setting of a run can be given; massl-fast train --help lists them."


def run(args: argparse.Namespace) -> int:
    if args.seconds <= 0 or (args.max_batch is not None and args.max_batch < 1):
        raise ValueError("--seconds takes more than 0, --max-batch at least 1.")
    if args.output:
        records.check_writable(args.output)
    config = load_config(args.recipe, args.settings)
    world = join_world(config.train.device)
    precision = choose_precision(config.train.precision, world.device)
    print(describe(config, precision, world))
    rows = []
    if args.search_batch:
        rows.append(search(config, args.recipe, world, precision, args.max_batch or (65536 if world.device.type == "cuda" else 64)))
    else:
        rows.append(measure(config, args.recipe, world, precision, args.seconds))
    if args.output:
        records.append(args.output, rows)
        print(f"Record appended to {args.output}")
    return 0


def describe(config: Config, precision: Precision, world: World) -> str:
    crops, objective = config.crops, config.objective
    return (
        f"{config.model.architecture}, 2 crops of {crops.global_size} px and {crops.num_local} of {crops.local_size} px, memory of "
        f"{objective.memory_size} in blocks of {objective.block_size}, {precision.name}"
        f"{', compiled' if config.model.compile else ''}, {device_words(world.device)}"
    )


def device_words(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def case_of(config: Config, recipe: str, precision: Precision, batch: int, accumulation: int, device: torch.device) -> dict[str, Any]:
    """What identifies a measurement of a step, for comparison with another."""
    return {
        "recipe": Path(recipe).stem,
        "architecture": config.model.architecture,
        "batch": batch,
        "accumulation": accumulation,
        "crops": f"2×{config.crops.global_size} + {config.crops.num_local}×{config.crops.local_size}",
        "memory": config.objective.memory_size,
        "backend": config.objective.backend,
        "optimizer": config.optimizer.name,
        "precision": precision.name,
        "compile": config.model.compile,
        "recompute": config.model.recompute,
        "residual": config.model.residual,
        "cuda_graph": config.train.cuda_graph,
        "device": device.type,
    }


def measure(config: Config, recipe: str, world: World, precision: Precision, seconds: float) -> dict[str, Any]:
    """Time the step, print what was found, return the record."""
    accumulation, batch = micro_batches_of(config)
    device = world.device
    with explained(config, world):
        run = synthetic_run(config, world, precision, device_batch=batch, accumulation=accumulation)
        for _ in range(WARM_UP):
            run.step()
        synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    plain, watched, processor, parts = rounds_of(run, seconds)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    rate = matrix_rate(device, precision.dtype)
    sheet = peak_flops(torch.cuda.get_device_name(device), precision.dtype) if device.type == "cuda" else None

    figures = {
        "step_seconds": records.figure(plain, "s", "lower"),
        "images_per_second": records.figure([run.batch / value for value in plain], "images/s"),
        "watched_step_seconds": records.figure(watched, "s"),
        "utilization_of_measured_rate": records.figure([100 * run.flops / (value * rate) for value in plain], "%"),
    }
    figures |= {f"part: {name}": records.figure([part.get(name, 0.0) for part in parts], "s", "lower") for name in PHASES}
    if sheet:
        figures["model_flops_utilization"] = records.figure([100 * run.flops / (value * sheet) for value in plain], "%")
    if processor:
        figures["processor_seconds"] = records.figure(processor, "s", "lower")
    if peak:
        figures["peak_memory"] = records.figure(peak / 2**20, "MiB", "lower", exact=True)
    details = {"gflop_per_image": run.flops / run.batch / 1e9, "matrix_tflops_measured": rate / 1e12}
    details |= {"matrix_tflops_data_sheet": sheet / 1e12 if sheet else None, "threads": torch.get_num_threads()}
    print("\n".join(tell(run, figures, details)))
    return records.record("step", case_of(config, recipe, precision, batch, accumulation, device), figures, details)


def rounds_of(run: SyntheticRun, seconds: float) -> tuple[list[float], list[float], list[float], list[dict[str, float]]]:
    """Seconds a step of each round without and with marks, processor seconds a step without (on a CPU), and the parts of each round.

    Rounds of several steps each, without and with marks in turn, whichever first changing; garbage is collected between rounds only. At
    least 8 rounds are planned, so that their median has an interval.
    """
    device = run.train_step.world.device
    clock = SectionClock(device)
    start = time.perf_counter()
    run.step()
    synchronize(device)
    once = time.perf_counter() - start
    steps = max(1, min(50, math.ceil(ROUND_SECONDS / once)))
    rounds = max(FEWEST_SAMPLES, min(MOST_ROUNDS, int(seconds / (2 * steps * once))))
    plain: list[float] = []
    watched: list[float] = []
    processor: list[float] = []
    parts: list[dict[str, float]] = []

    def without() -> None:
        wall, spent = timed(lambda: [run.step() for _ in range(steps)], device)
        plain.append(wall / steps)
        if device.type == "cpu":
            processor.append(spent / steps)

    def with_marks() -> None:
        with marked(run.train_step, clock) as marks:
            wall, _ = timed(lambda: [run.step(marks.step) for _ in range(steps)], device)
        watched.append(wall / steps)
        of_steps = clock.read()
        parts.append({name: sum(part.get(name, 0.0) for part in of_steps) / steps for name in PHASES})

    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() - begin > OVERTIME * seconds:
                break  # the machine got busier than it was when the rounds were counted
            for take in (without, with_marks) if number % 2 == 0 else (with_marks, without):
                take()
            gc.collect()
    finally:
        gc.enable()
    return plain, watched, processor, parts


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds of some work, the device's included."""
    synchronize(device)
    start, spent = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - spent


def tell(run: SyntheticRun, figures: dict[str, Any], details: dict[str, Any]) -> list[str]:
    """What was found, as lines."""
    step, images = figures["step_seconds"], figures["images_per_second"]
    low, high = min(step["samples"]), max(step["samples"])
    lines = [
        f"{images['median']:.1f} images/s: {run.batch} images in {1000 * step['median']:.1f} ms (median of {len(step['samples'])} rounds, "
        f"{1000 * low:.1f} to {1000 * high:.1f}; quartiles {spread_percent(step['samples']):.0f} % apart)",
    ]
    if "processor_seconds" in figures:
        spent = figures["processor_seconds"]["median"]
        lines.append(f"{run.batch / spent:.1f} images a second of processor time, which other work on the machine hardly changes")
    operations = f"{details['gflop_per_image']:.3g} GFLOP an image × {run.batch} images"
    rate, share = details["matrix_tflops_measured"], figures["utilization_of_measured_rate"]["median"]
    lines.append(
        f"Utilisation {share:.1f} % = {operations} / ({step['median']:.4g} s × {rate:.3g} TFLOP/s, the rate of a large matrix product "
        f"measured here)"
    )
    if "model_flops_utilization" in figures:
        lines.append(
            f"Model FLOPs utilisation {figures['model_flops_utilization']['median']:.1f} %: the same against the data sheet's "
            f"{details['matrix_tflops_data_sheet']:.4g} TFLOP/s"
        )
    if "peak_memory" in figures:
        lines.append(f"Peak memory {gib(figures['peak_memory']['median'] * 2**20)}")
    # Each round with marks beside the round without that it took turns with.
    ratios = [b / a for a, b in zip(step["samples"], figures["watched_step_seconds"]["samples"])]
    total = sum(figures[f"part: {name}"]["median"] for name in PHASES)
    lines.append(f"Parts of a step (marking them changed its time by {100 * (median(ratios) - 1):+.1f} %):")
    for name in PHASES:
        part = figures[f"part: {name}"]["median"]
        lines.append(f"  {name:<20}{1000 * part:>9.2f} ms {100 * part / total:>5.1f} %")
    return lines


# The batch that does best


def search(config: Config, recipe: str, world: World, precision: Precision, most: int) -> dict[str, Any]:
    """Double the micro-batch until memory or ``most`` ends it, then close in on the largest that fits; print and return the record."""
    device = world.device
    most = min(most, config.objective.memory_size)
    tried: dict[int, dict[str, float] | None] = {}

    def attempt(batch: int) -> bool:
        tried[batch] = result = rate_at(config, world, precision, batch)
        if result is None:
            print(f"{batch:>7}  out of memory", flush=True)
            return False
        share = f"{result['peak_bytes'] / 2**20:>12.0f}" if result["peak_bytes"] else f"{'–':>12}"
        print(f"{batch:>7}{result['images_per_second']:>12.1f}{1000 * result['step_seconds']:>12.1f}{share}", flush=True)
        return True

    print(f"{'batch':>7}{'images/s':>12}{'ms a step':>12}{'peak MiB':>12}")
    batch = min(8, most)
    while attempt(batch) and batch < most:
        batch = min(2 * batch, most)
    fitting = sorted(batch for batch, result in tried.items() if result)
    if not fitting:
        raise ValueError(explain_out_of_memory(config, world))
    low, high = fitting[-1], min((batch for batch, result in tried.items() if result is None), default=0)
    while high and high - low > max(8, low // 16):
        middle = (low + high) // 2 // 8 * 8
        if middle <= low:
            break
        low, high = (middle, high) if attempt(middle) else (low, middle)
    rates = {batch: result["images_per_second"] for batch, result in tried.items() if result}
    best = min(batch for batch, rate in rates.items() if rate >= 0.97 * max(rates.values()))
    print(f"Best: {best} images ({rates[best]:.1f} images/s, within 3 % of the highest rate with the least memory).")
    details: dict[str, Any] = {"tried": [[batch, result] for batch, result in sorted(tried.items())], "best": best}
    if high:
        details["largest"] = low
        total, _ = capacity(device)
        predicted, _ = largest_batch(config, device_type=device.type, budget=int(total * (1 - RESERVE)))
        details["predicted"] = predicted
        print(f"Largest that fits: {low} images; predicted from shapes alone, {100 * RESERVE:.0f} % of the device left free: {predicted}.")
    else:
        print(f"No limit was met up to {max(rates)} images; --max-batch goes further.")
    figures = {"best_images_per_second": records.figure(rates[best], "images/s")}
    case = case_of(config, recipe, precision, 0, 1, device) | {"batch": "search", "most": most}
    return records.record("batch search", case, figures, details)


def rate_at(config: Config, world: World, precision: Precision, batch: int) -> dict[str, float] | None:
    """Rate and peak memory with micro-batches of ``batch`` images; None where the device has not enough memory."""
    device = world.device
    result = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        run = synthetic_run(config, world, precision, device_batch=batch)
        for _ in range(WARM_UP if config.train.cuda_graph else 2):
            run.step()
        once = timed(run.step, device)[0]
        count = max(3, min(50, int(SEARCH_SECONDS / once)))
        seconds = median(timed(run.step, device)[0] for _ in range(count))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        result = {"images_per_second": batch / seconds, "step_seconds": seconds, "peak_bytes": peak}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    run = None  # before the cache is emptied
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result
