"""The parts of a training step, marked from outside: hooks and wrappers that are taken off again, nothing in the step itself.

An observer is told the name of a part at the instant it begins; a part lasts until the next one begins. ``REST`` is what lies between the
named parts (collecting results, checks), ``END`` the end of a step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from massl_fast.engine.schedules import StepSettings
from massl_fast.engine.step import StepResult, TrainStep

TEACHER, STUDENT, LOSS, BACKWARD, CLIP, OPTIMIZER, EMA, ENQUEUE, REST = (
    "teacher",
    "student forward",
    "loss",
    "backward",
    "norms, check, clip",
    "optimizer",
    "teacher average",
    "enqueue",
    "rest",
)
END = ""
NAMES = (TEACHER, STUDENT, LOSS, BACKWARD, CLIP, OPTIMIZER, EMA, ENQUEUE, REST)


class Sections:
    """Marks on a ``TrainStep``, in force inside a ``with`` block; ``observe`` is called with the name of each part as it begins."""

    def __init__(self, train_step: TrainStep, observe: Callable[[str], None]):
        self.train_step, self.observe = train_step, observe
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Sections:
        step, pair, objective = self.train_step, self.train_step.pair, self.train_step.objective
        for module, name, after in ((pair.teacher, TEACHER, REST), (step.student, STUDENT, REST), (objective, LOSS, BACKWARD)):
            before = module.register_forward_pre_hook(lambda *_, name=name: self.observe(name))
            behind = module.register_forward_hook(lambda *_, name=after: self.observe(name))
            self._undo.callback(before.remove)
            self._undo.callback(behind.remove)
        before = step.optimizer.register_step_pre_hook(lambda *_: self.observe(OPTIMIZER))
        behind = step.optimizer.register_step_post_hook(lambda *_: self.observe(REST))
        self._undo.callback(before.remove)
        self._undo.callback(behind.remove)
        if hasattr(step.optimizer, "update_"):  # one that moves the teacher, too
            self._wrap(step.optimizer, "update_", OPTIMIZER)
        for owner, method, name in ((step, "_update", CLIP), (pair, "update_teacher_", EMA), (objective, "enqueue_", ENQUEUE)):
            self._wrap(owner, method, name)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()

    def step(self, micro_batches: Sequence[list[Tensor]], settings: StepSettings, number: int) -> StepResult:
        """One step of the trainer, its beginning and its end marked, too."""
        self.observe(REST)
        result = self.train_step(micro_batches, settings, number)
        self.observe(END)
        return result

    def _wrap(self, owner: object, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def marked(*args, **kwargs):
            self.observe(name)
            result = inner(*args, **kwargs)
            self.observe(REST)
            return result

        setattr(owner, method, marked)  # on the instance, before the class's own
        self._undo.callback(delattr, owner, method)


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
