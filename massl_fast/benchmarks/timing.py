"""How calls and the phases of a step are timed, and what a device does at best: products of matrices, the yardstick of a data sheet."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from massl_fast.engine.phases import END
from massl_fast.hardware import synchronize

WINDOWS = 10


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds of some work; on a GPU those between its events, in which waiting for it is not."""
    synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None for _ in range(2))
    start, spent = time.perf_counter(), time.process_time()
    if begin:
        begin.record()
    work()
    if end:
        end.record()
    synchronize(device)
    processor = time.process_time() - spent
    return (begin.elapsed_time(end) / 1000 if begin else time.perf_counter() - start), processor


def in_turn(
    calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device, *, at_least: int = 1, until: float = math.inf
) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of each call in each round; in every other round the order is turned round.

    What else the machine does meets all of them. Garbage is collected between rounds only. After ``at_least`` rounds none begins later
    than ``until`` seconds from the first.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for number in range(rounds):
            if number >= at_least and time.perf_counter() - begin > until:
                break
            for name in list(calls)[:: -1 if number % 2 else 1]:
                seconds[name].append(timed(calls[name], device))
            gc.collect()
    finally:
        gc.enable()
    return seconds


def windows(
    work: Callable[[], Any], seconds: float, device: torch.device, end_of_window: Callable[[], None] = lambda: None
) -> list[tuple[int, float]]:
    """(calls of ``work``, wall seconds) of windows of at least a tenth of ``seconds`` each, until ``seconds`` are over."""
    found: list[tuple[int, float]] = []
    synchronize(device)
    begin = time.perf_counter()
    while not found or time.perf_counter() - begin < seconds:
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < seconds / WINDOWS:
            work()
            count += 1
        synchronize(device)
        found.append((count, time.perf_counter() - start))
        end_of_window()
    return found


class PhaseClock:
    """An observer that times the phases of steps: with events on a GPU, which nothing waits for, and with the host's clock on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, torch.cuda.Event | float]] = []

    def __call__(self, name: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def read(self) -> list[dict[str, float]]:
        """Seconds of each phase, one mapping per step since the last read; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        steps: list[dict[str, float]] = []
        current: dict[str, float] = {}
        for (name, start), (following, stop) in pairwise(self.marks):
            if name == END:  # between two steps
                continue
            seconds = start.elapsed_time(stop) / 1000 if self.on_gpu else stop - start
            current[name] = current.get(name, 0.0) + seconds
            if following == END:
                steps.append(current)
                current = {}
        self.marks.clear()
        return steps


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], torch.Tensor], float]:
    """A large square matrix product on random numbers, and its operations."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * side**3


def matrix_rate(device: torch.device, dtype: torch.dtype, *, rounds: int = 20) -> float:
    """Operations per second of ``matrix_product``: on a GPU the median of the rounds, at the clock that it holds; on a CPU the fastest,
    because other processes only ever take away, with the threads of this process."""
    product, operations = matrix_product(dtype, device)
    product()
    seconds = [wall for wall, _ in in_turn({"product": product}, rounds, device, at_least=5, until=1.0)["product"]]
    return operations / (median(seconds) if device.type == "cuda" else min(seconds))
