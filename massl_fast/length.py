"""How long a run is, how its batch divides among devices, and the curves along it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from massl_fast.config import Config


@dataclass(frozen=True)
class Length:
    """A run in steps. ``global_batch`` images make a step: ``accumulation`` micro-batches of ``micro_batch`` images on every rank."""

    total_steps: int
    steps_per_epoch: int
    global_batch: int
    accumulation: int
    micro_batch: int

    def epoch(self, step: int) -> float:
        """Passes over the data after ``step`` steps."""
        return step / self.steps_per_epoch

    def steps(self, epochs: float) -> int:
        """The nearest number of steps to ``epochs`` passes over the data."""
        return round(epochs * self.steps_per_epoch)


def length_of(config: Config, steps_per_epoch: int, world_size: int) -> Length:
    """The length of the run that ``config`` describes. Raises ValueError where the batch does not divide evenly among the processes."""
    train = config.train
    accumulation, micro_batch = divided(train.global_batch, train.micro_batch, world_size)
    total_steps = train.steps or max(1, round(train.epochs * steps_per_epoch))
    return Length(total_steps, steps_per_epoch, train.global_batch, accumulation, micro_batch)


def divided(global_batch: int, device_batch: int, world_size: int) -> tuple[int, int]:
    """(micro-batches of a step, images of one) on one rank; ``device_batch`` is the most it takes at once, 0: all.

    Raises ValueError where the batch does not divide evenly.
    """
    if global_batch % world_size:
        raise ValueError(
            f"train.global_batch {global_batch} does not divide among {world_size} processes. Choose a multiple of {world_size}."
        )
    per_rank = global_batch // world_size
    accumulation, images = in_micro_batches(per_rank, device_batch)
    if accumulation * images != per_rank:
        raise ValueError(
            f"{per_rank} images per process (train.global_batch / processes) do not split into {accumulation} equal micro-batches "
            f"of at most train.micro_batch {device_batch}. Choose a train.micro_batch that divides {per_rank}."
        )
    return accumulation, images


def in_micro_batches(images: int, device_batch: int) -> tuple[int, int]:
    """(fewest micro-batches of at most ``device_batch`` images, 0: any number; images of the largest of them)."""
    accumulation = -(-images // (device_batch or images))
    return accumulation, -(-images // accumulation)


def cosine(step: int, start: float, end: float, length: int) -> float:
    """From ``start`` at step 0 along a half cosine towards ``end``, which step ``length`` would reach."""
    return start + 0.5 * (end - start) * (1 - math.cos(math.pi * min(step, length) / length))


def linear(step: int, start: float, end: float, length: float) -> float:
    """From ``start`` at step 0 in a straight line to ``end`` at step ``length``, and there from then on."""
    return end if step >= length else start + (end - start) * step / length
