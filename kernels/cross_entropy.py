"""MaSSL's loss as its users meet it: checks, choice of backend, custom op, autograd.

The gradient is a by-product of the forward pass (kernels/loss.py), so the op returns a fixed tuple of plain tensors, autograd stays
outside it, and backward is one multiplication.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from massl_fast.kernels import checks, reference, streaming
from massl_fast.kernels.backends import TRITON, autocast, choose_backend, partition_of, split_scalar, wide_dtype
from massl_fast.kernels.loss import AttachGradient, assemble
from massl_fast.kernels.operators import operator


class MemoryCrossEntropy(NamedTuple):
    """What ``memory_cross_entropy`` returns: 0-d tensors, float32 (float64 for float64 inputs), in nats."""

    loss: Tensor
    """Cross-entropy, differentiable in the student alone; mean or sum over blocks, mean over pairs and images."""
    student_entropy: Tensor
    """Entropy of the student's distributions, mean over rows and blocks."""
    teacher_entropy: Tensor
    """Entropy of the teacher's distributions, mean over rows and blocks."""
    kl: Tensor
    """Divergence of the student's from the teacher's distributions, mean over pairs, images and blocks."""


def memory_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    *,
    block_size: int,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    partition: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    block_reduction: str = "mean",
    backend: str = "auto",
) -> MemoryCrossEntropy:
    """Cross-entropy of student views against teacher views, both seen as distributions over each block of the memory.

    Source: Learning from Memory (ICML 2024), section 3, equation 3. Every student view i is compared with every teacher view j ≠ i;
    teacher view j is the same crop as student view j. The partition cuts the memory into floor(K / block_size) blocks and leaves a
    remainder out.

    Arguments:
        student: unit rows [V, N, D]; float32, bfloat16, float16 (float64 for the reference and streaming backends).
        teacher: unit rows [T, N, D] of the same dtype; receives no gradient.
        memory: unit rows [K, D] of the same dtype; receives no gradient. Under autocast all three are cast to its dtype.
        block_size: entries of a block, 1 to K.
        student_temp, teacher_temp: positive numbers, or float tensors of one element on the device. The host never reads a tensor's
            value, so it is not checked; it may change without recompiling, and between replays of a CUDA graph.
        partition: a permutation of [0, K), int32 or int64 [K]. None: ``partition_indices(K, seed=seed, step=step)``. Its contents are
            checked on the CPU, and on a GPU, where the check makes the host wait, only if MASSL_FAST_CHECK_PARTITION=1.
        seed, step: they key the partition where none is given; step is an integer or an int64 tensor of one element on the device.
        block_reduction: "mean" (published code) or "sum" (paper) over blocks, for the loss; the other results are always means.
        backend: "auto" takes the first of ``available_backends`` that supports D; a named backend that cannot run is an error.

    Raises ValueError with the argument's name for anything that does not fit.
    """
    student, teacher, memory = autocast(student, teacher, memory)
    checks.check_views(student, teacher, memory)
    checks.check_blocks(memory, block_size)
    if block_reduction not in ("mean", "sum"):
        raise ValueError(f'block_reduction must be "mean" or "sum"; found {block_reduction!r}.')
    backend = choose_backend(backend, memory, "memory_cross_entropy")
    student_temp = checks.check_temperature("student_temp", student_temp, memory)
    teacher_temp = checks.check_temperature("teacher_temp", teacher_temp, memory)
    step = checks.check_partition(partition, step, memory)
    teacher, memory = teacher.detach(), memory.detach()

    if backend == "reference":
        partition = partition_of(partition, memory, seed, step)
        values = reference.memory_cross_entropy(student, teacher, memory, partition, block_size, student_temp, teacher_temp)
        loss, *telemetry = values
        telemetry = [value.detach() for value in telemetry]
    else:
        statistics, gradient = torch.ops.massl_fast.memory_cross_entropy(
            student.detach(), teacher, memory, partition, block_size, *split_scalar(student_temp), *split_scalar(teacher_temp),
            seed, *split_scalar(step), backend,
        )  # fmt: skip
        value, *telemetry = statistics.unbind()
        loss = AttachGradient.apply(student, value, gradient)
    if block_reduction == "sum":
        loss = loss * (memory.shape[0] // block_size)
    return MemoryCrossEntropy(loss, *telemetry)


@operator("massl_fast::memory_cross_entropy")
def _memory_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    student_temp: float,
    student_temp_tensor: Tensor | None,
    teacher_temp: float,
    teacher_temp_tensor: Tensor | None,
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Statistics [4] of ``loss.assemble`` and the gradient [V, N, D], float32 (float64 for float64)."""
    student_temp = student_temp if student_temp_tensor is None else student_temp_tensor
    teacher_temp = teacher_temp if teacher_temp_tensor is None else teacher_temp_tensor
    partition = partition_of(partition, memory, seed, step if step_tensor is None else step_tensor)
    if backend == "triton":
        return TRITON["memory_cross_entropy"](student, teacher, memory, partition, block_size, student_temp, teacher_temp)
    (V, N, D), T = student.shape, teacher.shape[0]
    rows = torch.cat((student, teacher)).view(-1, D)
    wide = wide_dtype(memory)
    inverse = torch.empty((V + T) * N, device=memory.device, dtype=wide)
    inverse[: V * N] = 1 / student_temp
    inverse[V * N :] = 1 / teacher_temp
    readout, logsumexp = streaming.memory_readout(rows, memory, partition, block_size, inverse)
    blocks = memory.shape[0] // block_size
    return assemble(student, teacher, readout, logsumexp, student_temp, teacher_temp, blocks)


@_memory_cross_entropy.register_fake
def _(student: Tensor, teacher: Tensor, memory: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(memory)
    return memory.new_empty(4, dtype=wide), student.new_empty(student.shape, dtype=wide)
