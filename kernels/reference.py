"""The published computations, step by step: the oracle of the tests and the baseline of the benchmarks.

MaSSL's source: Silva, Pedrini, Ramírez Rivera, Learning from Memory, ICML 2024, section 3: logits of every view against every entry,
gathered through the partition, a softmax within each block, cross-entropy of every pair of different views. It holds [(V+T)·N, K] logits
several times over. Gradients are autograd's own, so any number of derivatives can be taken.

As under the published autocast, products stay in the dtype of the rows; softmax and sums are at least float32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from massl_fast.kernels.loss import count_pairs


def memory_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    partition: Tensor,
    block_size: int,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, student entropy, teacher entropy and KL, in nats, each a mean over blocks; shapes as in the public function."""
    student_logits = _block_logits(student, memory, partition, block_size, student_temp)  # [V, N, B, block_size]
    teacher_logits = _block_logits(teacher, memory, partition, block_size, teacher_temp)  # [T, N, B, block_size]
    wide = _wide(student)
    targets = teacher_logits.softmax(-1, dtype=wide)
    target_entropy = -(targets * teacher_logits.log_softmax(-1, dtype=wide)).sum(-1).mean(dim=(1, 2))  # [T]

    loss = torch.zeros((), device=student.device, dtype=wide)
    paired_entropy = torch.zeros((), device=student.device, dtype=wide)
    for i, logits in enumerate(student_logits):
        for j, target in enumerate(targets):
            if i != j:
                loss = loss - (target * logits.log_softmax(-1, dtype=wide)).sum(-1).mean()
                paired_entropy = paired_entropy + target_entropy[j]
    pairs = count_pairs(student.shape[0], teacher.shape[0])
    loss = loss / pairs

    with torch.no_grad():
        log_prediction = student_logits.log_softmax(-1, dtype=wide)
        student_entropy = -(log_prediction.exp() * log_prediction).sum(-1).mean()
        kl = loss - paired_entropy / pairs
    return loss, student_entropy, target_entropy.mean(), kl


def memory_readout(
    rows: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    temperature: float | Tensor,
    *,
    values: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    per_block: bool = False,
) -> tuple[Tensor, Tensor]:
    """Σ_b softmax_b(rows · M_bᵀ / τ + α) V_b [R, Dv] and Σ_b logsumexp_b [R], or [R, B], at least float32, for rows [R, D].

    Without a partition blocks are made of the entries as they lie.
    """
    wide = _wide(rows)
    logits = _extended_logits(rows, memory, partition, block_size, temperature, key_bias, row_group, key_group)  # [R, B, block_size]
    entries = _blocks(memory if values is None else values, partition, block_size)  # [B, block_size, Dv]
    logsumexp = logits.to(wide).logsumexp(-1)
    probabilities = logits.softmax(-1, dtype=wide)
    if key_bias is not None or row_group is not None:
        probabilities = probabilities.masked_fill((logsumexp == -torch.inf)[:, :, None], 0.0)  # of rows that see nothing
    readout = torch.einsum("rbk,bkd->rd", probabilities.to(rows.dtype), entries).to(wide)
    return readout, logsumexp if per_block else logsumexp.sum(-1)


def memory_readback(
    rows: Tensor,
    memory: Tensor,
    logsumexp: Tensor,
    partition: Tensor | None,
    block_size: int,
    temperature: float | Tensor,
    *,
    row_values: Tensor | None = None,
    row_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
) -> Tensor:
    """Σ_r c_rb exp(x_r·m_k/τ + α_k − L_rb) y_r [K, Dv], or [K] without y, at least float32; 0 for entries of no block."""
    wide = _wide(rows)
    logits = _extended_logits(rows, memory, partition, block_size, temperature, key_bias, row_group, key_group)  # [R, B, block_size]
    shift = logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf)  # rows that see nothing give nothing
    weights = (logits - shift[:, :, None]).exp()
    if row_weight is not None:
        weights = weights * row_weight[:, :, None]
    if row_values is None:
        found = weights.sum(0).flatten()
    else:
        found = torch.einsum("rbk,rd->bkd", weights.to(rows.dtype), row_values.to(rows.dtype)).flatten(0, 1)
    result = found.new_zeros(memory.shape[:1] + found.shape[1:], dtype=wide)
    places = torch.arange(len(found), device=found.device) if partition is None else partition[: len(found)].long()
    return result.index_copy(0, places, found.to(wide))


def _extended_logits(
    rows: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    temp: float | Tensor,
    key_bias: Tensor | None,
    row_group: Tensor | None,
    key_group: Tensor | None,
) -> Tensor:
    """``_block_logits`` with biases, in their dtype, and -inf for entries of a row's own group."""
    logits = _block_logits(rows, memory, partition, block_size, temp)
    if key_bias is not None:
        logits = logits + _blocks(key_bias, partition, block_size)
    if row_group is not None:
        assert key_group is not None, "groups of rows and of keys come together"
        logits = logits.masked_fill(row_group[:, None, None] == _blocks(key_group, partition, block_size), -torch.inf)
    return logits


def _block_logits(rows: Tensor, memory: Tensor, partition: Tensor | None, block_size: int, temp: float | Tensor) -> Tensor:
    """Logits [..., B, block_size] of rows [..., D]; the remainder of the memory is left out of this step."""
    blocks = memory.shape[0] // block_size
    logits = rows @ memory.T
    kept = slice(blocks * block_size) if partition is None else partition[: blocks * block_size]
    return logits[..., kept].unflatten(-1, (blocks, block_size)) / temp


def _blocks(of_entries: Tensor, partition: Tensor | None, block_size: int) -> Tensor:
    """What belongs to the entries, [K, ...], as [B, block_size, ...]."""
    blocks = of_entries.shape[0] // block_size
    kept = slice(blocks * block_size) if partition is None else partition[: blocks * block_size]
    return of_entries[kept].unflatten(0, (blocks, block_size))


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def prototype_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    key_bias: Tensor | None,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    other_views: bool,
    row_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss and student entropy of DINO, iBOT, SwAV: all logits, targets by softmax, cross-entropy of each pair; shapes as in the public
    function. Source: the papers named there."""
    wide = _wide(student)
    logits = student @ prototypes.T / student_temp
    teacher_logits = teacher @ teacher_prototypes.T / teacher_temp
    if key_bias is not None:
        teacher_logits = teacher_logits + key_bias
    targets = teacher_logits.softmax(-1, dtype=wide)
    log_prediction = logits.log_softmax(-1, dtype=wide)
    entropies = -(log_prediction.exp() * log_prediction).sum(-1)
    if other_views:
        loss = torch.zeros((), device=student.device, dtype=wide)
        weight = torch.zeros_like(row_weight)
        for i in range(len(student)):
            for j in range(len(teacher)):
                if i != j:
                    loss = loss - (row_weight[i] * (targets[j] * log_prediction[i]).sum(-1)).sum()
                    weight[i] += row_weight[i]
    else:
        loss, weight = -(row_weight * (targets * log_prediction).sum(-1)).sum(), row_weight
    return loss, (weight * entropies).sum() / weight.sum().clamp_min(torch.finfo(wide).tiny)


def partition_consistency(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    partition: Tensor,
    block_size: int,
    clamp: float,
    sum_over_ranks: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """CARP's consistency and entropy: all logits, a softmax per block, products of each pair. Source: the paper named in the public
    function, and what its code does where they differ (the mean over all pairs, its clamp, detached teacher rows in the mean)."""
    wide = _wide(student)
    p = _block_logits(student, prototypes, partition, block_size, 1.0).softmax(-1, dtype=wide)  # [V, N, B, block_size]
    q = _block_logits(teacher, teacher_prototypes, partition, block_size, 1.0).softmax(-1, dtype=wide)
    consistency = torch.zeros((), device=student.device, dtype=wide)
    for i in range(len(p)):
        for j in range(len(q)):
            if i != j:
                consistency = consistency - (p[i] * q[j]).sum(-1).clamp(clamp, 1 - clamp).log().mean()
    sums = torch.cat((p, q)).sum((0, 1))  # [B, block_size]
    count = (len(p) + len(q)) * p.shape[1]
    mean = sums / count
    if sum_over_ranks is not None:
        counted = sum_over_ranks(torch.cat((sums.detach().flatten(), sums.new_full((1,), count))))
        mean = mean + ((counted[:-1] / counted[-1]).view_as(mean) - mean).detach()  # the value of all ranks, the gradient of this one
    entropy = math.log(block_size) + (mean * mean.clamp(clamp, 1 - clamp).log()).sum(-1).mean()
    return consistency / count_pairs(len(p), len(q)), entropy


def contrast(
    query: Tensor,
    key: Tensor,
    own: Tensor,
    temperature: float | Tensor,
    row_group: Tensor | None,
    key_group: Tensor | None,
    row_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """InfoNCE and each row's entropy for unit rows [R, D]: all logits, those of a row's own group but for its own key taken out."""
    logits = query @ key.T / temperature
    if row_group is not None:
        is_own = torch.arange(len(key), device=key.device) == own[:, None]
        logits = logits.masked_fill((row_group[:, None] == key_group) & ~is_own, -torch.inf)
    log_prediction = logits.log_softmax(-1, dtype=_wide(query))
    loss = -(row_weight * log_prediction.gather(1, own[:, None]).squeeze(1)).sum()
    return loss, -torch.special.xlogy(log_prediction.exp(), log_prediction.exp()).sum(-1)


def sinkhorn_bias(
    rows: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    iterations: int,
    sum_over_ranks: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The bias of Sinkhorn-Knopp's assignment, all logits held: keys and rows of exp(rows · Cᵀ / τ) normalised in turn."""
    logits = (rows @ prototypes.T).to(_wide(rows)) / temperature
    bias = logits.new_zeros(logits.shape[1])
    row_sums = logits.new_ones((logits.shape[0], 1)) / temperature  # of unit rows no logit is larger
    for _ in range(iterations):
        key_sums = (logits + bias - row_sums).exp().sum(0)
        if sum_over_ranks is not None:
            key_sums = sum_over_ranks(key_sums)
        bias = bias - key_sums.clamp_min(torch.finfo(key_sums.dtype).tiny).log()
        row_sums = (logits + bias).logsumexp(1, keepdim=True)
    return bias
