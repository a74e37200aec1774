"""Whose every byte of a training step is: measured, beside the estimate from shapes.

The step is the trainer's own, on random crops. Measured is what the allocator says: on a GPU PyTorch's caching allocator over a step that
nothing watches, on a CPU every allocation of the operators as PyTorch's profiler sees them. The book (profiling.ledger) then tells whose
the bytes are; what is measured beyond it are bytes that operators hold inside themselves. Our own book, not PyTorch's ``MemTracker``: it
also gives file, line, layer and phase of every storage, runs on shapes alone, and names what a leak keeps.

Then come a few steps in a row, each of which must end with as much memory as the one before it: what grows is a leak, and is named.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import resource
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from massl_fast.config import Config
from massl_fast.data.loaders import loader_without_run, open_data
from massl_fast.distributed.world import World
from massl_fast.processes import host_bytes
from massl_fast.profiling.estimate import CUDA_ROUNDING, RESERVE, Estimate, gib, largest_batch, precision_on
from massl_fast.profiling.ledger import Change, Ledger, Peak, find_peak, holdings, record_steps
from massl_fast.profiling.profiler import host_allocations, peak_bytes
from massl_fast.profiling.referrers import referrers_of
from massl_fast.profiling.synthetic import SyntheticRun, micro_batches_of, synthetic_run

WARM_UP = 2
LEAK_STEPS = 3


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
        """The peak by the book; it is smaller than ``peak_bytes`` by what operators hold inside themselves."""
        return find_peak(self.changes)


@dataclass(frozen=True)
class Leak:
    """Storages made at one place that outlive their step."""

    bytes_per_step: int
    operator: str
    line: str
    section: str
    referrer: str
    """What keeps one of them, such as a list of 5 in kept of Leaky; empty where no Python object was found that does."""


def measure(config: Config, world: World, *, device_batch: int, accumulation: int, with_loader: bool = False) -> Measured:
    """Run the step and read its memory."""
    precision = precision_on(config, world.device.type)
    # A second set of crops would be counted, too.
    run = synthetic_run(config, world, precision, device_batch=device_batch, accumulation=accumulation, crop_sets=1)
    return measure_run(run, with_loader=with_loader)


def measure_run(run: SyntheticRun, with_loader: bool = False) -> Measured:
    device = run.train_step.world.device
    gc.collect()
    for _ in range(WARM_UP):
        run.step()
    if device.type == "cuda":
        peak, rest = _peak_on_gpu(run, device)
    else:
        known = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for tensors in holdings(run).values() for t in tensors}
        peak = sum(known.values()) + peak_bytes(run.step, device)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rest = {"rest of the process (Python, PyTorch, allocator slack)": max(0, most - peak)}
    growth: list[int] = []
    book = Ledger(run.train_step.student, rounding=CUDA_ROUNDING if device.type == "cuda" else 1)
    record_steps(run, book, LEAK_STEPS, lambda: _growing(device, growth))
    return Measured(peak, book.changes[: book.ends[0]], rest | _loader_bytes(run, with_loader), growth, find_leaks(book))


def _peak_on_gpu(run: SyntheticRun, device: torch.device) -> tuple[int, dict[str, int]]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run.step()
    torch.cuda.synchronize(device)
    peak_bytes, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return peak_bytes, {"allocator slack": reserved - peak_bytes, "rest of the device (CUDA context, other programs)": others}


@contextlib.contextmanager
def _growing(device: torch.device, growth: list[int]) -> Iterator[None]:
    """Appends the bytes by which memory in use grows inside."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        yield
        growth.append(torch.cuda.memory_allocated(device) - before)
    else:
        with host_allocations() as sizes:
            yield
        growth.append(sum(sizes))


def _loader_bytes(run: SyntheticRun, wanted: bool) -> dict[str, int]:
    """What the run's loader holds once it delivers: on the host in its processes, on the device beside PyTorch's own."""
    if not wanted:
        return {}
    config, world = run.config, run.train_step.world
    accumulation, device_batch = micro_batches_of(config)
    on_gpu = world.device.type == "cuda"
    free = torch.cuda.mem_get_info(world.device)[0] if on_gpu else 0
    reserved = torch.cuda.memory_reserved(world.device) if on_gpu else 0
    before = host_bytes()
    source = open_data(config.data.train, "data.train", "train")
    with loader_without_run(config, source, world, device_batch=device_batch, accumulation=accumulation) as loader:
        batches = loader.batches(0)
        for _ in range(4):
            next(batches)
        found = {f"loader on the host ({loader.name})": host_bytes() - before}
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
    referrers = referrers_of({key for place in leaking for key in keys[place]})
    leaks = []
    for place, by_step in leaking.items():
        referrer = next((referrers[key] for key in keys[place] if referrers.get(key)), "")
        leaks.append(Leak(sum(by_step.values()) // len(by_step), *place, referrer))
    return sorted((leak for leak in leaks if leak.bytes_per_step >= 1), key=lambda leak: -leak.bytes_per_step)


def predict(config: Config, device_type: str, total: int, estimate: Estimate, measured: Measured | None) -> dict[str, Any]:
    """The largest micro-batch for a device of ``total`` bytes: by the estimate, corrected by how far it was off here."""
    error = measured.peak_bytes / estimate.bytes if measured else 1.0
    beside = measured.rest if measured else estimate.beside
    outside = sum(size for name, size in beside.items() if "slack" not in name or device_type == "cpu")
    budget = int((total * (1 - RESERVE) - outside) / error)
    batch, at = largest_batch(config, device_type=device_type, budget=budget)
    corrected = ", corrected by the error found here" if measured else ""
    if batch:
        limit = " (no more may enter the memory at once)" if batch == getattr(config.objective, "memory_size", None) else ""
        sentence = (
            f"Largest micro-batch predicted for {gib(total)}: {batch} images{limit}, peak about {gib(at.bytes * error)}{corrected}; "
            f"{100 * RESERVE:.0f} % are left free."
        )
    else:
        sentence = f"Not even one image fits {gib(total)}{corrected}."
    return {"total_bytes": total, "batch": batch, "sentence": sentence}
