"""What a device does at best, measured: products of matrices, the yardstick beside a data sheet's figure."""

from __future__ import annotations

import time
from statistics import median

import torch

from massl_fast.hardware import synchronize


def matrix_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """Operations a second of a large square matrix product on random numbers.

    On a GPU the median of repetitions, at the clock that it holds, on operands that rotate past its cache; on a CPU the fastest, because
    other processes only ever take away, with the threads of this process.
    """
    size, copies = (8192, 3) if device.type == "cuda" else (1024, 2)
    pairs = [[torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)] for _ in range(copies)]
    out = torch.empty(size, size, device=device, dtype=dtype)
    for a, b in pairs:
        torch.mm(a, b, out=out)
    synchronize(device)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        for a, b in pairs:
            torch.mm(a, b, out=out)
        synchronize(device)
        times.append((time.perf_counter() - start) / copies)
    return 2 * size**3 / (median(times) if device.type == "cuda" else min(times))
