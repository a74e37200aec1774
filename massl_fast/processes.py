"""What this process and its descendants take of the host: processor time and memory."""

from __future__ import annotations

import contextlib

import psutil


def processes() -> list[psutil.Process]:
    """This process and its descendants."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def processor_seconds() -> float:
    """Of this process and its descendants."""
    total = 0.0
    for process in processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def host_bytes() -> int:
    """Memory of this process and its descendants, pages that n processes share counted as 1/n."""
    total = 0
    for process in processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total
