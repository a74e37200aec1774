"""Loss, gradient and telemetry from the memory read out at every row: what is left once the one large pass is done.

For a row x with temperature τ let R(x) = Σ_b softmax_b(x·M_bᵀ/τ) M_b and L(x) = Σ_b logsumexp_b(x·M_bᵀ/τ). Cross-entropy is linear in
its target and a target q enters through Σ_k q_k m_k alone, hence with J_i = {j ≠ i}, P = Σ_i |J_i| and C_i = Σ_{j∈J_i} R(w_j)

    loss      = 1/(P·N·B) · Σ_i,n |J_i|·L(z_i) − z_i·C_i/τ_s
    ∂loss/∂z_i = 1/(P·N·B·τ_s) · (|J_i|·R(z_i) − C_i)
    entropy of x, mean over blocks = (L(x) − x·R(x)/τ) / B
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def count_pairs(student_views: int, teacher_views: int) -> int:
    """P: pairs of a student and a teacher view that are not the same crop."""
    return student_views * teacher_views - min(student_views, teacher_views)


def sum_over_other_views(of_views: Tensor, views: int) -> Tensor:
    """For each view i of ``views`` the sum of ``of_views`` [T, ...] over j ≠ i: [views, ...]."""
    shared = min(views, of_views.shape[0])
    total = of_views.sum(0, keepdim=True).expand(views, *of_views.shape[1:]).clone()
    total[:shared] -= of_views[:shared]
    return total


def assemble(
    student: Tensor,
    teacher: Tensor,
    readout: Tensor,
    logsumexp: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    blocks: int,
) -> tuple[Tensor, Tensor]:
    """Statistics [4] (loss, student entropy, teacher entropy, KL; means over blocks, nats) and the gradient [V, N, D], both as wide as
    ``readout``.

    ``student`` [V, N, D]; ``teacher`` [T, N, D]; ``readout`` [(V+T)·N, D] and ``logsumexp`` [(V+T)·N] of the stacked rows in their dtype
    of accumulation.
    """
    V, N, D = student.shape
    T = teacher.shape[0]
    z, w = student.to(readout.dtype), teacher.to(readout.dtype)
    z_readout, w_readout = readout.view(V + T, N, D).split((V, T))
    z_logsumexp, w_logsumexp = logsumexp.view(V + T, N).split((V, T))
    shared = min(V, T)  # teacher view j is the same crop as student view j

    target = sum_over_other_views(w_readout, V)  # C_i
    targets_of_view = torch.full((V, 1), T, device=z.device, dtype=z.dtype)  # |J_i|
    targets_of_view[:shared] -= 1
    pairs_of_teacher = torch.full((T, 1), V, device=z.device, dtype=z.dtype)
    pairs_of_teacher[:shared] -= 1

    scale = 1 / (count_pairs(V, T) * N * blocks)
    loss = scale * (targets_of_view * z_logsumexp - (z * target).sum(-1) / student_temp).sum()
    gradient = (targets_of_view[..., None] * z_readout - target) * (scale / student_temp)
    student_entropy = (z_logsumexp - (z * z_readout).sum(-1) / student_temp).mean() / blocks
    teacher_entropies = w_logsumexp - (w * w_readout).sum(-1) / teacher_temp  # [T, N], summed over blocks
    kl = loss - scale * (pairs_of_teacher * teacher_entropies).sum()
    statistics = torch.stack((loss, student_entropy, teacher_entropies.mean() / blocks, kl))
    return statistics, gradient


class AttachGradient(torch.autograd.Function):
    """Hands autograd a loss and a gradient computed already; the gradient is wide, so that a loss scale multiplies it before rounding."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(ctx.dtype), None, None
