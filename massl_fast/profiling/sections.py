"""The phases of a training step, timed and counted from outside through the step's own socket (``TrainStep.observed``).

An observer is called with the name of a phase at the instant it begins; a phase lasts until the next one begins. ``END`` is the end of a
step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from massl_fast.engine.phases import REST, Observer
from massl_fast.engine.schedules import StepSettings
from massl_fast.engine.step import StepResult, TrainStep

END = ""


class Marked:
    """A ``TrainStep`` whose beginning and end are marked, too."""

    def __init__(self, train_step: TrainStep, observe: Observer):
        self.train_step, self.observe = train_step, observe

    def step(self, micro_batches: Sequence[list[Tensor]], settings: StepSettings, number: int) -> StepResult:
        """One step of the trainer."""
        self.observe(REST)
        result = self.train_step(micro_batches, settings, number)
        self.observe(END)
        return result


@contextlib.contextmanager
def marked(train_step: TrainStep, observe: Observer) -> Iterator[Marked]:
    """Inside, ``observe`` is called with the name of each phase as it begins."""
    with train_step.observed(observe):
        yield Marked(train_step, observe)


class SectionClock:
    """An observer that times the parts: with events on a GPU, which nothing waits for, and with the host's clock on a CPU."""

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
        """Seconds of each part, one mapping a step since the last read; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        steps: list[dict[str, float]] = []
        current: dict[str, float] = {}
        for (name, start), (following, stop) in zip(self.marks, self.marks[1:]):
            if name == END:  # between two steps
                continue
            seconds = start.elapsed_time(stop) / 1000 if self.on_gpu else stop - start
            current[name] = current.get(name, 0.0) + seconds
            if following == END:
                steps.append(current)
                current = {}
        self.marks.clear()
        return steps
