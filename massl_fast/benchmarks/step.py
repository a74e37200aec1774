"""The trainer's own step on random crops that lie on the device, as a whole and part by part.

Steps with and without marks take turns in one process, so that whatever else the machine does meets both; the rate comes from the steps
without, the split from the steps with marks, and the difference between the two is told. Marks are events on a GPU, which nothing waits
for, and the host's clock on a CPU. Beside the published way of a step, and compiled: bench/bench_step.py.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from massl_fast import records
from massl_fast.benchmarks.intervals import FEWEST_SAMPLES, spread_percent
from massl_fast.benchmarks.timing import PhaseClock, in_turn, matrix_rate, timed
from massl_fast.config import Config
from massl_fast.distributed.world import World
from massl_fast.engine import graphed_step
from massl_fast.engine.phases import PHASES
from massl_fast.hardware import peak_flops, synchronize
from massl_fast.models.precision import Precision
from massl_fast.profiling.estimate import RESERVE, capacity, explain, gib, largest_batch
from massl_fast.profiling.out_of_memory import explained, is_out_of_memory
from massl_fast.profiling.synthetic import SyntheticRun, micro_batches_of, synthetic_run

WARM_UP = graphed_step.WARM_UP + 1
"""Steps after which every further one is taken in the same way, also where one is recorded and then replayed."""
ROUND_SECONDS = 0.3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40
OVERTIME = 3
SEARCH_SECONDS = 2.0


def describe(config: Config, precision: Precision, world: World) -> str:
    crops = config.crops
    return (
        f"{config.model.architecture}, 2 crops of {crops.global_size} px and {crops.num_local} of {crops.local_size} px, "
        f"{memory_words(config)}{f' in blocks of {config.objective.block_size}' if hasattr(config.objective, 'block_size') else ''}, "
        f"{precision.name}{', compiled' if config.model.compile else ''}, {device_words(world.device)}"
    )


def memory_words(config: Config) -> str:
    """What the objective remembers, or its name."""
    size = getattr(config.objective, "memory_size", 0)
    return f"memory of {size}" if size else f"objective {config.objective.name}"


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
        "memory": getattr(config.objective, "memory_size", 0),
        "backend": getattr(config.objective, "backend", ""),
        "optimizer": config.optimizer.name,
        "precision": precision.name,
        "compile": config.model.compile,
        "recompute": config.model.recompute,
        "residual": config.model.residual,
        "cuda_graph": config.train.cuda_graph,
        "device": device.type,
        # Records of MaSSL's steps, the first objective, have no name of one.
        **({"objective": config.objective.name} if config.objective.name != "massl" else {}),
    }


def measure(config: Config, recipe: str, world: World, precision: Precision, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """Time the step; the record and what was found, as lines."""
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
    row = records.record("step", case_of(config, recipe, precision, batch, accumulation, device), figures, details)
    return row, lines_of(run, figures, details)


def rounds_of(run: SyntheticRun, seconds: float) -> tuple[list[float], list[float], list[float], list[dict[str, float]]]:
    """Seconds per step of each round without and with marks, processor seconds per step without (on a CPU), and the phases of each round.

    Rounds of several steps each, without and with marks in turn. At least 8 rounds are planned, so that their median has an interval.
    """
    device = run.train_step.world.device
    clock = PhaseClock(device)
    once = timed(run.step, device)[0]
    steps = max(1, min(50, math.ceil(ROUND_SECONDS / once)))
    rounds = max(FEWEST_SAMPLES, min(MOST_ROUNDS, int(seconds / (2 * steps * once))))

    def plain() -> None:
        for _ in range(steps):
            run.step()

    def watched() -> None:
        with run.observed(clock):
            plain()

    # A machine that got busier than it was when the rounds were counted ends them early.
    found = in_turn({"plain": plain, "watched": watched}, rounds, device, at_least=FEWEST_ROUNDS, until=OVERTIME * seconds)
    of_steps = clock.read()
    of_rounds = [of_steps[start : start + steps] for start in range(0, len(of_steps), steps)]
    phases = [{name: sum(step.get(name, 0.0) for step in members) / steps for name in PHASES} for members in of_rounds]
    wall = {name: [seconds / steps for seconds, _ in samples] for name, samples in found.items()}
    processor = [spent / steps for _, spent in found["plain"]] if device.type == "cpu" else []
    return wall["plain"], wall["watched"], processor, phases


def lines_of(run: SyntheticRun, figures: dict[str, Any], details: dict[str, Any]) -> list[str]:
    """What was found, as lines."""
    step, images = figures["step_seconds"], figures["images_per_second"]
    low, high = min(step["samples"]), max(step["samples"])
    lines = [
        f"{images['median']:.1f} images/s: {run.batch} images in {1000 * step['median']:.1f} ms (median of {len(step['samples'])} rounds, "
        f"{1000 * low:.1f} to {1000 * high:.1f}; quartiles {spread_percent(step['samples']):.0f} % apart)",
    ]
    if "processor_seconds" in figures:
        spent = figures["processor_seconds"]["median"]
        lines.append(f"{run.batch / spent:.1f} images per second of processor time, which other work on the machine hardly changes")
    operations = f"{details['gflop_per_image']:.3g} GFLOP per image × {run.batch} images"
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
    """Double the micro-batch until memory or ``most`` ends it, then close in on the largest that fits. What is found
    is printed as it comes; returns the record."""
    device = world.device
    most = min(most, getattr(config.objective, "memory_size", most))
    tried: dict[int, dict[str, float] | None] = {}
    tell = functools.partial(print, flush=True)

    def attempt(batch: int) -> bool:
        tried[batch] = result = rate_at(config, world, precision, batch)
        cells = "  out of memory"
        if result is not None:
            peak = f"{result['peak_bytes'] / 2**20:.0f}" if result["peak_bytes"] else "–"
            cells = f"{result['images_per_second']:>12.1f}{1000 * result['step_seconds']:>12.1f}{peak:>12}"
        tell(f"{batch:>7}{cells}")
        return result is not None

    tell(f"{'batch':>7}{'images/s':>12}{'ms per step':>12}{'peak MiB':>12}")
    low, high = largest_that_fits(attempt, most, fineness=16)
    if not low:
        raise ValueError(explain(config, world).text)
    rates = {batch: result["images_per_second"] for batch, result in tried.items() if result}
    best = min(batch for batch, rate in rates.items() if rate >= 0.97 * max(rates.values()))
    tell(f"Best: {best} images ({rates[best]:.1f} images/s, within 3 % of the highest rate with the least memory).")
    details: dict[str, Any] = {"tried": [[batch, result] for batch, result in sorted(tried.items())], "best": best}
    if high:
        details["largest"] = low
        total, _ = capacity(device)
        predicted, _ = largest_batch(config, device_type=device.type, budget=int(total * (1 - RESERVE)))
        details["predicted"] = predicted
        tell(f"Largest that fits: {low} images; predicted from shapes alone, {100 * RESERVE:.0f} % of the device left free: {predicted}.")
    else:
        tell(f"No limit was met up to {max(rates)} images; --max-batch goes further.")
    figures = {"best_images_per_second": records.figure(rates[best], "images/s")}
    case = case_of(config, recipe, precision, 0, 1, device) | {"batch": "search", "most": most}
    return records.record("batch search", case, figures, details)


def largest_that_fits(fits: Callable[[int], bool], most: int, fineness: int = 2**31) -> tuple[int, int]:
    """(the largest batch found to fit, the smallest found not to): 8 doubled until it does not fit, then multiples of 8, until the two are
    8 or a share of ``1 / fineness`` apart. (0, …): not even the first fits; (``most``, 0): no limit was met."""
    low, batch = 0, min(8, most)
    while fits(batch):
        if batch == most:
            return most, 0
        low, batch = batch, min(2 * batch, most)
    high = batch
    while low and high - low > max(8, low // fineness):
        middle = (low + high) // 2 // 8 * 8
        if middle <= low:
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


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
