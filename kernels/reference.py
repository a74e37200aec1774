"""The published computation, step by step: the oracle of the tests and the baseline of the benchmarks.

Source: Silva, Pedrini, Ramírez Rivera, Learning from Memory, ICML 2024, section 3: logits of every view against every entry, gathered
through the partition, a softmax within each block, cross-entropy of every pair of different views. It holds [(V+T)·N, K] logits several
times over. Gradients are autograd's own, so it differentiates as often as you like.

As under the published autocast, products stay in the dtype of the rows; softmax and sums are at least float32.
"""

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
