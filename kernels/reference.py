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


def memory_readout(rows: Tensor, memory: Tensor, partition: Tensor, block_size: int, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Σ_b softmax_b(rows · M_bᵀ / τ) M_b [R, D] and Σ_b logsumexp_b [R], at least float32, for rows [R, D]."""
    wide = _wide(rows)
    logits = _block_logits(rows, memory, partition, block_size, temperature)  # [R, B, block_size]
    blocks = logits.shape[1]
    entries = memory[partition[: blocks * block_size]].unflatten(0, (blocks, block_size))  # [B, block_size, D]
    probabilities = logits.softmax(-1, dtype=wide).to(rows.dtype)
    readout = torch.einsum("rbk,bkd->rd", probabilities, entries).to(wide)
    return readout, logits.to(wide).logsumexp(-1).sum(-1)


def _block_logits(rows: Tensor, memory: Tensor, partition: Tensor, block_size: int, temp: float | Tensor) -> Tensor:
    """Logits [..., B, block_size] of rows [..., D]; the remainder of the memory is left out of this step."""
    blocks = memory.shape[0] // block_size
    logits = rows @ memory.T
    return logits[..., partition[: blocks * block_size]].unflatten(-1, (blocks, block_size)) / temp


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32
