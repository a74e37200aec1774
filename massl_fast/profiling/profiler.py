"""PyTorch's profiler, without what its library prints to the terminal on a machine without a GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Read by the profiler's library (Kineto) when it first starts; its notes and its complaint about a missing GPU are no user's business.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@contextlib.contextmanager
def host_allocations() -> Iterator[list[int]]:
    """Yields a list that holds, after the block, the bytes of every allocation (negative: of every release) on the host, in order."""
    sizes: list[int] = []
    with (
        _without_line("Memory block of unknown size was allocated before the profiling started"),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        yield sizes
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    sizes.extend(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at a time during some work, beyond those that were there: on a GPU by PyTorch's allocator, on a CPU by its
    operators."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with host_allocations() as sizes:
        work()
    return max(0, *accumulate(sizes))


@contextlib.contextmanager
def _without_line(words: str) -> Iterator[None]:
    """Keep one known line that PyTorch's C++ writes to the terminal away from it (blocks that were there before are counted by whoever
    calls); everything else that is written meanwhile follows after the block."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught:
        terminal = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            caught.seek(0)
            rest = [line for line in caught.read().splitlines(keepends=True) if words.encode() not in line]
            if rest:
                os.write(2, b"".join(rest))
