"""``massl-fast profile memory``: whose every byte of a training step is, estimated from shapes before it runs, then measured.

The step is the trainer's own, on random crops. Measured is what the allocator says: on a GPU PyTorch's caching allocator over a step that
nothing watches, on a CPU every allocation of the operators as PyTorch's profiler sees them. The book (profiling.ledger) then tells whose
the bytes are; what is measured beyond it are bytes that operators hold inside themselves.

Then come a few steps in a row, each of which must end with as much memory as the one before it: what grows is a leak, and is named.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import math
import resource
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from massl_fast.benchmarks import records
from massl_fast.benchmarks.loader import process_tree, proportional_bytes
from massl_fast.config import Config, load_config, recipe_names
from massl_fast.data.loaders import loader_without_run, open_data
from massl_fast.distributed.world import World, join_world
from massl_fast.profiling import ledger
from massl_fast.profiling.estimate import (
    CUDA_ROUNDING,
    GIB,
    MIB,
    RESERVE,
    Estimate,
    capacity,
    estimate_step,
    gib,
    largest_batch,
    precision_on,
    record_step,
)
from massl_fast.profiling.holders import holders_of
from massl_fast.profiling.ledger import Change, Ledger, Peak, find_peak, timeline
from massl_fast.profiling.out_of_memory import demand_host_memory, explained
from massl_fast.profiling.profiler import host_allocations
from massl_fast.profiling.synthetic import SyntheticRun, micro_batches_of, synthetic_run
from massl_fast.profiling.telling import estimate_lines, folded, in_order, largest_pieces, peak_sentence, table, way_through

TAKES_SETTINGS = True
WARM_UP = 2
LEAK_STEPS = 3
MIN_LEAK = 4096  # bytes a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "massl-fast profile memory [--recipe NAME|FILE] [--estimate] [--device-gib G] [--no-largest] [--loader] [--output FILE] "
        "[--section.key VALUE ...]"
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        default="demo",
        help=f"one of {', '.join(recipe_names())}, or the path of a YAML file (default: demo)",
    )
    parser.add_argument("--estimate", action="store_true", help="only estimate; with --train.device cuda also where there is no GPU")
    parser.add_argument(
        "--device-gib", metavar="G", type=float, default=0, help="predict the largest batch for a device of G GiB (default: this one)"
    )
    parser.add_argument("--no-largest", action="store_true", help="do not predict the largest batch, which takes several estimates")
    parser.add_argument("--loader", action="store_true", help="also start the run's loader and count what it takes")
    parser.add_argument("--output", metavar="FILE", default="", help="file to which the record is appended, a JSON object on a line")
    parser.epilog = (
        "Every setting of a run can be given; massl-fast train --help lists them. For example, for a GPU that is not here:\n"
        "  massl-fast profile memory --recipe vit_small_in1k --train.device cuda --train.micro_batch 64 --estimate --device-gib 32"
    )


def run(args: argparse.Namespace) -> int:
    config = load_config(args.recipe, args.settings)
    if not 0 <= args.device_gib < math.inf:
        raise ValueError(f"--device-gib is {args.device_gib:g}; it takes a number of GiB, or 0 for the memory of this device.")
    if args.output:
        records.check_writable(args.output)
    here = config.train.device != "cuda" or torch.cuda.is_available()
    if not here and not args.estimate:
        raise ValueError("train.device is cuda, but PyTorch finds no GPU here. Add --estimate to have the estimate alone.")
    device_type = "cuda" if config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available()) else "cpu"
    accumulation, batch = micro_batches_of(config)
    precision = precision_on(config, device_type)
    print(
        f"{config.model.architecture}, {batch} images a micro-batch × {accumulation}, 2 crops of {config.crops.global_size} px and "
        f"{config.crops.num_local} of {config.crops.local_size} px, {precision.name} ({precision.reason}), {device_type}"
    )
    # Micro-batches after the second only add crops, so no more than two are run.
    passes = min(accumulation, 2)
    estimate = estimate_step(config, device_type=device_type, device_batch=batch, accumulation=passes)
    measured = None
    if not args.estimate:
        world = join_world(config.train.device)
        demand_host_memory(config, world, estimate)
        measured = measure(config, world, device_batch=batch, accumulation=passes, with_loader=args.loader)
    print(folded(report(estimate, measured)))
    if accumulation > passes:
        more = (accumulation - passes) * estimate.peak.by_category[ledger.CROPS] // passes
        print(f"Shown are {passes} micro-batches; the other {accumulation - passes} of a step add {gib(more)} of crops.")
    total = int(args.device_gib * GIB) if args.device_gib else capacity(torch.device(device_type))[0] if here else 0
    prediction = None
    if total and not args.no_largest:
        prediction = predict(config, device_type, total, estimate, measured)
        print(folded([prediction["sentence"]]))
    elif not total:
        print("The largest batch is predicted for a device whose memory is known: --device-gib 80, say.")
    if args.output:
        row = as_record(config, args.recipe, device_type, estimate, measured, prediction)
        records.append(args.output, [row])
        print(f"Record appended to {args.output}")
    return 0


@dataclass
class Measured:
    """What was found by running."""

    peak_bytes: int
    """What the allocator says."""
    changes: list[Change]
    """The book of one step."""
    rest: dict[str, int] = field(default_factory=dict)
    """Beside the step's own bytes: allocator slack, the rest of the device or process, the loader."""
    growth: list[int] = field(default_factory=list)
    """Bytes by which each of the last steps ended higher than the one before it."""
    leaks: list[Leak] = field(default_factory=list)

    @functools.cached_property
    def peak(self) -> Peak:
        """By the book; smaller than ``peak_bytes`` by what operators hold inside themselves."""
        return find_peak(self.changes)


@dataclass(frozen=True)
class Leak:
    """Storages made at one place that outlive their step."""

    bytes_per_step: int
    operator: str
    line: str
    section: str
    holder: str
    """What keeps one of them, such as a list of 5 in kept of Leaky; empty where no Python object was found that does."""


def measure(config: Config, world: World, *, device_batch: int, accumulation: int, with_loader: bool = False) -> Measured:
    """Run the step and read its memory. Raises ValueError where the device has not enough."""
    precision = precision_on(config, world.device.type)
    with explained(config, world):
        run = synthetic_run(config, world, precision, device_batch=device_batch, accumulation=accumulation)
        run.crop_sets = run.crop_sets[:1]  # a second set would be counted, too
        return measure_run(run, with_loader=with_loader)


def measure_run(run: SyntheticRun, with_loader: bool = False) -> Measured:
    device = run.train_step.world.device
    gc.collect()
    for _ in range(WARM_UP):
        run.step()
    return _measure_gpu(run, with_loader) if device.type == "cuda" else _measure_host(run, with_loader)


def _measure_gpu(run: SyntheticRun, with_loader: bool) -> Measured:
    device = run.train_step.world.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run.step()
    torch.cuda.synchronize(device)
    peak_bytes, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    rest = {
        "allocator slack": reserved - peak_bytes,
        "rest of the device (CUDA context, other programs)": total - free - torch.cuda.memory_reserved(device),
    }
    growth: list[int] = []

    @contextlib.contextmanager
    def around():
        before = torch.cuda.memory_allocated(device)
        yield
        growth.append(torch.cuda.memory_allocated(device) - before)

    book = Ledger(run.train_step.student, rounding=CUDA_ROUNDING)
    record_step(run, book, LEAK_STEPS, around)
    return Measured(peak_bytes, book.changes[: book.ends[0]], rest | _loader_bytes(run, with_loader), growth, find_leaks(book))


def _measure_host(run: SyntheticRun, with_loader: bool) -> Measured:
    step = run.train_step
    known = [*step.pair.parameters(), *step.pair.buffers(), *step.objective.buffers()]
    known += [value for state in step.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    known += [crop for crops in run.crop_sets for micro_batch in crops for crop in micro_batch]
    base = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in known}.values())
    with host_allocations() as sizes:
        run.step()
    peak_bytes = base + max(0, *itertools.accumulate(sizes))
    growth: list[int] = []

    @contextlib.contextmanager
    def around():
        with host_allocations() as sizes:
            yield
        growth.append(sum(sizes))

    book = Ledger(step.student)
    record_step(run, book, LEAK_STEPS, around)
    rest = {"rest of the process (Python, PyTorch, allocator slack)": max(0, host_peak_bytes() - peak_bytes)}
    return Measured(peak_bytes, book.changes[: book.ends[0]], rest | _loader_bytes(run, with_loader), growth, find_leaks(book))


def host_peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _loader_bytes(run: SyntheticRun, wanted: bool) -> dict[str, int]:
    """What the run's loader holds once it delivers: on the host in its processes, on the device beside PyTorch's own."""
    if not wanted:
        return {}
    config, world = run.config, run.train_step.world
    accumulation, device_batch = micro_batches_of(config)
    on_gpu = world.device.type == "cuda"
    free = torch.cuda.mem_get_info(world.device)[0] if on_gpu else 0
    reserved = torch.cuda.memory_reserved(world.device) if on_gpu else 0
    before = sum(map(proportional_bytes, process_tree()))
    source = open_data(config.data.train, "data.train", "train")
    with loader_without_run(config, source, world, device_batch=device_batch, accumulation=accumulation) as loader:
        batches = loader.batches(0)
        for _ in range(4):
            next(batches)
        found = {f"loader on the host ({loader.name})": sum(map(proportional_bytes, process_tree())) - before}
        if on_gpu:
            torch.cuda.synchronize(world.device)
            taken = free - torch.cuda.mem_get_info(world.device)[0] - (torch.cuda.memory_reserved(world.device) - reserved)
            found[f"loader on the device, beside PyTorch ({loader.name})"] = max(0, taken)
    return {name: max(0, size) for name, size in found.items()}


def find_leaks(book: Ledger) -> list[Leak]:
    """Storages without a role, made in a step of the book before the last and still there, by where they were made."""
    places: dict[tuple[str, str, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    keys: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for key, piece in book.living().items():
        if not piece.role and piece.born < book.number - 1:
            place = piece.operator, piece.line, piece.section
            places[place][piece.born] += piece.bytes
            keys[place].append(key)
    # What every step leaves behind is a leak; what one step leaves is a cache.
    leaking = {place: by_step for place, by_step in places.items() if len(by_step) == book.number - 1 > 1}
    holders = holders_of({key for place in leaking for key in keys[place]})
    leaks = []
    for place, by_step in leaking.items():
        holder = next((holders[key] for key in keys[place] if holders.get(key)), "")
        leaks.append(Leak(sum(by_step.values()) // len(by_step), *place, holder))
    return sorted((leak for leak in leaks if leak.bytes_per_step >= 1), key=lambda leak: -leak.bytes_per_step)


# Telling


def report(estimate: Estimate, measured: Measured | None) -> list[str]:
    """The book as lines of text."""
    if measured is None:
        return estimate_lines(estimate)
    inside = max(0, measured.peak_bytes - measured.peak.bytes)
    columns = {"estimated": estimate.by_owner, "measured": measured.peak.by_owner | {"inside operators": inside}}
    lines = table(columns, {"estimated": estimate.bytes, "measured": measured.peak_bytes}, "At the peak, MiB")
    lines.append(f"The estimate is {100 * (estimate.bytes / measured.peak_bytes - 1):+.1f} % off the measured peak.")
    lines += [peak_sentence(measured.peak), "Largest storages at that moment:", *largest_pieces(measured.peak.pieces)]
    lines += ["Highest in each part of a step, measured (parts that allocate nothing are not listed):", *way_through(measured.changes)]
    lines.append("Beside the step's own bytes, not in the peak above:")
    lines += [f"{size / MIB:>9,.1f} MiB  {name}" for name, size in measured.rest.items()]
    if estimate.beside:
        lines.append("Of that was estimated: " + ", ".join(f"{name} {gib(size)}" for name, size in estimate.beside.items()) + ".")
    return lines + leak_sentences(measured)


def leak_sentences(measured: Measured) -> list[str]:
    growing = [size for size in measured.growth if size >= MIN_LEAK]
    if len(growing) < len(measured.growth) or not growing:
        return [f"No leak: {len(measured.growth)} steps in a row ended with as much memory as they began with."]
    lines = [f"Leak: each step ends with about {gib(sum(growing) / len(growing))} more than the one before it."]
    for leak in measured.leaks[:5]:
        where = f" at {leak.line}" if leak.line else ""
        lines.append(f"  {gib(leak.bytes_per_step)} a step made by {leak.operator}{where}, in '{leak.section}', outlive their step.")
        lines.append(f"    Kept by {leak.holder or 'no Python object that could be found'}.")
    return lines


def predict(config: Config, device_type: str, total: int, estimate: Estimate, measured: Measured | None) -> dict[str, Any]:
    """The largest micro-batch for a device of ``total`` bytes: by the estimate, corrected by how far it was off here."""
    error = measured.peak_bytes / estimate.bytes if measured else 1.0
    beside = measured.rest if measured else estimate.beside
    outside = sum(size for name, size in beside.items() if "slack" not in name or device_type == "cpu")
    budget = int((total * (1 - RESERVE) - outside) / error)
    batch, at = largest_batch(config, device_type=device_type, budget=budget)
    corrected = ", corrected by the error found here" if measured else ""
    if batch:
        limit = " (no more may enter the memory at once)" if batch == config.objective.memory_size else ""
        sentence = (
            f"Largest micro-batch predicted for {gib(total)}: {batch} images{limit}, peak about {gib(at.bytes * error)}{corrected}; "
            f"{100 * RESERVE:.0f} % are left free."
        )
    else:
        sentence = f"Not even one image fits {gib(total)}{corrected}."
    return {"total_bytes": total, "batch": batch, "sentence": sentence}


def as_record(
    config: Config, recipe: str, device_type: str, estimate: Estimate, measured: Measured | None, prediction: dict[str, Any] | None
) -> dict[str, Any]:
    case = {
        "recipe": Path(recipe).stem,
        "architecture": config.model.architecture,
        "batch": estimate.device_batch,
        "accumulation": estimate.accumulation,
        "precision": precision_on(config, device_type).name,
        "memory": config.objective.memory_size,
        "device": device_type,
    }
    figures = {"estimated_peak": records.figure(estimate.bytes / MIB, "MiB", exact=True)}
    details: dict[str, Any] = {"estimated": in_order(estimate.by_owner), "estimated_timeline": timeline(estimate.changes)}
    details["estimated_beside"] = estimate.beside
    details["estimated_peak_section"] = estimate.peak.section
    if measured:
        figures["measured_peak"] = records.figure(measured.peak_bytes / MIB, "MiB", "lower", exact=True)
        figures["estimate_error"] = records.figure(100 * (estimate.bytes / measured.peak_bytes - 1), "%", exact=True)
        details |= {
            "measured": in_order(measured.peak.by_owner) | {"inside operators": max(0, measured.peak_bytes - measured.peak.bytes)},
            "measured_timeline": timeline(measured.changes),
            "peak_section": measured.peak.section,
            "largest": largest_pieces(measured.peak.pieces, 10),
            "rest": measured.rest,
            "growth_bytes": measured.growth,
            "leaks": leak_sentences(measured),
        }
    if prediction:
        details["prediction"] = prediction
    return records.record("memory", case, figures, details)
