"""Both passes in O(tile) memory with plain PyTorch: the path of CPUs, of GPUs older than compute capability 8.0, and of float64.

Read-out: all rows, student and teacher together, pass over the memory once. A tile of entries is gathered, multiplied with the rows,
exponentiated against a running row maximum, and multiplied again as values: one load serves both products. Read-back: the same tile stays
while the rows pass, and is written once. Nothing of size rows × K exists, no operation synchronises, and any temperature or row norm is
safe because the maximum is the true one. On a CPU PyTorch's flash attention does the same in fewer passes (kernels/flash.py).

Half-precision tiles are widened to float32 on the CPU; on a GPU both products use the tensor cores and return float32.
"""

import math
from typing import Any

import torch
from torch import Tensor

from massl_fast.kernels import flash
from massl_fast.kernels.tiles import gather, tiles

# Rows × entries of one tile of logits. CPU: 2 MB of float32 stay in the cache between the two products, and so do 512 entries. GPU: 64 MB,
# few launches.
CPU_TILE = (1024, 2**19)
GPU_TILE = (8192, 2**24)
CPU_ENTRIES = 512
# float16 cannot hold weights below 6e-8, so they are kept e**10 times larger than the running maximum suggests (65504 is the limit).
HALF_HEADROOM = 10.0
# Whether a product of 16-bit matrices can be written in 32 bits; older releases of PyTorch round it to 16.
WIDE_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def memory_readout(
    rows: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    inverse_temperature: Tensor,
    *,
    values: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    per_block: bool = False,
) -> tuple[Tensor, Tensor]:
    """Read-out [R, Dv] and logsumexp [R], summed over blocks, or logsumexp [R, B]; in float32 (float64 for float64).

    ``rows`` [R, D], ``memory`` [K, D] and ``values`` [K, Dv] share a dtype; ``partition`` integer [K], or None for blocks of entries as
    they lie; ``inverse_temperature`` [R], 1/τ of each row, and ``key_bias`` [K] in the dtype of the result. Autocast stays outside: it
    would narrow the products again.
    """
    if key_bias is None and row_group is None and (values is None or values.shape[1] == rows.shape[1]) and flash.obstacle(rows) is None:
        return flash.memory_readout(rows, memory, partition, block_size, inverse_temperature, values, per_block)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    on_cpu = rows.device.type == "cpu"
    most_rows, most_logits = CPU_TILE if on_cpu else GPU_TILE
    narrow = wide if on_cpu else rows.dtype  # dtype of both products' operands
    headroom = HALF_HEADROOM if narrow == torch.float16 else 0.0
    blocks = memory.shape[0] // block_size
    readout = rows.new_zeros((rows.shape[0], (memory if values is None else values).shape[1]), dtype=wide)
    logsumexp = rows.new_zeros((rows.shape[0], blocks if per_block else 1), dtype=wide)
    masked = key_bias is not None or row_group is not None  # a row may see no entry of a tile, or of a block
    least = torch.finfo(wide).min

    for start in range(0, rows.shape[0], most_rows):
        part = slice(start, start + most_rows)
        x, scale = rows[part].to(narrow), inverse_temperature[part, None]  # [r, D], [r, 1]
        if narrow == wide:
            x, scale = x * scale, None  # one pass less over each tile of logits
        tile_size = min(block_size, max(64, most_logits // x.shape[0]), CPU_ENTRIES if on_cpu else block_size)
        key_buffer = memory.new_empty((tile_size if partition is not None else 0, memory.shape[1]), dtype=narrow)
        value_buffer = None if values is None else values.new_empty((len(key_buffer), values.shape[1]), dtype=narrow)
        for block in range(blocks):
            total: Any = None  # with sums and pivot, of the tiles so far
            sums: Any = None
            pivot = None
            for where in tiles(partition, block, block_size, tile_size):
                keys = gather(memory, where, key_buffer)  # [t, D]
                tile = keys if values is None else gather(values, where, value_buffer)  # [t, Dv]
                logits = _product(x, keys.T, wide)  # [r, t]
                if scale is not None:
                    logits.mul_(scale)
                if key_bias is not None:
                    logits.add_(gather(key_bias, where))
                if row_group is not None and key_group is not None:
                    logits.masked_fill_(row_group[part, None] == gather(key_group, where), -torch.inf)
                tile_pivot = logits.amax(1, keepdim=True).sub_(headroom)
                if masked:
                    tile_pivot.clamp_(min=least)  # -inf less -inf is no number
                if pivot is None:
                    weights = logits.sub_(tile_pivot).exp_()
                    pivot, total, sums = tile_pivot, weights.sum(1, keepdim=True), _product(weights.to(narrow), tile, wide)
                    continue
                torch.maximum(pivot, tile_pivot, out=tile_pivot)
                rescale = pivot.sub_(tile_pivot).exp_()
                pivot = tile_pivot
                weights = logits.sub_(pivot).exp_()
                total.mul_(rescale).add_(weights.sum(1, keepdim=True))
                sums.mul_(rescale)
                if narrow == wide:
                    sums.addmm_(weights, tile)
                else:
                    sums.add_(_product(weights.to(narrow), tile, wide))
            readout[part] += sums.div_(total.clamp_min(torch.finfo(wide).tiny) if masked else total)
            logsumexp[part, block if per_block else 0] += total.log_().add_(pivot).squeeze(1)
    return readout, logsumexp if per_block else logsumexp.squeeze(1)


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def memory_readback(
    rows: Tensor,
    memory: Tensor,
    logsumexp: Tensor,
    partition: Tensor | None,
    block_size: int,
    inverse_temperature: Tensor,
    *,
    row_values: Tensor | None = None,
    row_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """What the entries get back from the rows, [K, Dv], or [K] without ``row_values``; in float32 (float64 for float64).

    It works as the read-out does, but the entries of a tile stay while the rows pass. ``logsumexp`` [R, B], of every row and block, makes
    a running maximum needless; ``row_weight`` is [R, 1] or [R, B]; both have the dtype of the result. ``add_to`` is a result to add to in
    place; it needs blocks of entries as they lie (no partition).
    """
    assert add_to is None or partition is None
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    on_cpu = rows.device.type == "cpu"
    most_rows, most_logits = CPU_TILE if on_cpu else GPU_TILE
    narrow = wide if on_cpu else rows.dtype
    headroom = HALF_HEADROOM if narrow == torch.float16 else 0.0
    shift = logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf).sub_(headroom)  # rows that see nothing give nothing
    given = rows.new_ones((rows.shape[0], 1), dtype=wide) if row_values is None else row_values.to(wide)  # y
    result = rows.new_zeros((memory.shape[0], given.shape[1]), dtype=wide) if add_to is None else add_to
    if rows.shape[0] == 0:
        return result if row_values is not None else result.squeeze(1)
    if row_values is not None and row_values.shape[1] == rows.shape[1] and row_group is None and flash.obstacle(rows) is None:
        flash.memory_readback(
            rows, memory, logsumexp, partition, block_size, inverse_temperature, row_values, row_weight, key_bias, result,
            added=add_to is not None,
        )  # fmt: skip
        return result
    x, scale = rows.to(narrow), inverse_temperature
    if narrow == wide:
        x, scale = x * scale[:, None], None
    tile_size = min(block_size, max(64, most_logits // min(most_rows, rows.shape[0])), CPU_ENTRIES if on_cpu else block_size)
    buffer = memory.new_empty((tile_size if partition is not None else 0, memory.shape[1]), dtype=narrow)
    for block in range(memory.shape[0] // block_size):
        if block == 0 or (row_weight is not None and row_weight.shape[1] > 1):
            y = given if row_weight is None else given * row_weight[:, min(block, row_weight.shape[1] - 1), None]  # c·y of this block
            # float16 holds no weight of a mean over many rows: bring the largest to 1
            size = y.abs().amax().clamp_(min=torch.finfo(wide).tiny) if narrow == torch.float16 else None
            y = y if size is None else y / size
        for where in tiles(partition, block, block_size, tile_size):
            keys = gather(memory, where, buffer)  # [t, D]
            bias = None if key_bias is None else gather(key_bias, where)[:, None]
            group = None if key_group is None else gather(key_group, where)[:, None]
            sums: Any = None  # [t, Dv]
            for start in range(0, rows.shape[0], most_rows):
                part = slice(start, start + most_rows)
                weights = _product(keys, x[part].T, wide)  # [t, r]
                if scale is not None:
                    weights.mul_(scale[part])
                if bias is not None:
                    weights.add_(bias)
                if group is not None and row_group is not None:
                    weights.masked_fill_(group == row_group[part], -torch.inf)
                weights.sub_(shift[part, block]).exp_()
                if sums is None:
                    sums = _product(weights.to(narrow), y[part].to(narrow), wide)
                elif narrow == wide:
                    sums.addmm_(weights, y[part])
                else:
                    sums.add_(_product(weights.to(narrow), y[part].to(narrow), wide))
            if headroom and size is not None:
                sums.mul_(size * math.exp(-headroom))
            if isinstance(where, slice):
                result[where] += sums
            else:
                result.index_copy_(0, where.long(), sums)
    return result if row_values is not None else result.squeeze(1)


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b in ``wide``, the result never rounded to half precision on the way."""
    if a.dtype == wide:
        return a @ b
    if not WIDE_PRODUCTS:  # several times slower on a GPU with matrix units, and as exact
        return a.to(wide) @ b.to(wide)
    return torch.mm(a, b, out_dtype=wide)
