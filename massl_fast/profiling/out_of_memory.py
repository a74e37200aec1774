"""Out of memory: how it shows, and the report that is left of it.

A GPU says so with ``torch.OutOfMemoryError`` where PyTorch's allocator has no more to give, and with other RuntimeErrors where the driver
has none left for a kernel's code or a library's workspace. On a CPU PyTorch raises a RuntimeError, and only where the system refuses memory
at once; where it grants more than there is, as Linux does, the system ends the process instead (exit code 137) and nothing here can run. So
on a CPU the estimate is compared with what is free before anything runs (``demand_host_memory``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from massl_fast.config import Config
from massl_fast.distributed.world import World
from massl_fast.profiling.estimate import Estimate, Explanation, capacity, estimate_step, explain, gib
from massl_fast.profiling.memory_report import estimate_lines, folded
from massl_fast.profiling.synthetic import micro_batches_of

# What PyTorch's CPU allocators say (c10/core/impl/alloc_cpu.cpp).
_CPU_WORDS = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")
# What CUDA's run-time, cuBLAS and cuDNN, and Triton say.
_GPU_WORDS = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no more memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_WORDS + _GPU_WORDS)


@contextlib.contextmanager
def explained(config: Config, world: World) -> Iterator[None]:
    """Where a step of this run meets the end of memory inside, ValueError with the ways out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(explain(config, world).text) from None


def write_out_of_memory_report(config: Config, world: World, folder: Path | str) -> str:
    """Write why a step of this run does not fit, and the three cheapest ways out, to ``folder``; returns one sentence or two.

    The file is ``out_of_memory.txt`` (of several ranks ``out_of_memory_rank_2.txt``); a folder that cannot be written is told in the
    sentence. To be called once an allocation has failed: it takes no memory of the device, seconds, and some 100 MiB of the host.
    """
    try:
        explanation = explain(config, world)
    except (RuntimeError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return f"Out of memory; and the report on it could not be made: {reason}. A smaller train.micro_batch needs less."
    path = Path(folder) / ("out_of_memory.txt" if world.size == 1 else f"out_of_memory_rank_{world.rank}.txt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(folded(report_lines(explanation, world)) + "\n", encoding="utf-8")
        rest = f"The whole book and further ways out: {path}"
    except OSError as error:
        rest = f"The whole book could not be written to {path}: {error.strerror}. massl-fast profile memory --estimate shows it"
    return f"{explanation.short} {rest}."


def demand_host_memory(config: Config, world: World, estimate: Estimate | None = None) -> None:
    """Raises ValueError, with the ways out, where a step by its shapes takes more than this host has free. On a GPU nothing is asked: there
    the allocator answers."""
    if world.device.type != "cpu":
        return
    if estimate is None:
        accumulation, batch = micro_batches_of(config, world.size)
        estimate = estimate_step(config, device_type="cpu", device_batch=batch, accumulation=accumulation)
    if estimate.bytes > capacity(world.device)[1]:
        raise ValueError(explain(config, world).text)


def report_lines(explanation: Explanation, world: World) -> list[str]:
    """The report as text."""
    lines = [*explanation.text.splitlines(), ""]
    if world.device.type == "cuda":
        device = world.device
        free, total = torch.cuda.mem_get_info(device)
        lines += [
            f"By PyTorch's count on {torch.cuda.get_device_name(device)} (rank {world.rank}): at most "
            f"{gib(torch.cuda.max_memory_allocated(device))} in use at once, {gib(torch.cuda.max_memory_reserved(device))} reserved; "
            f"{gib(free)} of {gib(total)} free when this was written.",
            "",
        ]
    return [*lines, "The step by its shapes:", *estimate_lines(explanation.estimate)]
