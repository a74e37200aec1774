"""Consistency of partitions: CARP's loss, where prototypes fall into random blocks and each block is a softmax of its own.

With blocks b, s_i = softmax_b(z_i·Cᵀ), t_j = softmax_b(w_j·C′ᵀ), pairs P of views i ≠ j, and p̄ the mean of all s and t over views, images
and ranks

    consistency = mean over pairs, images and blocks of −log clamp(⟨s_i,t_j⟩, ε, 1−ε)
    entropy     = log K_b + 1/B Σ_k p̄_k log clamp(p̄_k, ε, 1−ε)
    loss        = consistency + entropy

The clamps act on each (pair, image, block), so sums over blocks do not suffice, and no pivot but the true maximum is safe, for embeddings
are not of unit length. A block is small, so a tile of logits that holds whole blocks and all views of some images has every number at once:
pass one leaves the consistency and p̄; ranks add up p̄, one all-reduce of [K]; pass two, in backward, has the same tiles again, and with
u_k = log clamp(p̄_k) + [ε ≤ p̄_k ≤ 1−ε]

    g_ik = u_k/(B(V+T)N) − 1/(|P|NB) Σ_j [ε ≤ ⟨s_i,t_j⟩ ≤ 1−ε] t_jk/⟨s_i,t_j⟩
    G_i  = s_i ⊙ (g_i − ⟨s_i,g_i⟩),   ∂loss/∂z_i = Σ_k G_ik c_k,   ∂loss/∂c_k = Σ_i G_ik z_i

This takes 4V + 2T products of one view's rows with all keys, where keeping the logits takes 3V + T. Teacher rows count in p̄, and no
gradient reaches C through them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from massl_fast.kernels import checks, reference
from massl_fast.kernels.backends import TRITON, autocast, choose_backend, partition_of, split_scalar, wide_dtype
from massl_fast.kernels.loss import count_pairs
from massl_fast.kernels.operators import operator
from massl_fast.kernels.streaming import CPU_TILE, GPU_TILE


class PartitionConsistency(NamedTuple):
    """What ``partition_consistency`` returns: 0-d tensors, float32 (float64 for float64 inputs), in nats."""

    loss: Tensor
    """Consistency + entropy, differentiable in the student and in the prototypes."""
    consistency: Tensor
    """Mean of −log⟨s,t⟩ over pairs, images of this rank and blocks."""
    entropy: Tensor
    """log K_b less the entropy of the mean distribution over views, images and ranks, mean over blocks; 0 where all keys are used alike."""


def partition_consistency(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    block_size: int,
    partition: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    clamp: float = 2**-23,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> PartitionConsistency:
    """CARP's loss. Consistent Assignment of Views over Random Partitions (NeurIPS 2023), section 3, as its published code computes it.

    Arguments:
        student: rows [V, N, D], of any length; float64, or float32, bfloat16 and float16, whose logits and probabilities are float32
            (Triton rounds the tile of gradients).
        teacher: rows [T, N, D] of the same dtype; teacher view j is the same crop as student view j; receives no gradient.
        prototypes: C [K, D] of the same dtype; they get a gradient where they require one.
        teacher_prototypes: C′ [K, D], usually another matrix (a moving average); receives no gradient.
        block_size: prototypes of a block, K_b; a remainder of the partition is left out.
        partition, seed, step, backend: as in ``memory_cross_entropy``.
        clamp: ε, 0 < ε < 1/2. The published code takes 2⁻²³, the machine epsilon of float32, in which it evaluates the loss.
        sum_over_ranks: a function that returns the sum over ranks of a tensor [K + 1] (a new tensor, or the same one changed); None: there
            is one rank. The gradient is that of this rank's rows; the mean of these gradients over ranks is the gradient of the mean
            consistency + the entropy of the global mean.

    Under autocast all rows and prototypes are cast to its dtype: rows in bfloat16 err by 2e-1 in −log⟨s,t⟩ at a length of 320. Raises
    ValueError with the argument's name for anything that does not fit.
    """
    tensors = autocast(student, teacher, prototypes, teacher_prototypes)
    z, w, keys, teacher_keys = (t.detach() for t in tensors)
    checks.check_prototypes(z, w, keys, teacher_keys)
    checks.check_views(z, w, keys, "prototypes")
    checks.check_blocks(keys, block_size, "prototypes")
    if isinstance(clamp, bool) or not isinstance(clamp, (int, float)) or not 0 < clamp < 0.5:
        raise ValueError(f"clamp must be a number between 0 and 1/2; found {clamp!r}.")
    step = checks.check_partition(partition, step, keys)
    if backend == "reference":
        partition = partition_of(partition, keys, seed, step)
        z, _, keys, _ = tensors
        consistency, entropy = reference.partition_consistency(z, w, keys, teacher_keys, partition, block_size, clamp, sum_over_ranks)
        return PartitionConsistency(consistency + entropy, consistency.detach(), entropy.detach())
    backend = choose_backend(backend, keys, "partition_consistency")
    (V, N, _), T = z.shape, w.shape[0]
    blocks = keys.shape[0] // block_size
    order = (partition, seed, *split_scalar(step))
    consistency, sums = torch.ops.massl_fast.partition_consistency(z, w, keys, teacher_keys, block_size, clamp, *order, backend)
    counted = torch.cat((sums, sums.new_full((1,), (V + T) * N)))  # the count travels with the sums
    if sum_over_ranks is not None:
        counted = sum_over_ranks(counted)
    mean = counted[:-1] / counted[-1]  # p̄ [K], 0 outside the partition
    logarithm = mean.clamp(clamp, 1 - clamp).log()
    entropy = math.log(block_size) + (mean * logarithm).sum() / blocks
    slope = logarithm + ((mean >= clamp) & (mean <= 1 - clamp)).to(mean.dtype)  # u
    loss = _Attach.apply(student, prototypes, consistency + entropy, slope, z, w, keys, teacher_keys, block_size, clamp, *order, backend)
    return PartitionConsistency(loss, consistency, entropy)


class _Attach(torch.autograd.Function):
    """Hands autograd a loss that is computed already; both gradients come from pass two, in backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, prototypes: Tensor, loss: Tensor, *rest: Any) -> Tensor:
        slope, z, w, keys, teacher_keys, block_size, clamp, partition, seed, step, step_tensor, backend = rest
        ctx.save_for_backward(slope, z, w, keys, teacher_keys, partition, step_tensor)
        ctx.plain = block_size, clamp, seed, step, backend
        ctx.dtypes = student.dtype, prototypes.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        slope, z, w, keys, teacher_keys, partition, step_tensor = ctx.saved_tensors
        block_size, clamp, seed, step, backend = ctx.plain
        of_student, of_prototypes = torch.ops.massl_fast.partition_consistency_gradient(
            upstream, slope, z, w, keys, teacher_keys, block_size, clamp, partition, seed, step, step_tensor, backend,
            ctx.needs_input_grad[1],
        )  # fmt: skip
        return (
            of_student.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None,
            of_prototypes.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None,
            *[None] * 13,
        )


@operator("massl_fast::partition_consistency")
@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _partition_consistency(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    block_size: int,
    clamp: float,
    partition: Tensor | None,
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Pass one: the consistency, and the sums [K] of all probabilities; float32 (float64 for float64)."""
    (V, N, _), T = student.shape, teacher.shape[0]
    order = partition_of(partition, prototypes, seed, step if step_tensor is None else step_tensor)
    wide = wide_dtype(prototypes)
    sums = prototypes.new_zeros(prototypes.shape[0], dtype=wide)
    total = prototypes.new_zeros((), dtype=wide)
    different = _different_views(V, T, student.device)
    if backend == "triton":
        products, sums = TRITON["partition_consistency"](student, teacher, prototypes, teacher_prototypes, order, block_size)
        total = -products.clamp_(clamp, 1 - clamp).log_().masked_fill_(~different, 0).sum()
        return total / (count_pairs(V, T) * N * (prototypes.shape[0] // block_size)), sums
    for tile in _tiles(student, teacher, prototypes, teacher_prototypes, order, block_size):
        s, t = tile.probabilities()
        products = torch.matmul(s, t.mT)  # [b, n, V, T]
        total -= products.clamp_(clamp, 1 - clamp).log_().masked_fill_(~different, 0).sum()
        sums.index_add_(0, tile.entries, (s.sum((1, 2)) + t.sum((1, 2))).flatten())
    return total / (count_pairs(V, T) * N * (prototypes.shape[0] // block_size)), sums


@_partition_consistency.register_fake
def _(student: Tensor, teacher: Tensor, prototypes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(prototypes)
    return prototypes.new_empty((), dtype=wide), prototypes.new_empty(prototypes.shape[0], dtype=wide)


@operator("massl_fast::partition_consistency_gradient")
@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _partition_consistency_gradient(
    upstream: Tensor,
    slope: Tensor,
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    block_size: int,
    clamp: float,
    partition: Tensor | None,
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    backend: str,
    learned: bool,
) -> tuple[Tensor, Tensor]:
    """Pass two: gradients of student [V, N, D] and, where ``learned``, of prototypes [K, D] (else [0, D]), in the dtype of pass one."""
    (V, N, D), T = student.shape, teacher.shape[0]
    order = partition_of(partition, prototypes, seed, step if step_tensor is None else step_tensor)
    wide = wide_dtype(prototypes)
    blocks = prototypes.shape[0] // block_size
    of_student = student.new_zeros((N, V, D), dtype=wide)
    of_prototypes = prototypes.new_zeros((prototypes.shape[0] if learned else 0, D), dtype=wide)
    different = _different_views(V, T, student.device)
    slope = slope * (upstream / (blocks * (V + T) * N))
    scale = upstream / (count_pairs(V, T) * N * blocks)
    if backend == "triton":
        return TRITON["partition_consistency_gradient"](
            student, teacher, prototypes, teacher_prototypes, order, block_size, slope, scale, clamp, different, learned
        )
    for tile in _tiles(student, teacher, prototypes, teacher_prototypes, order, block_size):
        s, t = tile.probabilities()
        products = torch.matmul(s, t.mT)
        inside = (products >= clamp) & (products <= 1 - clamp) & different
        g = torch.matmul(torch.where(inside, -scale / products, 0), t)  # [b, n, V, block_size]
        g += slope[tile.entries].view(-1, 1, 1, block_size)
        g = torch.ops.aten._softmax_backward_data(g, s, -1, s.dtype).flatten(1, 2)  # G [b, n·V, block_size]
        of_student[tile.images] += torch.matmul(g, tile.keys).sum(0).view(-1, V, D)
        if learned:
            of_prototypes.index_add_(0, tile.entries, torch.matmul(g.mT, tile.student).flatten(0, 1))
    return of_student.transpose(0, 1).contiguous(), of_prototypes


@_partition_consistency_gradient.register_fake
def _(
    upstream: Tensor, slope: Tensor, student: Tensor, teacher: Tensor, prototypes: Tensor, teacher_prototypes: Tensor,
    block_size: int, clamp: float, partition: Tensor | None, seed: int, step: int, step_tensor: Tensor | None, backend: str, learned: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = wide_dtype(prototypes)
    count = prototypes.shape[0] if learned else 0
    return student.new_empty(student.shape, dtype=wide), prototypes.new_empty((count, student.shape[2]), dtype=wide)


class _Tile(NamedTuple):
    """Whole blocks and all views of some images, in the dtype of the results."""

    student: Tensor  # [n·V, D], image by image
    teacher: Tensor  # [n·T, D]
    keys: Tensor  # [b, block_size, D]
    teacher_keys: Tensor
    entries: Tensor  # int64 [b·block_size]
    images: slice

    def probabilities(self) -> tuple[Tensor, Tensor]:
        """Probabilities of student and teacher, [b, n, V, block_size] and [b, n, T, block_size]."""
        n = self.images.stop - self.images.start
        s = torch.matmul(self.student, self.keys.mT).softmax(-1)
        t = torch.matmul(self.teacher, self.teacher_keys.mT).softmax(-1)
        return s.unflatten(1, (n, -1)), t.unflatten(1, (n, -1))


def _tiles(
    student: Tensor, teacher: Tensor, prototypes: Tensor, teacher_prototypes: Tensor, partition: Tensor, block_size: int
) -> Iterator[_Tile]:
    wide = wide_dtype(prototypes)
    (V, N, D), T = student.shape, teacher.shape[0]
    z, w = (views.to(wide).transpose(0, 1).contiguous() for views in (student, teacher))  # [N, V, D], [N, T, D]
    _, most = CPU_TILE if student.device.type == "cpu" else GPU_TILE
    most_images = max(1, min(N, most // ((V + T) * block_size)))
    most_blocks = max(1, most // ((V + T) * block_size * most_images))
    blocks = prototypes.shape[0] // block_size
    for first in range(0, blocks, most_blocks):
        entries = partition[first * block_size : min(first + most_blocks, blocks) * block_size].long()
        keys, teacher_keys = (c.index_select(0, entries).to(wide).view(-1, block_size, D) for c in (prototypes, teacher_prototypes))
        for start in range(0, N, most_images):
            images = slice(start, min(start + most_images, N))
            yield _Tile(z[images].flatten(0, 1), w[images].flatten(0, 1), keys, teacher_keys, entries, images)


def _different_views(V: int, T: int, device: torch.device) -> Tensor:
    """Which pairs (i, j) are counted: bool [V, T]."""
    return torch.arange(V, device=device)[:, None] != torch.arange(T, device=device)
