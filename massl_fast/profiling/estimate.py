"""The memory that a training step will take, from shapes alone: the trainer's own step, run on tensors without contents.

What shapes do not tell is added for a GPU: allocations come in multiples of 512 bytes, cuBLAS keeps workspaces, and the Triton kernels
keep partial results. Beside the step's own bytes stand what PyTorch's allocator would reserve in vain (simulated), DALI's queue (from
shapes) and the CUDA context (assumed). Not in the estimate: NCCL's buffers, shards of fsdp2, compiled blocks (eager ones stand for them)
and what convolutions take and give back inside themselves. ``massl-fast profile memory`` measures how far that leads off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from massl_fast.config import Config
from massl_fast.data.loaders import views_of
from massl_fast.distributed.world import World
from massl_fast.engine.build import build_objective, build_pair
from massl_fast.engine.flops import step_flops
from massl_fast.kernels import flash, streaming
from massl_fast.models import packed
from massl_fast.models.flops import backbone_flops
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import Precision, choose_precision
from massl_fast.profiling import ledger
from massl_fast.profiling.allocator import reserved_bytes
from massl_fast.profiling.ledger import Change, Ledger, Peak, find_peak, record_steps
from massl_fast.profiling.synthetic import SyntheticRun, micro_batches_of, synthetic_run

GIB, MIB = 2**30, 2**20
ATTENTION = {"cuda": packed.fused_attention, "cpu": None}
"""A GPU computes it by a fused kernel in any format; a CPU keeps the probabilities in 16 bits."""
CUDA_ROUNDING = 512
# torch.cuda: 4096 KiB × 2 + 16 KiB × 8 before compute capability 9.0, 32 MiB from there on; the backward pass runs in a thread of its own,
# hence with a handle of its own.
CUBLAS_WORKSPACE = {False: 2 * 8519680, True: 2 * 32 * MIB}
MULTIPROCESSORS = 132  # of an H100 or H200, where no device is at hand to be asked
PROGRAM_ROWS = 128
CUDA_CONTEXT = 512 * MIB
"""Assumed, not measured: what the driver keeps for a process on a GPU, kernels loaded."""
LOADER_AHEAD = 2  # micro-batches that DALI's pipeline works ahead
RESERVE = 0.06
"""Share of a device left free when a batch is predicted: slack of the allocator and what the estimate does not see."""


@dataclass(frozen=True)
class Estimate:
    """Memory of one step on one device; ``extras`` (bytes) are there at any moment.

    ``beside`` (bytes) is what the device holds besides: not what ``torch.cuda.max_memory_allocated`` would say, hence not in ``bytes``.
    """

    peak: Peak
    changes: list[Change]
    extras: dict[str, int]
    device_batch: int
    accumulation: int
    beside: dict[str, int]

    @property
    def bytes(self) -> int:
        return self.peak.bytes + sum(self.extras.values())

    @property
    def by_owner(self) -> dict[str, int]:
        return self.peak.by_owner | self.extras


def estimate_step(config: Config, *, device_type: str, device_batch: int, accumulation: int = 1) -> Estimate:
    """Estimate for micro-batches of ``device_batch`` images on a ``cpu`` or ``cuda`` device, with or without one here.

    ``objective.backend`` auto stands for triton on a GPU and streaming on a CPU.
    """
    backend = getattr(config.objective, "backend", "streaming")
    if backend == "auto":
        backend = "triton" if device_type == "cuda" else "streaming"
    # Further micro-batches add crops and nothing else.
    passes = min(accumulation, 2)

    def hidden(operator: OpOverload, named: dict[str, Any]) -> int:
        if operator.namespace == "massl_fast" and "memory" in named:
            return kernel_workspace(named, backend, device_type)
        if device_type == "cuda" and "attention" in operator._schema.name and "backward" in operator._schema.name:
            return named["query"].numel() * 4  # the gradient of the queries is summed in float32
        return 0

    with FakeTensorMode():
        run = fake_run(config, device_type, device_batch, passes, "reference" if backend == "reference" else "streaming")
        bring_optimizer_state(run)
        book = Ledger(run.train_step.student, rounding=CUDA_ROUNDING if device_type == "cuda" else 1, hidden=hidden)
        record_steps(run, book)
    peak = find_peak(book.changes)
    extras = {}
    if accumulation > passes:
        extras["crops of further micro-batches"] = (accumulation - passes) * peak.by_category[ledger.CROPS] // passes
    if device_type == "cuda":
        extras["cuBLAS workspace"] = CUBLAS_WORKSPACE[not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9]
    beside = {}
    if device_type == "cuda":
        beside["allocator slack (simulated)"] = max(0, reserved_bytes(book.changes) - peak.bytes)
        beside["DALI's queue of crops, without its pool for decoding"] = loader_queue(config, device_batch)
        beside["rest of the device: CUDA context (assumed)"] = CUDA_CONTEXT
    return Estimate(peak, book.changes, extras, device_batch, accumulation, beside)


def fake_run(config: Config, device_type: str, device_batch: int, accumulation: int, backend: str = "streaming") -> SyntheticRun:
    """A run as a kind of device would take it, on tensors of a CPU without contents; to be made inside a ``FakeTensorMode``."""
    return synthetic_run(
        in_shapes(config, backend),
        World(0, 1, 0, torch.device("cpu")),
        precision_on(config, device_type),
        device_batch=device_batch,
        accumulation=accumulation,
        attention=ATTENTION[device_type],
    )


def loader_queue(config: Config, device_batch: int) -> int:
    """Bytes of crops that DALI holds ready on a GPU; 0 with the torchvision loader, whose crops come from the host's memory."""
    if config.data.loader == "torchvision":
        return 0
    width = 4 if config.train.precision == "fp32" else 2
    return LOADER_AHEAD * device_batch * sum(3 * view.size**2 for view in views_of(config.crops)) * width


def bring_optimizer_state(run: SyntheticRun) -> None:
    """The moments that an optimizer makes in its first step, without the rest of that step."""
    optimizer, parameters = run.train_step.optimizer, [p for _, p in run.train_step.parameters]
    if hasattr(optimizer, "update_"):  # takes its arguments from the step
        run.step()
        return
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def in_shapes(config: Config, backend: str = "") -> Config:
    """The settings of a run whose tensors have no contents: values make no difference, and the file they come from may be gone."""
    simulated = config.model_copy(deep=True)
    simulated.run.init_from = ""
    if backend and hasattr(simulated.objective, "backend"):
        simulated.objective.backend = backend
    return simulated


def precision_on(config: Config, device_type: str) -> Precision:
    """The precision of a run on a kind of device, which need not be here; a GPU that is not here is taken as one of capability 8.0 or
    newer."""
    if device_type == "cuda" and not torch.cuda.is_available():
        asked = config.train.precision
        return Precision("bf16" if asked == "auto" else asked, "for a GPU that is not here")
    return choose_precision(config.train.precision, torch.device(device_type))


def kernel_workspace(named: dict[str, Any], backend: str, device_type: str) -> int:
    """Bytes that a kernels' operator over a memory, with these arguments, takes and gives back beside its results, at most.

    triton: at most two programs per multiprocessor, each with one partial result, and one more for every pair of row tile and block.
    streaming: a tile of logits (on a GPU in 16 bits, too) and of entries; rows stacked and scaled; the partition's 64-bit positions. By
    flash attention (a CPU): a chunk of entries and read-outs of two chunks for each of its parts.
    """
    (entries, width), block_size = named["memory"].shape, named["block_size"]
    rows = sum(named[name].numel() // width for name in ("student", "teacher", "rows") if name in named)
    results = rows * (width + 1) * 4
    if backend == "triton":
        processors = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else MULTIPROCESSORS
        items = math.ceil(rows / PROGRAM_ROWS) * (entries // block_size)
        return (2 * processors + items) * PROGRAM_ROWS * (width + 2) * 4 + results + entries * 4
    most_rows, most_logits = streaming.CPU_TILE if device_type == "cpu" else streaming.GPU_TILE
    tile_rows = min(rows, most_rows)
    tile_entries = min(block_size, max(64, most_logits // tile_rows), streaming.CPU_ENTRIES if device_type == "cpu" else block_size)
    tile = tile_entries * (tile_rows * (4 if device_type == "cpu" else 6) + width * 8)
    partition = entries * 8 * 6 if named.get("partition") is None else 0
    if device_type == "cpu" and flash.OPERATOR is not None:
        parts = min(torch.get_num_threads(), flash.MOST_PARTS)
        tile = min(block_size, max(flash.CHUNK, parts * flash.PART)) * width * 8 + 2 * parts * tile_rows * (width + 1) * 4
    return max(tile + tile_rows * width * 8 + 3 * results, partition)


def largest_batch(config: Config, *, device_type: str, budget: int, most: int = 65536) -> tuple[int, Estimate | None]:
    """(most images of a micro-batch whose estimate stays within ``budget`` bytes, its estimate); (0, None) where not even one does.

    The peak grows with the batch as a line does, from some batch on: two estimates give a first guess, further ones correct it.
    """
    most = min(most, getattr(config.objective, "memory_size", most))  # no more rows may enter a memory at once

    def at(batch: int) -> Estimate:
        return estimate_step(config, device_type=device_type, device_batch=batch)

    low, high = at(2), at(16)
    slope = max((high.bytes - low.bytes) / 14, 1.0)
    fitting: Estimate | None = next((e for e in (high, low) if e.bytes <= budget), None)
    if fitting is None:
        one = at(1)
        return (1, one) if one.bytes <= budget else (0, None)
    too_many = math.inf
    guess = int(min(most, 2 + (budget - low.bytes) / slope))
    for _ in range(8):
        guess = max(min(guess, most), fitting.device_batch)
        if guess == fitting.device_batch or guess >= too_many:
            break
        tried = at(guess)
        if tried.bytes <= budget:
            slope = max((tried.bytes - low.bytes) / (guess - 2), 1.0)
            fitting = tried
        else:
            slope = (tried.bytes - fitting.bytes) / (guess - fitting.device_batch)
            too_many = guess
        guess = min(fitting.device_batch + int((budget - fitting.bytes) / slope), too_many - 1 if too_many < math.inf else most)
    return fitting.device_batch, fitting


@dataclass(frozen=True)
class WayOut:
    """A change that lowers the peak."""

    settings: str
    effect: str
    """What it changes in the training."""
    time: str
    """What it costs in time."""
    bytes: int
    """The peak then, estimated."""
    saved: int


def ways_out(config: Config, *, device_type: str, world_size: int, budget: int, most: int = 3) -> list[WayOut]:
    """Changes that lower the estimated peak, cheapest first: what changes no number of the training before what changes some, and of
    these what computes nothing twice before what does."""
    accumulation, batch = micro_batches_of(config, world_size)
    now = estimate_step(config, device_type=device_type, device_batch=batch, accumulation=accumulation)
    ways: list[WayOut] = []

    def attempt(key: str, value: object, effect: str, time: str, batch: int = batch, accumulation: int = accumulation) -> None:
        if len(ways) == most:
            return
        changed = config.model_copy(deep=True)
        section, name = key.split(".")
        setattr(getattr(changed, section), name, value)
        try:
            estimate = estimate_step(changed, device_type=device_type, device_batch=batch, accumulation=accumulation)
        except ValueError:  # a setting that this network does not allow
            return
        if estimate.bytes < 0.98 * now.bytes:
            ways.append(WayOut(f"--{key} {value}", effect, time, estimate.bytes, now.bytes - estimate.bytes))

    if getattr(config.objective, "backend", "") == "reference":
        attempt("objective.backend", "auto", "the same training", "less: no logits are written")
    pair, flops = counted(config)
    batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in pair.student.modules())
    divisors = [n for n in range(accumulation + 1, accumulation * batch + 1) if (accumulation * batch) % n == 0]
    if divisors:
        # The peak is a line over the batch: one estimate more tells which micro-batch fits, or that none does.
        tried = estimate_step(config, device_type=device_type, device_batch=accumulation * batch // divisors[0], accumulation=divisors[0])
        slope = (now.bytes - tried.bytes) / (batch - tried.device_batch)
        fitting = [n for n in divisors if now.bytes - slope * (batch - accumulation * batch // n) <= budget]
        more = fitting[0] if fitting else divisors[-1]
        attempt(
            "train.micro_batch",
            accumulation * batch // more,
            "batch norms see fewer images, otherwise the same training" if batch_norm else "the same training",
            f"as many operations, in {more} micro-batches per step instead of {accumulation}: smaller products, more launches",
            batch=accumulation * batch // more,
            accumulation=more,
        )
    if config.model.recompute == "nothing":
        attempt("model.recompute", "pointwise", "the same training", "norms and activations twice, no product")
    if config.model.recompute != "blocks":
        forward = sum(backbone_flops(pair.student.backbone, view.size)[0] for view in views_of(config.crops))
        more_work = f"{100 * forward / flops:.0f} % more operations"
        attempt("model.recompute", "blocks", "the same training", more_work)
    precision = precision_on(config, device_type)
    if precision.name == "fp32" and (device_type == "cpu" or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 8):
        attempt("train.precision", "bf16", "other rounding", "less on a GPU")
    if len(ways) < most and world_size > 1 and config.parallel.strategy != "fsdp2":
        kept = now.peak.by_category
        shared = sum(kept[name] for name in (ledger.WEIGHTS, ledger.TEACHER, ledger.GRADIENTS, ledger.OPTIMIZER))
        saved = shared - math.ceil(shared / world_size)
        if saved > 0.02 * now.bytes:
            ways.append(WayOut("--parallel.strategy fsdp2", "the same training", "more communication", now.bytes - saved, saved))
    if len(ways) < most and config.crops.num_local > 2:
        fewer = config.crops.num_local // 2
        _, remaining = counted(config.model_copy(update={"crops": config.crops.model_copy(update={"num_local": fewer})}))
        attempt(
            "crops.num_local",
            fewer,
            f"another training: {fewer} local crops per image instead of {config.crops.num_local}",
            f"{100 - 100 * remaining / flops:.0f} % fewer operations",
        )
    attempt(
        "train.global_batch",
        max(1, config.train.global_batch // 2),
        "another training: half the images per step (the learning rate follows)",
        "as many operations per image, twice the updates",
        batch=max(1, batch // 2),
        accumulation=accumulation,
    )
    if getattr(config.objective, "memory_size", 0) > getattr(config.objective, "block_size", 0):
        half = max(config.objective.block_size, config.objective.memory_size // 2)
        attempt("objective.memory_size", half, "another training: a memory half as long", "less")
    return ways


def counted(config: Config) -> tuple[StudentTeacher, float]:
    """The networks in shapes, and the operations of a step for one image."""
    with FakeTensorMode():
        objective = build_objective(in_shapes(config), Precision("fp32", "counting"), rank=0)
    with torch.device("meta"):
        pair, _ = build_pair(in_shapes(config), objective)
    return pair, step_flops(pair, objective, crop_sizes=[view.size for view in views_of(config.crops)], batch=1)


@dataclass(frozen=True)
class Explanation:
    """Why a step does not fit."""

    estimate: Estimate
    short: str
    """One sentence or two."""
    text: str
    """The sentences with all ways out."""


def explain(config: Config, world: World) -> Explanation:
    """Why a step of this run does not fit this rank's device, and the three cheapest ways out, from shapes alone.

    Takes seconds and no memory of the device, so that it may be called where an allocation has just failed.
    """
    device_type = world.device.type
    accumulation, batch = micro_batches_of(config, world.size)
    estimate = estimate_step(config, device_type=device_type, device_batch=batch, accumulation=accumulation)
    total, free_now = capacity(world.device)
    others = max(0, total - free_now - torch.cuda.memory_reserved(world.device)) if device_type == "cuda" else 0
    budget = int(total * (1 - RESERVE)) - others if device_type == "cuda" else int(free_now * (1 - RESERVE))
    ways = ways_out(config, device_type=device_type, world_size=world.size, budget=budget)
    reason = (
        f"Out of memory: a step with micro-batches of {batch} images needs about {gib(estimate.bytes)} by its shapes, its peak in "
        f"'{estimate.peak.section}'; the {'device' if device_type == 'cuda' else 'host'} has {gib(total)}, {gib(free_now)} of it free now."
    )
    if estimate.bytes <= total * (1 - RESERVE):
        reason += (
            " By this estimate it would fit the empty machine: other programs, the loader, a leak or a limit of the process take the rest."
        )
    largest = sorted((estimate.peak.by_category | estimate.extras).items(), key=lambda item: -item[1])[:7]
    lines = [reason, "  " + ", ".join(f"{name} {gib(size)}" for name, size in largest if size)]
    if device_type == "cuda":
        lines.append(f"  Beside PyTorch, {gib(others)} of the device are taken (CUDA context, DALI's pool, other programs).")
    lines.append("What would lower it, cheapest first:" if ways else "No setting lowers it by more than 2 %: a smaller network is needed.")
    for number, way in enumerate(ways, 1):
        fits = "fits" if way.bytes <= budget else "not enough alone"
        lines.append(f"  {number}. {way.settings:<29} saves {gib(way.saved)}, to {gib(way.bytes)} ({fits}): {way.effect}.")
        lines.append(f"     {'':<29} Time: {way.time}.")
    lines.append("massl-fast profile memory shows the whole book, measured, too.")
    first = f" {lines[-2]}"
    if ways:
        way = next((way for way in ways if way.bytes <= budget), ways[0])
        first = f" Cheapest way out: {way.settings}, which saves {gib(way.saved)}{'' if way.bytes <= budget else ', not enough alone'}."
    return Explanation(estimate, reason + first, "\n".join(lines))


def capacity(device: torch.device) -> tuple[int, int]:
    """(bytes of the device or host, bytes free now)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():  # of a container
        total = min(total, int(most))
        free = min(free, max(0, int(most) - int(used.read_text())))
    return total, free


def gib(size: float) -> str:
    """Bytes in the unit that suits them."""
    if size >= 0.1 * GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / MIB:.1f} MiB" if size >= 0.1 * MIB else f"{size / 1024:.1f} KiB"
