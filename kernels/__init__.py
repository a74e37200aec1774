"""The numerics of self-supervised losses: loss, read-out, read-back, partition and ring. Needs torch, and triton for the fused path."""

from massl_fast.kernels.backends import available_backends
from massl_fast.kernels.cross_entropy import MemoryCrossEntropy, memory_cross_entropy
from massl_fast.kernels.partition import partition_indices
from massl_fast.kernels.readout import memory_readback, memory_readout
from massl_fast.kernels.ring import enqueue_

__all__ = [
    "MemoryCrossEntropy",
    "available_backends",
    "enqueue_",
    "memory_cross_entropy",
    "memory_readback",
    "memory_readout",
    "partition_indices",
]
