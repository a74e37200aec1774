"""Which rank the others wait for.

Ranks of a synchronous run take the same time for a step: the fast ones wait for the slow ones where gradients are exchanged. So what is
measured is how long a rank takes from the end of one step to the point where it first waits, the last backward pass of the next: fetching
data and the forward passes (under fsdp2 forward passes wait, too, and hide a part). On a GPU by events on its stream.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from massl_fast.distributed.world import World


class StragglerClock:
    """Seconds a step from ``start`` (the end of the step before) to ``reached``, summed over the steps since the last ``spread``."""

    def __init__(self, world: World):
        self.world = world
        self._on_gpu = world.device.type == "cuda"
        self._spans: list[tuple] = []
        self._started = None

    def start(self) -> None:
        if self.world.size > 1:  # one alone waits for nobody, and an event must not be recorded while a CUDA graph is
            self._started = self._now()

    def reached(self) -> None:
        if self._started is not None:
            self._spans.append((self._started, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def spread(self, step_seconds: float) -> dict[str, float | int]:
        """Seconds of a step on the slowest and on the fastest rank, and which rank was the slowest, in a window whose steps took
        ``step_seconds``. A collective call that waits for the device.
        """
        own = self._seconds_a_step()
        table = self.world.gather_rows(torch.tensor([[own]], dtype=torch.float64, device=self.world.device)).flatten()
        return spread_of(table, step_seconds)

    def _seconds_a_step(self) -> float:
        spans, self._spans = self._spans, []
        if not spans:
            return 0.0
        if self._on_gpu:
            spans[-1][1].synchronize()
            return sum(begin.elapsed_time(end) for begin, end in spans) / 1000 / len(spans)
        return sum(end - begin for begin, end in spans) / len(spans)


def spread_of(own_seconds: Tensor, step_seconds: float) -> dict[str, float | int]:
    """``own_seconds`` [ranks] until each first waits → the slowest rank's step is the step, the fastest one's shorter by the difference."""
    difference = (own_seconds.max() - own_seconds.min()).item()
    return {
        "step_seconds_slowest": round(step_seconds, 5),
        "step_seconds_fastest": round(max(step_seconds - difference, 0.0), 5),
        "slowest_rank": int(own_seconds.argmax()),
    }
