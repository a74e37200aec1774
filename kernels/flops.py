"""Operations of this package's operators, registered with PyTorch's ``FlopCounterMode``, which sees an operator as one.

The counts come from shapes alone. They hold the products of matrices, also those that a second pass repeats; a multiplication and an
addition count as two operations. Entries that no block takes count for nothing.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from massl_fast.kernels import consistency, cross_entropy, prototypes, readout  # noqa: F401  define the operators

Shape = tuple[int, ...]
_operators = torch.ops.massl_fast


def _products(rows: int, memory: Shape, block_size: int, *widths: int) -> int:
    """Operations of so many rows with the entries in blocks, one product per width."""
    return 2 * rows * (memory[0] // block_size * block_size) * sum(widths)


@register_flop_formula(_operators.memory_cross_entropy)
def _memory_cross_entropy(student: Shape, teacher: Shape, memory: Shape, partition: Any, block_size: int, *_: Any, **__: Any) -> int:
    return _products(prod(student[:-1]) + prod(teacher[:-1]), memory, block_size, memory[1], memory[1])


@register_flop_formula(_operators.memory_readout)
def _memory_readout(rows: Shape, memory: Shape, partition: Any, block_size: int, *others: Any, **_: Any) -> int:
    values = others[6] if len(others) > 6 else None
    return _products(rows[0], memory, block_size, memory[1], (values or memory)[1])


@register_flop_formula(_operators.memory_readback)
def _memory_readback(rows: Shape, memory: Shape, logsumexp: Shape, partition: Any, block_size: int, *others: Any, **_: Any) -> int:
    row_values = others[6]
    return _products(rows[0], memory, block_size, memory[1], row_values[1] if row_values else 0)


@register_flop_formula(_operators.prototype_gradient)
def _prototype_gradient(upstream: Shape, student: Shape, weight: Shape, logsumexp: Shape, teacher: Shape, *others: Any, **_: Any) -> int:
    return sum(_products(prod(rows[:-1]), keys, keys[0], keys[1], keys[1]) for rows, keys in ((student, others[2]), (teacher, others[3])))


@register_flop_formula(_operators.partition_consistency)
def _partition_consistency(
    student: Shape, teacher: Shape, keys: Shape, teacher_keys: Shape, block_size: int, *others: Any, **_: Any
) -> int:
    logits, pairs, _ = _of_partitions(student, teacher, keys, block_size)
    return logits + pairs + (logits if others[-1] == "triton" else 0)  # Triton reads its sums back


@register_flop_formula(_operators.partition_consistency_gradient)
def _partition_consistency_gradient(
    upstream: Shape, slope: Shape, student: Shape, teacher: Shape, keys: Shape, teacher_keys: Shape, block_size: int, *others: Any, **_: Any
) -> int:
    logits, pairs, gradient = _of_partitions(student, teacher, keys, block_size)
    backend, learned = others[-2:]
    if backend == "triton":  # its tiles come once more where rows stay, and once more where entries stay
        return logits + pairs + (1 + learned) * (logits + pairs + gradient)
    return logits + 2 * pairs + (1 + learned) * gradient


def _of_partitions(student: Shape, teacher: Shape, keys: Shape, block_size: int) -> tuple[int, int, int]:
    """Operations of all logits, of all pairs of views, and of gradients with keys or rows."""
    (views, images, width), teacher_views = student, teacher[0]
    logits = _products((views + teacher_views) * images, keys, block_size, width)
    return logits, _products(views * images, keys, block_size, teacher_views), _products(views * images, keys, block_size, width)
