"""The two passes that every loss is made of, as their users meet them: what rows read out of the entries, and what the entries get back.

Both are custom operators on plain tensors, without autograd; each loss adds its own.
"""

from typing import Any

import torch
from torch import Tensor

from massl_fast.kernels import checks, reference, streaming
from massl_fast.kernels.backends import TRITON, autocast, choose_backend, partition_of, split_scalar, wide_dtype
from massl_fast.kernels.operators import operator


def memory_readout(
    rows: Tensor,
    memory: Tensor,
    *,
    values: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    block_size: int,
    temperature: float | Tensor,
    per_block: bool = False,
    partition: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The memory read out at each row: (readout [..., Dv], logsumexp [...] or [..., B]), float32 (float64 for float64).

    With logits ℓ_k = x·m_k/τ + α_k of a row x, readout = Σ_b softmax_b(ℓ) V_b and logsumexp = Σ_b logsumexp_b(ℓ), or one for each
    block. The results carry no gradient: ∂logsumexp/∂rows is the read-out of the memory itself, divided by τ.

    Arguments beyond those of ``memory_cross_entropy``:
        rows: [..., D] of the memory's dtype.
        values: [K, Dv] of the memory's dtype, what is read out; None: the memory itself.
        key_bias: α, float [K], taken in the dtype of the results. An entry of bias -inf is left out.
        row_group, key_group: integers [...] and [K]; a row does not see the entries of its own group. A row that sees no entry of a block
            gets the read-out 0 and the logsumexp -inf from it.
        per_block: logsumexp of each block instead of their sum.

    Raises ValueError with the argument's name for anything that does not fit.
    """
    rows, memory, values = autocast(rows, memory, values)
    checks.check_rows("rows", rows, memory)
    checks.check_blocks(memory, block_size)
    checks.check_values(values, memory)
    checks.check_key_bias(key_bias, memory)
    checks.check_groups(row_group, key_group, rows, memory)
    temperature = checks.check_temperature("temperature", temperature, memory)
    step = checks.check_partition(partition, step, memory)
    readout, logsumexp = read_out(
        rows.detach().reshape(-1, rows.shape[-1]), memory.detach(), block_size, temperature, values=_detached(values),
        key_bias=_detached(key_bias), row_group=_flat(row_group), key_group=key_group, per_block=per_block,
        partition=partition, seed=seed, step=step, backend=backend,
    )  # fmt: skip
    return readout.view(*rows.shape[:-1], readout.shape[1]), logsumexp.view(*rows.shape[:-1], *logsumexp.shape[1:])


def memory_readback(
    rows: Tensor,
    memory: Tensor,
    logsumexp: Tensor,
    *,
    row_values: Tensor | None = None,
    row_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    block_size: int,
    temperature: float | Tensor,
    partition: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    backend: str = "auto",
) -> Tensor:
    """What each entry gets back from the rows that read it: [K, Dv], or [K] without ``row_values``; float32 (float64 for float64).

    Σ_r c_rb p_r(k) y_r with p_r(k) = exp(x_r·m_k/τ + α_k − L_rb), the transpose of the read-out: with the L of ``memory_readout`` p is the
    row's softmax in the entry's block b. Entries that the partition leaves out get 0. There are no atomics, so results repeat bit for bit.

    Arguments beyond those of ``memory_readout``:
        logsumexp: L, float [..., B], or [...] where there is one block. A row of -inf sees nothing and gives nothing back.
        row_values: y, float [..., Dv]; None: 1.
        row_weight: c, float [...], or [..., B] for a weight per block; None: 1.

    Raises ValueError with the argument's name for anything that does not fit.
    """
    rows, memory = autocast(rows, memory)
    checks.check_rows("rows", rows, memory)
    checks.check_blocks(memory, block_size)
    checks.check_key_bias(key_bias, memory)
    checks.check_groups(row_group, key_group, rows, memory)
    blocks = memory.shape[0] // block_size
    checks.check_of_rows("logsumexp", logsumexp, rows, blocks)
    if blocks > 1 and logsumexp.ndim < rows.ndim:
        raise ValueError(
            f"logsumexp must hold one number for each row and block, {[*rows.shape[:-1], blocks]}; found shape {list(logsumexp.shape)}. "
            "memory_readout gives it with per_block=True."
        )
    if row_weight is not None:
        checks.check_of_rows("row_weight", row_weight, rows, blocks)
    if row_values is not None:
        checks.check_row_values(row_values, rows)
    temperature = checks.check_temperature("temperature", temperature, memory)
    step = checks.check_partition(partition, step, memory)
    return read_back(
        rows.detach().reshape(-1, rows.shape[-1]), memory.detach(), logsumexp.detach().reshape(-1, blocks), block_size, temperature,
        row_values=None if row_values is None else row_values.detach().reshape(-1, row_values.shape[-1]),
        row_weight=None if row_weight is None else row_weight.detach().reshape(-1, blocks if row_weight.ndim == rows.ndim else 1),
        key_bias=_detached(key_bias), row_group=_flat(row_group), key_group=key_group,
        partition=partition, seed=seed, step=step, backend=backend,
    )  # fmt: skip


def read_out(
    rows: Tensor,
    memory: Tensor,
    block_size: int,
    temperature: float | Tensor,
    *,
    values: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    per_block: bool = False,
    partition: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    stored_order: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``memory_readout`` of detached rows [R, D] and arguments already checked; ``stored_order``: blocks as the entries lie."""
    backend = choose_backend(backend, memory, "memory_readout")
    if key_bias is not None:
        key_bias = key_bias.to(wide_dtype(memory))
    if backend == "reference":
        partition = None if stored_order else partition_of(partition, memory, seed, step)
        return reference.memory_readout(
            rows, memory, partition, block_size, temperature,
            values=values, key_bias=key_bias, row_group=row_group, key_group=key_group, per_block=per_block,
        )  # fmt: skip
    return torch.ops.massl_fast.memory_readout(
        rows, memory, partition, block_size, *split_scalar(temperature), seed, *split_scalar(step), backend,
        values, key_bias, row_group, key_group, per_block, stored_order,
    )  # fmt: skip


def read_back(
    rows: Tensor,
    memory: Tensor,
    logsumexp: Tensor,
    block_size: int,
    temperature: float | Tensor,
    *,
    row_values: Tensor | None = None,
    row_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    partition: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    stored_order: bool = False,
    backend: str,
) -> Tensor:
    """``memory_readback`` of detached rows [R, D], logsumexp [R, B], row_weight [R, 1] or [R, B], and arguments already checked."""
    backend = choose_backend(backend, memory, "memory_readback")
    wide = wide_dtype(memory)
    logsumexp = logsumexp.to(wide)
    if key_bias is not None:
        key_bias = key_bias.to(wide)
    if row_weight is not None:
        row_weight = row_weight.to(wide)
    if backend == "reference":
        partition = None if stored_order else partition_of(partition, memory, seed, step)
        return reference.memory_readback(
            rows, memory, logsumexp, partition, block_size, temperature,
            row_values=row_values, row_weight=row_weight, key_bias=key_bias, row_group=row_group, key_group=key_group,
        )  # fmt: skip
    return torch.ops.massl_fast.memory_readback(
        rows, memory, logsumexp, partition, block_size, *split_scalar(temperature), seed, *split_scalar(step), backend,
        row_values, row_weight, key_bias, row_group, key_group, stored_order,
    )  # fmt: skip


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)


@operator("massl_fast::memory_readout")
def _memory_readout(
    rows: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    temperature: float,
    temperature_tensor: Tensor | None,
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    backend: str,
    values: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    per_block: bool = False,
    stored_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Read-out [R, Dv] and logsumexp [R] or [R, B] of rows [R, D]."""
    temperature = temperature if temperature_tensor is None else temperature_tensor
    order = None if stored_order else partition_of(partition, memory, seed, step if step_tensor is None else step_tensor)
    extensions = dict(values=values, key_bias=key_bias, row_group=row_group, key_group=key_group, per_block=per_block)
    if backend == "triton":
        return TRITON["memory_readout"](rows, memory, order, block_size, temperature, **extensions)
    return streaming.memory_readout(rows, memory, order, block_size, inverse_of_rows(temperature, rows), **extensions)


@_memory_readout.register_fake
def _(
    rows: Tensor, memory: Tensor, partition: Tensor | None, block_size: int, temperature: float, temperature_tensor: Tensor | None,
    seed: int, step: int, step_tensor: Tensor | None, backend: str, values: Tensor | None = None, key_bias: Tensor | None = None,
    row_group: Tensor | None = None, key_group: Tensor | None = None, per_block: bool = False, stored_order: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide, count = wide_dtype(memory), rows.shape[0]
    width = memory.shape[1] if values is None else values.shape[1]
    sums = (count, memory.shape[0] // block_size) if per_block else (count,)
    return rows.new_empty((count, width), dtype=wide), rows.new_empty(sums, dtype=wide)


@operator("massl_fast::memory_readback")
def _memory_readback(
    rows: Tensor,
    memory: Tensor,
    logsumexp: Tensor,
    partition: Tensor | None,
    block_size: int,
    temperature: float,
    temperature_tensor: Tensor | None,
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    backend: str,
    row_values: Tensor | None,
    row_weight: Tensor | None,
    key_bias: Tensor | None,
    row_group: Tensor | None,
    key_group: Tensor | None,
    stored_order: bool,
) -> Tensor:
    """What the entries get back [K, Dv] or [K] from rows [R, D] with logsumexp [R, B]."""
    temperature = temperature if temperature_tensor is None else temperature_tensor
    order = None if stored_order else partition_of(partition, memory, seed, step if step_tensor is None else step_tensor)
    extensions = dict(row_values=row_values, row_weight=row_weight, key_bias=key_bias, row_group=row_group, key_group=key_group)
    if backend == "triton":
        return TRITON["memory_readback"](rows, memory, logsumexp, order, block_size, temperature, **extensions)
    return streaming.memory_readback(rows, memory, logsumexp, order, block_size, inverse_of_rows(temperature, rows), **extensions)


@_memory_readback.register_fake
def _(
    rows: Tensor, memory: Tensor, logsumexp: Tensor, partition: Tensor | None, block_size: int, temperature: float,
    temperature_tensor: Tensor | None, seed: int, step: int, step_tensor: Tensor | None, backend: str, row_values: Tensor | None, *_: Any,
) -> Tensor:  # fmt: skip
    entries = memory.shape[0]
    shape = (entries,) if row_values is None else (entries, row_values.shape[1])
    return memory.new_empty(shape, dtype=wide_dtype(memory))


def inverse_of_rows(temperature: float | Tensor, rows: Tensor) -> Tensor:
    """1/τ of each row."""
    inverse = torch.empty(rows.shape[0], device=rows.device, dtype=wide_dtype(rows))
    inverse[:] = 1 / temperature
    return inverse
