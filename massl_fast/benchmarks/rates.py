"""The device that is measured, and what it does at best: products of matrices, the yardstick beside a data sheet's figure."""

from __future__ import annotations

import time
from statistics import median

import torch


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


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names; the GPU, else the CPU, where it names none."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name}; it can be cpu, cuda, or cuda:1 and so on.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name}, and torch finds no GPU here. --device cpu does without.")
    if device.index is not None and device.index >= (torch.cuda.device_count() if device.type == "cuda" else 1):
        raise ValueError(f"--device is {name}; there are {torch.cuda.device_count()} GPUs here, counted from 0.")
    return device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
