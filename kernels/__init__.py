"""The numerics of self-supervised losses: losses, read-out, read-back, partition and ring. Needs torch, and triton for the fused path."""

from massl_fast.kernels.backends import available_backends
from massl_fast.kernels.consistency import PartitionConsistency, partition_consistency
from massl_fast.kernels.contrast import Contrast, contrast
from massl_fast.kernels.cross_entropy import MemoryCrossEntropy, memory_cross_entropy
from massl_fast.kernels.partition import partition_indices
from massl_fast.kernels.prototypes import PrototypeCrossEntropy, prototype_cross_entropy
from massl_fast.kernels.readout import memory_readback, memory_readout
from massl_fast.kernels.ring import enqueue_
from massl_fast.kernels.sinkhorn import sinkhorn_bias

__all__ = [
    "Contrast",
    "MemoryCrossEntropy",
    "PartitionConsistency",
    "PrototypeCrossEntropy",
    "available_backends",
    "contrast",
    "enqueue_",
    "memory_cross_entropy",
    "memory_readback",
    "memory_readout",
    "partition_consistency",
    "partition_indices",
    "prototype_cross_entropy",
    "sinkhorn_bias",
]
