"""PyTorch's profiler, without what its library prints to the terminal on a machine without a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Read by the profiler's library (Kineto) when it first starts; its notes and its complaint about a missing GPU are no user's business.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@contextlib.contextmanager
def host_allocations() -> Iterator[list[int]]:
    """Yields a list that holds, after the block, the bytes of every allocation (negative: of every release) on the host, in order."""
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield sizes
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    sizes.extend(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
