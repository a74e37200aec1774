"""Which images make up which step: the same for both loaders, at any world size, after any interruption."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Batch:
    """One micro-batch of one rank: ``crops``, a list of V tensors [N, 3, H, W] (float, channels-last, normalised), and ``indices``
    [N] int64, the images' numbers in the loader's source."""

    crops: list[torch.Tensor]
    indices: torch.Tensor


class Order:
    """The images of every step: a fresh permutation each epoch, drawn from (seed, epoch) alone; its remainder is left out.

    Raises ValueError where the batch does not divide or the source is too small for one step.
    """

    def __init__(
        self,
        num_images: int,
        *,
        seed: int,
        global_batch: int,
        device_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        path: str = "the data",
    ) -> None:
        if min(global_batch, device_batch, accumulation, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"A global batch of {global_batch}, a device batch of {device_batch}, {accumulation} accumulated micro-batches and "
                f"rank {rank} of {world_size} do not go together: all must be at least 1, and the rank less than the ranks."
            )
        if global_batch != world_size * accumulation * device_batch:
            raise ValueError(
                f"A global batch of {global_batch} images is not {world_size} ranks × {accumulation} micro-batches × {device_batch} images."
            )
        if num_images < global_batch:
            images = "1 image" if num_images == 1 else f"{num_images} images"
            raise ValueError(
                f"{path} holds {images}, but one step takes a global batch of {global_batch}. "
                f"Use more images or a global batch of at most {num_images}."
                + (" Self-supervised training needs at least 2." if num_images < 2 else "")
            )
        self.num_images, self.seed, self.global_batch = num_images, seed, global_batch
        self.device_batch, self.accumulation = device_batch, accumulation
        self.first = rank * accumulation * device_batch  # of this rank's run within a step
        self.steps_per_epoch = num_images // global_batch

    def permutation(self, epoch: int) -> np.ndarray:
        """int64 [num_images], the order of ``epoch``."""
        counter_based = np.random.Philox(key=[self.seed % 2**64, 1], counter=[0, 0, 0, epoch])
        return np.random.Generator(counter_based).permutation(self.num_images)

    def micro_batches(self, start_step: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, images int64 [N]) of this rank's micro-batches from ``start_step`` on, without end."""
        step = start_step
        while True:
            epoch = step // self.steps_per_epoch
            permutation = self.permutation(epoch)
            for step_of_epoch in range(step % self.steps_per_epoch, self.steps_per_epoch):
                begin = step_of_epoch * self.global_batch + self.first
                for micro_batch in range(self.accumulation):
                    at = begin + micro_batch * self.device_batch
                    yield epoch, permutation[at : at + self.device_batch]
            step = (epoch + 1) * self.steps_per_epoch
