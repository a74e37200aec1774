"""FSDP2: student and teacher sharded over all ranks, a unit a transformer block (parallel.strategy fsdp2).

Each block's parameters are gathered just before its forward (and backward) pass and freed after it; gradients are reduced to the shards;
optimizer and teacher average work on local shards. What stays outside the blocks (patch embedding, last norm, head) is one more unit.

The packed pass calls the parts of a timm block, not the block, so the hooks that ``fully_shard`` puts around ``forward`` would not fire.
FSDP2 takes further methods as forward methods (``register_fsdp_forward_method``); the packed computation of a block is registered as one
of the block, so it is gathered, freed and prefetched block by block as timm's own forward is, at no extra traffic.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from massl_fast.distributed.world import World
from massl_fast.models.backbone import Encoder
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import Precision


def shard_(pair: StudentTeacher, world: World, precision: Precision) -> None:
    """Shard both encoders in place. To be called before the optimizer is built and after blocks are compiled.

    Where the step computes in 16 bits, parameters are gathered in that format and gradients reduced in float32; the shards stay float32.
    The stream between blocks then has 16 bits, too, where DDP keeps it in float32. Raises ValueError for a network without blocks.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if world.device.type == "cuda" and precision.name != "fp32":
        policy = MixedPrecisionPolicy(param_dtype=precision.dtype, reduce_dtype=torch.float32)
    for encoder in (pair.student, pair.teacher):
        # fully_shard wants parameters in the plain memory format.
        encoder.to(memory_format=torch.contiguous_format)
        blocks = blocks_of(encoder)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # The rest, too, is freed after the forward pass: the moving average and the evaluation in between find shards everywhere.
        fully_shard(encoder, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        register_fsdp_forward_method(encoder, "features")
        if encoder.packed is not None:
            run_block = encoder.packed.run_block
            for block in blocks:
                block.packed_forward = partial(run_block, block)  # type: ignore[assignment]  # a method, as FSDP wants it
                register_fsdp_forward_method(block, "packed_forward")
            encoder.packed.run_blocks_by(_run_packed_forward)


def _run_packed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block.packed_forward(*args, **kwargs)  # type: ignore[operator]


def blocks_of(encoder: Encoder) -> list[nn.Module]:
    blocks = getattr(encoder.backbone, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise ValueError(
            f"parallel.strategy is fsdp2, which shards transformers block by block, but {type(encoder.backbone).__name__} has no list of "
            f"blocks. Choose ddp, which takes any network."
        )
    return list(blocks)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
