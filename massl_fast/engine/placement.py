"""Student and teacher from the host's memory to where they train: device, memory format, compiled blocks, shards."""

from __future__ import annotations

import torch

from massl_fast.config import Config
from massl_fast.distributed.sharding import shard_
from massl_fast.distributed.world import World, synchronise_batch_norms
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import Precision
from massl_fast.models.products import choose_products, multiply_by_onednn_


def place(pair: StudentTeacher, config: Config, world: World, precision: Precision, strategy: str) -> tuple[StudentTeacher, list[str]]:
    """(the networks ready to train on ``world.device``, sentences for the user). Under fsdp2 a collective call."""
    pair, note = synchronise_batch_norms(pair, world)
    pair.to(world.device, memory_format=torch.channels_last)
    notes = [note] if note else []
    notes += choose_kernels(pair, config, world.device, precision)
    if config.model.compile:
        pair.compile_blocks()
    if strategy == "fsdp2":
        if config.optimizer.name != "adamw":
            raise ValueError(
                f"parallel.strategy is fsdp2, and only PyTorch's fused AdamW works on its shards, not {config.optimizer.name}. Choose "
                f"optimizer.name adamw, or parallel.strategy ddp."
            )
        shard_(pair, world, precision)
    return pair, notes


def choose_kernels(pair: StudentTeacher, config: Config, device: torch.device, precision: Precision) -> list[str]:
    """Choose how networks that lie on ``device`` attend and multiply; sentences for the user, the one on attention apart (it is in
    ``Encoder.attention_reason``).

    Raises ValueError for a choice that cannot be had.
    """
    pair.choose_attention(config.model.attention, device, precision)
    by_onednn, reason = choose_products(config.train.cpu_products, device, precision.name)
    if by_onednn:
        multiply_by_onednn_(pair)
        return [f"Linear layers are computed by oneDNN ({reason}; train.cpu_products)."]
    return []
