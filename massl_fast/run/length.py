"""The images of a run: opened by all ranks, and how a step's batch is divided among them."""

from __future__ import annotations

from massl_fast.data.loaders import open_data
from massl_fast.data.sources import Source
from massl_fast.distributed.world import World


def open_together(world: World, path: str, setting: str, role: str) -> Source:
    """The source that a setting names (see ``open_data``), on every rank. A collective call."""
    if world.is_main:
        source = open_data(path, setting, role)
    world.barrier()  # what is made on first use (generated images, tar indices) is made once
    return source if world.is_main else open_data(path, setting, role)


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
            f"{per_rank} images a process (train.global_batch / processes) do not split into {accumulation} equal micro-batches "
            f"of at most train.micro_batch {device_batch}. Choose a train.micro_batch that divides {per_rank}."
        )
    return accumulation, images


def in_micro_batches(images: int, device_batch: int) -> tuple[int, int]:
    """(fewest micro-batches of at most ``device_batch`` images, 0: any number; images of the largest of them)."""
    accumulation = -(-images // (device_batch or images))
    return accumulation, -(-images // accumulation)
