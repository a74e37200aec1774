"""Cross-entropy of rows seen as distributions over learned prototypes: DINO, iBOT, SwAV, DINOv2.

Letters as in kernels/loss.py, with prototypes C [K, D] in place of the memory, other ones C′ for the teacher, and a bias α on the teacher's
logits (a centre, or Sinkhorn-Knopp's). A teacher row w enters through T(w) = Σ_k q_k c_k alone, where q = softmax(w·C′ᵀ/τ_t + α). With
C_i = Σ_{j∈J_i} T(w_j), S_j = Σ_{i≠j} ω_i z_i and weights ω of the student rows (1/(P·N) where none are given)

    loss       = Σ_i,n ω_i · (|J_i|·L(z_i) − z_i·C_i/τ_s)
    ∂loss/∂z_i = ω_i/τ_s · (|J_i|·R(z_i) − C_i)
    ∂loss/∂C   = 1/τ_s · (readback(z, C; y = ω|J| z) − readback(w, C′, α; y = S))

The row gradient is a by-product of forward. The read-backs run in backward, and not at all where the prototypes are frozen.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from massl_fast.kernels import checks, reference, streaming
from massl_fast.kernels.backends import TRITON, autocast, choose_backend, split_scalar, wide_dtype
from massl_fast.kernels.loss import count_pairs, sum_over_other_views
from massl_fast.kernels.operators import operator
from massl_fast.kernels.readout import inverse_of_rows, read_out

PAIRS = ("other views", "same row")


class PrototypeCrossEntropy(NamedTuple):
    """What ``prototype_cross_entropy`` returns: 0-d tensors, float32 (float64 for float64 inputs), in nats."""

    loss: Tensor
    """Cross-entropy, differentiable in the student and in the prototypes."""
    student_entropy: Tensor
    """Entropy of the student's distributions, a mean over rows in proportion to their weight in the loss."""


def prototype_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    key_bias: Tensor | None = None,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    pairs: str = "other views",
    row_weight: Tensor | None = None,
    backend: str = "auto",
) -> PrototypeCrossEntropy:
    """Cross-entropy of student rows against teacher rows, both seen as distributions over prototypes.

    Sources: DINO (ICCV 2021), equations 2 and 3 and section 3.1's centring; iBOT (ICLR 2022), equations 2 and 3; SwAV (NeurIPS 2020),
    equation 2 with ``sinkhorn_bias``. Nothing of size rows × K exists on any backend but the reference.

    Arguments:
        student: rows [V, N, D], or [..., D] for pairs of the same row; float32, bfloat16, float16 (float64 for the reference and
            streaming backends). Rows need not be of unit length.
        teacher: rows [T, N, D], or as many as the student's; the same dtype; receives no gradient.
        prototypes: C [K, D] of the same dtype. Where they require a gradient they get one, float32 until it is cast to their dtype.
        teacher_prototypes: C′ [K, D], usually another matrix (a moving average); receives no gradient.
        key_bias: α, float [K], added to the teacher's logits: -centre/τ_t for DINO and iBOT, ``sinkhorn_bias`` for SwAV and DINOv2.
        student_temp, teacher_temp: positive numbers, or float tensors of one element on the device, which the host never reads.
        pairs: "other views" compares every student view i with every teacher view j ≠ i, where teacher view j is the same crop as student
            view j. "same row" compares row r with row r (masked patches).
        row_weight: ω, float, of each student row: the weight of each of its pairs. None: the mean over pairs and images, or over rows. A
            row of weight 0 takes no part, so that rows can be padded to a bound.
        backend: as in ``memory_cross_entropy``.

    Under autocast all rows and prototypes are cast to its dtype. Raises ValueError with the argument's name for anything that does not fit.
    """
    tensors = autocast(student, teacher, prototypes, teacher_prototypes)
    x, w, keys, teacher_keys = (t.detach() for t in tensors)
    if pairs not in PAIRS:
        raise ValueError(f'pairs must be "other views" or "same row"; found {pairs!r}.')
    checks.check_prototypes(x, w, keys, teacher_keys)
    if pairs == "other views":
        checks.check_views(x, w, keys, "prototypes")
    elif x.shape != w.shape:
        raise ValueError(
            f'student and teacher must have one shape for pairs="same row"; found {list(student.shape)} and {list(teacher.shape)}.'
        )
    checks.check_key_bias(key_bias, keys)
    if row_weight is not None:
        checks.check_row_weight(row_weight, x)
    student_temp = checks.check_temperature("student_temp", student_temp, keys)
    teacher_temp = checks.check_temperature("teacher_temp", teacher_temp, keys)
    wide, entries = wide_dtype(keys), keys.shape[0]
    if row_weight is None:
        count = count_pairs(x.shape[0], w.shape[0]) * x.shape[1] if pairs == "other views" else max(1, x.shape[:-1].numel())
        row_weight = x.new_full(x.shape[:-1], 1 / count, dtype=wide)
    row_weight = row_weight.detach().to(wide)
    if key_bias is not None:
        key_bias = key_bias.detach().to(wide)

    if backend == "reference":
        student, _, prototypes, _ = tensors
        loss, entropy = reference.prototype_cross_entropy(
            student, w, prototypes, teacher_keys, key_bias, student_temp, teacher_temp, pairs == "other views", row_weight
        )
        return PrototypeCrossEntropy(loss, entropy.detach())

    # of the read-back: chosen now, so that an error comes in forward rather than in backward
    back = choose_backend(backend, keys, "memory_readback") if prototypes.requires_grad else "streaming"
    backend = choose_backend(backend, keys, "memory_readout")
    readout, logsumexp = read_out(x.reshape(-1, x.shape[-1]), keys, entries, student_temp, stored_order=True, backend=backend)
    target, teacher_logsumexp = read_out(
        w.reshape(-1, w.shape[-1]), teacher_keys, entries, teacher_temp,
        values=keys, key_bias=key_bias, stored_order=True, backend=backend,
    )  # fmt: skip
    readout, target = readout.view(x.shape), target.view(w.shape)
    logsumexp, teacher_logsumexp = logsumexp.view(x.shape[:-1]), teacher_logsumexp.view(w.shape[:-1])
    z = x.to(wide)
    weighted = z * row_weight[..., None]
    weight = row_weight  # ω|J|
    if pairs == "other views":
        V, T = x.shape[0], w.shape[0]
        targets = torch.full((V, 1), T, device=x.device, dtype=wide)  # |J_i|
        targets[: min(V, T)] -= 1
        weight = row_weight * targets
        target = sum_over_other_views(target, V)  # C_i
        weighted = sum_over_other_views(weighted, T)  # S_j
    gradient = (weight[..., None] * readout - row_weight[..., None] * target) / student_temp
    loss = (weight * logsumexp).sum() - (row_weight * (z * target).sum(-1)).sum() / student_temp
    entropies = logsumexp - (z * readout).sum(-1) / student_temp
    entropy = (weight * entropies).sum() / weight.sum().clamp_min(torch.finfo(wide).tiny)
    loss = _Attach.apply(
        student, prototypes, loss, gradient, x, weight, logsumexp, w, weighted, teacher_logsumexp, keys, teacher_keys, key_bias,
        *split_scalar(student_temp), *split_scalar(teacher_temp), back,
    )  # fmt: skip
    return PrototypeCrossEntropy(loss, entropy)


class _Attach(torch.autograd.Function):
    """Hands autograd a loss and a row gradient that are computed already; the prototypes' gradient is computed in backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, prototypes: Tensor, loss: Tensor, gradient: Tensor, *rest: Any) -> Tensor:
        *tensors, student_temp, student_temp_tensor, teacher_temp, teacher_temp_tensor, backend = rest
        ctx.save_for_backward(gradient, *tensors, student_temp_tensor, teacher_temp_tensor)
        ctx.plain = student_temp, teacher_temp, backend
        ctx.dtypes = student.dtype, prototypes.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *tensors, student_temp_tensor, teacher_temp_tensor = ctx.saved_tensors
        student_temp, teacher_temp, backend = ctx.plain
        of_student = of_prototypes = None
        if ctx.needs_input_grad[0]:
            of_student = (gradient * upstream).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_prototypes = torch.ops.massl_fast.prototype_gradient(
                upstream, *tensors, student_temp, student_temp_tensor, teacher_temp, teacher_temp_tensor, backend
            ).to(ctx.dtypes[1])
        return of_student, of_prototypes, *[None] * 16


@operator("massl_fast::prototype_gradient")
def _prototype_gradient(
    upstream: Tensor,
    student: Tensor,
    weight: Tensor,
    logsumexp: Tensor,
    teacher: Tensor,
    weighted: Tensor,
    teacher_logsumexp: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    key_bias: Tensor | None,
    student_temp: float,
    student_temp_tensor: Tensor | None,
    teacher_temp: float,
    teacher_temp_tensor: Tensor | None,
    backend: str,
) -> Tensor:
    """upstream/τ_s · (readback(z, C; y = ω|J| z) − readback(w, C′, α; y = S)): [K, D], float32 (float64 for float64).

    ``student`` z [..., D] with ``weight`` ω|J| [...]; ``teacher`` w [..., D] with ``weighted`` S of its shape.
    """
    student_temp = student_temp if student_temp_tensor is None else student_temp_tensor
    teacher_temp = teacher_temp if teacher_temp_tensor is None else teacher_temp_tensor
    x, w = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    scale = upstream / student_temp
    entries = prototypes.shape[0]
    of_student = dict(row_values=x, row_weight=(weight * scale).reshape(-1, 1))
    of_teacher = dict(row_values=weighted.reshape(w.shape), row_weight=(-scale).expand(w.shape[0], 1), key_bias=key_bias)
    logsumexp, teacher_logsumexp = logsumexp.reshape(-1, 1), teacher_logsumexp.reshape(-1, 1)
    if backend == "triton":
        read_back = TRITON["memory_readback"]
        found = read_back(x, prototypes, logsumexp, None, entries, student_temp, **of_student)
        return found.add_(read_back(w, teacher_prototypes, teacher_logsumexp, None, entries, teacher_temp, **of_teacher))
    inverse, teacher_inverse = inverse_of_rows(student_temp, x), inverse_of_rows(teacher_temp, w)
    found = streaming.memory_readback(x, prototypes, logsumexp, None, entries, inverse, **of_student)
    return streaming.memory_readback(w, teacher_prototypes, teacher_logsumexp, None, entries, teacher_inverse, **of_teacher, add_to=found)


@_prototype_gradient.register_fake
def _(
    upstream: Tensor, student: Tensor, weight: Tensor, logsumexp: Tensor, teacher: Tensor, weighted: Tensor, teacher_logsumexp: Tensor,
    prototypes: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    return prototypes.new_empty(prototypes.shape, dtype=wide_dtype(prototypes))
