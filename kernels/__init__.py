"""The numerics of learning from a memory: loss, read-out, partition and ring. Needs torch, and triton for the fused path."""

from massl_fast.kernels.cross_entropy import (
    MemoryCrossEntropy,
    available_backends,
    memory_cross_entropy,
    memory_readout,
)
from massl_fast.kernels.partition import partition_indices
from massl_fast.kernels.ring import enqueue_

__all__ = [
    "MemoryCrossEntropy",
    "available_backends",
    "enqueue_",
    "memory_cross_entropy",
    "memory_readout",
    "partition_indices",
]
