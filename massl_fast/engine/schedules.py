"""What changes from step to step: learning rate, weight decay, teacher momentum and teacher temperature.

Each value is computed from the step alone, so a resumed run needs no schedule state. Shapes of the published code: linear warm-up from
0 and cosine for the learning rate, cosines for weight decay and momentum, linear warm-up for the teacher temperature.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from massl_fast.config import Config


class StepSettings(NamedTuple):
    """Values of one optimizer step."""

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


def cosine(step: int, start: float, end: float, length: int) -> float:
    """From ``start`` at step 0 along a half cosine towards ``end``, which step ``length`` would reach."""
    return start + 0.5 * (end - start) * (1 - math.cos(math.pi * min(step, length) / length))


def linear(step: int, start: float, end: float, length: float) -> float:
    """From ``start`` at step 0 in a straight line to ``end`` at step ``length``, and there from then on."""
    return end if step >= length else start + (end - start) * step / length


class Schedules:
    """Settings of every step of a run of ``total_steps`` steps, of which ``steps_per_epoch`` make an epoch."""

    def __init__(self, config: Config, total_steps: int, steps_per_epoch: int):
        optimizer = config.optimizer
        self.config = config
        self.total_steps = total_steps
        self.warmup_steps = round(optimizer.warmup_epochs * steps_per_epoch)
        self.temperature_steps = config.objective.teacher_temperature_warmup_epochs * steps_per_epoch
        scale = config.train.global_batch / 256 if optimizer.learning_rate_scaling == "linear" else 1.0
        self.peak_learning_rate = optimizer.learning_rate * scale
        if self.warmup_steps >= total_steps:
            raise ValueError(
                f"optimizer.warmup_epochs {optimizer.warmup_epochs} is {self.warmup_steps} steps, but the whole run has only "
                f"{total_steps}. Shorten the warm-up or train longer."
            )

    def at(self, step: int) -> StepSettings:
        optimizer, teacher, objective = self.config.optimizer, self.config.teacher, self.config.objective
        if step < self.warmup_steps:
            # The warm-up touches both ends: 0 at its first step, the peak at its last.
            learning_rate = linear(step, 0.0, self.peak_learning_rate, max(self.warmup_steps - 1, 1))
        else:
            learning_rate = cosine(
                step - self.warmup_steps, self.peak_learning_rate, optimizer.minimum_learning_rate, self.total_steps - self.warmup_steps
            )
        return StepSettings(
            learning_rate=learning_rate,
            weight_decay=cosine(step, optimizer.weight_decay, optimizer.weight_decay_end, self.total_steps),
            teacher_momentum=cosine(step, teacher.momentum, teacher.momentum_end, self.total_steps),
            teacher_temperature=linear(step, objective.teacher_temperature_start, objective.teacher_temperature, self.temperature_steps),
        )
