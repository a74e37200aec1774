"""The MaSSL objective: a memory of past teacher embeddings, compared in random blocks (Silva et al., ICML 2024, section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from massl_fast.kernels import enqueue_, memory_cross_entropy
from massl_fast.kernels.cross_entropy import MemoryCrossEntropy


class MasslObjective(nn.Module):
    """Owns the memory [K, D] (unit rows) and the position of the oldest entry; knows nothing of networks.

    ``partition_of_step(step)`` gives an int tensor [K] to be used instead of the keyed random partition of (partition_seed, step); by
    default there is none for stochastic blocks and the memory's own order for contiguous ones. ``seed`` fills the memory and is the
    partition's seed, too, unless that has its own.
    """

    memory: Tensor
    pointer: Tensor

    def __init__(
        self,
        memory_size: int,
        embedding_dim: int,
        *,
        block_size: int,
        student_temperature: float,
        block_reduction: str = "mean",
        enqueue_view: str = "second",
        partition: str = "stochastic",
        partition_of_step: Callable[[int], Tensor | None] | None = None,
        seed: int = 0,
        partition_seed: int | None = None,
        memory_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ):
        super().__init__()
        self.block_size = block_size
        self.student_temperature = student_temperature
        self.block_reduction = block_reduction
        self.teacher_view = {"first": 0, "second": 1}[enqueue_view]
        self.partition_seed = seed if partition_seed is None else partition_seed
        self.backend = backend
        # A random memory, as published: uniform on the sphere, the same on every rank and device.
        rows = torch.randn(memory_size, embedding_dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("memory", F.normalize(rows, dim=1).to(memory_dtype))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        if partition == "blockwise" and partition_of_step is None:
            self.register_buffer("own_order", torch.arange(memory_size, dtype=torch.int32), persistent=False)
            partition_of_step = lambda step: self.own_order  # noqa: E731
        self.partition_of_step = partition_of_step or (lambda step: None)

    def forward(self, student: Tensor, teacher: Tensor, *, step: int, teacher_temperature: float) -> MemoryCrossEntropy:
        """``student`` [V, N, D] and ``teacher`` [T, N, D], unit rows → loss and entropies (see ``memory_cross_entropy``)."""
        dtype = self.memory.dtype
        return memory_cross_entropy(
            student.to(dtype),
            teacher.to(dtype),
            self.memory,
            block_size=self.block_size,
            student_temp=self.student_temperature,
            teacher_temp=teacher_temperature,
            partition=self.partition_of_step(step),
            seed=self.partition_seed,
            step=step,
            block_reduction=self.block_reduction,
            backend=self.backend,
        )

    def entering(self, teacher: Tensor) -> Tensor:
        """The rows [N, D] of ``teacher`` [T, N, D] that enter the memory after the step."""
        return teacher[self.teacher_view]

    def enqueue_(self, rows: Tensor, enabled: Tensor) -> None:
        """Write ``rows`` [n, D] over the oldest entries; where ``enabled`` (bool 0-d tensor) is false nothing changes."""
        enqueue_(self.memory, self.pointer, rows, enabled=enabled)

    def spread(self) -> Tensor:
        """1 − ‖mean entry‖²: 1 for a memory spread evenly over the sphere, 0 for one that has collapsed to a point."""
        return unit_row_spread(self.memory)

    def oldest_entry_steps(self, step: int, global_batch: int) -> float:
        """Age in steps of the oldest entry after ``step`` steps; entries of the random start count as old as the run."""
        return min(step, self.memory.shape[0] / global_batch)


def unit_row_spread(rows: Tensor) -> Tensor:
    """1 − ‖mean row‖² of unit rows [n, D]: the part of their energy that is not common to all."""
    return 1 - rows.float().mean(0).square().sum()
