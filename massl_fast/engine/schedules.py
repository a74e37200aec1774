"""What changes from step to step: learning rate, weight decay, teacher momentum and the objective's own curves.

Each value is computed from the step alone, so a resumed run needs no schedule state. Shapes of the published code: linear warm-up from
0 and cosine for the learning rate, cosines for weight decay and momentum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from massl_fast.config import Config
from massl_fast.length import Length, cosine, linear
from massl_fast.objectives.base import Curve, Objective


class StepSettings(NamedTuple):
    """Values of one optimizer step: numbers, or 0-d float64 tensors on the device in a recorded step."""

    learning_rate: float | Tensor
    weight_decay: float | Tensor
    teacher_momentum: float | Tensor
    own: Mapping[str, float | Tensor]
    """Values of the objective's own curves, by name."""
    frozen: tuple[str, ...] = ()
    """Prefixes of names of parameters that stand still; fixed while a recording lasts."""

    def vector(self, device: torch.device) -> Tensor:
        """float64 [3 + own] on the device: learning rate, weight decay, momentum, own values; a copy that the host does not wait for."""
        values = [self.learning_rate, self.weight_decay, self.teacher_momentum, *self.own.values()]
        if isinstance(self.learning_rate, Tensor):
            return torch.stack([value.double() for value in values])
        return torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    @classmethod
    def of_vector(cls, vector: Tensor, own: Sequence[str], frozen: tuple[str, ...] = ()) -> StepSettings:
        """The reverse of ``vector``: 0-d views of it."""
        learning_rate, weight_decay, momentum, *values = vector.unbind()
        return cls(learning_rate, weight_decay, momentum, dict(zip(own, values, strict=True)), frozen)


class Schedules:
    """Settings of every step of a run of ``objective``."""

    def __init__(self, config: Config, length: Length, objective: Objective):
        optimizer = config.optimizer
        self.config, self.length, self.objective = config, length, objective
        self.own: dict[str, Curve] = objective.schedules(length)
        self.total_steps = length.total_steps
        self.warmup_steps = length.steps(optimizer.warmup_epochs)
        scale = length.global_batch / 256 if optimizer.learning_rate_scaling == "linear" else 1.0
        self.peak_learning_rate = optimizer.learning_rate * scale
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"optimizer.warmup_epochs {optimizer.warmup_epochs} is {self.warmup_steps} steps, but the whole run has only "
                f"{self.total_steps}. Shorten the warm-up or train longer."
            )

    def at(self, step: int) -> StepSettings:
        optimizer, teacher = self.config.optimizer, self.config.teacher
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
            own={name: curve(step) for name, curve in self.own.items()},
            frozen=self.objective.frozen(step, self.length),
        )
