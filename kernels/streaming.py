"""The read-out in O(tile) memory with plain PyTorch: the path of CPUs, of GPUs older than compute capability 8.0, and of float64.

All rows, student and teacher together, pass over the memory once. A tile of entries is gathered, multiplied with the rows, exponentiated
against a running row maximum, and multiplied again as values: one load serves both products. Nothing of size rows × K exists, no operation
synchronises, and any temperature or row norm is safe because the maximum is the true one.

Half-precision tiles are widened to float32 on the CPU; on a GPU both products use the tensor cores and return float32.
"""

import torch
from torch import Tensor

# Rows × entries of one tile of logits. CPU: 2 MB of float32 stay in the cache between the two products. GPU: 64 MB, few launches.
CPU_TILE = (1024, 2**19)
GPU_TILE = (8192, 2**24)
# float16 cannot hold weights below 6e-8, so they are kept e**10 times larger than the running maximum suggests (65504 is the limit).
HALF_HEADROOM = 10.0


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def memory_readout(rows: Tensor, memory: Tensor, partition: Tensor, block_size: int, inverse_temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Read-out [R, D] and logsumexp [R], summed over blocks, in float32 (float64 for float64).

    ``rows`` [R, D] and ``memory`` [K, D] share a dtype; ``partition`` integer [K]; ``inverse_temperature`` [R], 1/τ of each row in the
    dtype of the result. Autocast stays outside: it would narrow the products again.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    on_cpu = rows.device.type == "cpu"
    most_rows, most_logits = CPU_TILE if on_cpu else GPU_TILE
    narrow = wide if on_cpu else rows.dtype  # dtype of both products' operands
    headroom = HALF_HEADROOM if narrow == torch.float16 else 0.0
    readout = rows.new_zeros(rows.shape, dtype=wide)
    logsumexp = rows.new_zeros(rows.shape[:1], dtype=wide)
    kept = partition[: memory.shape[0] // block_size * block_size]

    for start in range(0, rows.shape[0], most_rows):
        part = slice(start, start + most_rows)
        x, scale = rows[part].to(narrow), inverse_temperature[part, None]  # [r, D], [r, 1]
        if narrow == wide:
            x, scale = x * scale, None  # one pass less over each tile of logits
        tile_size = min(block_size, max(64, most_logits // x.shape[0]))
        for block in kept.split(block_size):
            pivot = total = values = None
            for indices in block.split(tile_size):
                tile = memory.index_select(0, indices).to(narrow)  # [t, D]
                logits = _product(x, tile.T, wide)  # [r, t]
                if scale is not None:
                    logits.mul_(scale)
                tile_pivot = logits.amax(1, keepdim=True).sub_(headroom)
                if pivot is None:
                    weights = logits.sub_(tile_pivot).exp_()
                    pivot, total, values = tile_pivot, weights.sum(1, keepdim=True), _product(weights.to(narrow), tile, wide)
                    continue
                torch.maximum(pivot, tile_pivot, out=tile_pivot)
                rescale = pivot.sub_(tile_pivot).exp_()
                pivot = tile_pivot
                weights = logits.sub_(pivot).exp_()
                total.mul_(rescale).add_(weights.sum(1, keepdim=True))
                values.mul_(rescale)
                if narrow == wide:
                    values.addmm_(weights, tile)
                else:
                    values.add_(_product(weights.to(narrow), tile, wide))
            readout[part] += values.div_(total)
            logsumexp[part] += total.log_().add_(pivot).squeeze(1)
    return readout, logsumexp


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b in ``wide``, the result never rounded to half precision on the way."""
    return a @ b if a.dtype == wide else torch.mm(a, b, out_dtype=wide)
