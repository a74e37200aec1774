"""Both passes by PyTorch's flash attention for CPUs: fewer passes over each tile of logits, and threads that wait for each other less.

Read-out: rows are queries, a chunk of gathered entries is keys and values, and chunks are merged by their logsumexp. The operator deals
tiles of 256 queries out to threads, and few rows are few tiles; so a chunk is seen as several parts in its batch dimension, as many as make
the threads' shares equal, merged at the end of a block. Read-back: the same the other way round. Entries are queries, rows are keys under
a mask of −L, and what rows give is the value: softmax times its own sum is the sum that entries get back.

The operator is private to PyTorch and has kept its signature since 2.2: this module looks it up once and tries it on first use.
Streaming's loop takes over where it is missing, for float64, and for what it does not do (biases and groups in the read-out, values of
another width).
16-bit rows are widened to float32. The last bits of results depend on the number of threads.
"""

import math

import torch
from torch import Tensor

from massl_fast.kernels.tiles import gather, tiles

OPERATOR = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
QUERIES = 256  # of the operator's largest tile
MOST_ROWS = 1024  # at a time
CHUNK = 4096  # entries at a time, 4 MB at a width of 256; 2048 are 2 % slower, 8192 1 % faster
PART = 2048  # entries of a part at least
MOST_PARTS = 16  # each part has a partial result of its own
_TRIED: list[str | None] = []


def obstacle(rows: Tensor) -> str | None:
    """A sentence that says why the operator cannot take these rows, or None."""
    if rows.device.type != "cpu" or rows.dtype == torch.float64:
        return f"It takes float32 and 16-bit rows on a CPU; found {rows.dtype} on {rows.device}."
    if rows.shape[0] == 0 or rows.shape[1] == 0:
        return "There is nothing to multiply."
    if OPERATOR is None:
        return f"torch {torch.__version__} has no flash attention for CPUs."
    return _TRIED[0] if _TRIED else _try()


def memory_readout(
    rows: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    inverse_temperature: Tensor,
    values: Tensor | None,
    per_block: bool,
) -> tuple[Tensor, Tensor]:
    """As ``streaming.memory_readout``, for ``values`` [K, D] or None."""
    blocks, threads = memory.shape[0] // block_size, torch.get_num_threads()
    readout = rows.new_zeros(rows.shape, dtype=torch.float32)
    logsumexp = rows.new_zeros((rows.shape[0], blocks if per_block else 1), dtype=torch.float32)
    for start in range(0, rows.shape[0], MOST_ROWS):
        some = slice(start, start + MOST_ROWS)
        x = rows[some].float() * inverse_temperature[some, None]
        even = len(x) // QUERIES if len(x) % QUERIES == 0 else 1  # tiles that cost the same
        parts = min(threads // math.gcd(threads, even), MOST_PARTS, block_size)
        chunk = min(block_size, max(CHUNK, parts * PART))
        shape = (chunk if partition is not None else 0, memory.shape[1])
        key_buffer = rows.new_empty(shape, dtype=torch.float32)
        value_buffer = None if values is None else torch.empty_like(key_buffer)
        for block in range(blocks):
            read: tuple[Tensor, Tensor] | None = None  # logsumexp [parts, r] and read-out [parts, r, D] of the chunks so far
            for where in tiles(partition, block, block_size, chunk):
                keys = gather(memory, where, key_buffer)
                mine = keys if values is None else gather(values, where, value_buffer)
                rest = len(keys) % parts  # these go to the first part
                for share, entries in ((parts, slice(len(keys) - rest)), (1, slice(len(keys) - rest, None))):
                    if len(keys[entries]) == 0:
                        continue
                    split = (share, len(keys[entries]) // share, -1)
                    out, found = _attend(x.expand(share, -1, -1), keys[entries].view(split), mine[entries].view(split), None)
                    if read is None:
                        read = found, out
                    else:
                        _merge(read[0][:share], read[1][:share], found, out)
            assert read is not None
            total, sums = read
            joined = total.logsumexp(0)
            readout[some] += sums.mul_((total - joined).exp_()[:, :, None]).sum(0)
            logsumexp[some, block if per_block else 0] += joined
            del read, sums, out  # before the next block takes as much again
    return readout, logsumexp if per_block else logsumexp.squeeze(1)


def memory_readback(
    rows: Tensor,
    memory: Tensor,
    logsumexp: Tensor,
    partition: Tensor | None,
    block_size: int,
    inverse_temperature: Tensor,
    row_values: Tensor,
    row_weight: Tensor | None,
    key_bias: Tensor | None,
    result: Tensor,
    added: bool,
) -> None:
    """As ``streaming.memory_readback`` for ``row_values`` [R, D], into ``result`` [K, D]; ``added`` to what it holds."""
    x = rows.float() * inverse_temperature[:, None]
    given = row_values.float()
    for block in range(memory.shape[0] // block_size):
        shift = logsumexp[:, block]
        blind = shift == -torch.inf  # they give nothing back
        weight = torch.ones_like(shift) if row_weight is None else row_weight[:, min(block, row_weight.shape[1] - 1)]
        y = given * weight.masked_fill(blind, 0)[:, None]
        mask = shift.neg().masked_fill(blind, -torch.inf)[None, None, :]
        for where in tiles(partition, block, block_size, PART):
            out, total = _attend(gather(memory, where).float()[None], x[None], y[None], mask)
            scale = total if key_bias is None else total + gather(key_bias, where)
            out[0].mul_(scale.exp()[0, :, None])
            if not isinstance(where, slice):
                result.index_copy_(0, where.long(), out[0])
            elif added:
                result[where] += out[0]
            else:
                result[where] = out[0]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values [b, k, D] read out by queries [b, q, D] from keys [b, k, D] under a mask [b, 1, k], and the logsumexp [b, q]."""
    assert OPERATOR is not None
    mask = None if mask is None else mask[:, None]
    out, logsumexp = OPERATOR(queries[:, None], keys[:, None], values[:, None], 0.0, False, attn_mask=mask, scale=1.0)
    return out[:, 0], logsumexp[:, 0]


def _merge(total: Tensor, sums: Tensor, more: Tensor, more_sums: Tensor) -> None:
    """Read-outs of two sets of entries become one, in place."""
    joined = torch.logaddexp(total, more)  # lerp_ with a weight per row does it in one pass that takes many times as long
    sums.mul_(total.sub_(joined).exp_()[:, :, None]).add_(more_sums.mul_(more.sub_(joined).exp_()[:, :, None]))
    total.copy_(joined)


def _try() -> str | None:
    """The operator on a case whose result is known."""
    x, keys, values = (torch.arange(n * 4, dtype=torch.float32, device="cpu").view(1, n, 4).sin() for n in (2, 3, 3))
    mask = torch.tensor([[[0.5, -1.0, 0.25]]], device="cpu")
    try:
        found = _attend(x, keys, 2 * values, mask)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        _TRIED.append(f"torch {torch.__version__}'s flash attention for CPUs refuses: {error}.")
        return _TRIED[0]
    if type(found[0]) is not Tensor:
        return None  # shapes alone, under a mode that estimates memory: nothing is proven by it
    logits = x @ keys.mT + mask
    expected = (logits.softmax(-1) @ (2 * values), logits.logsumexp(-1))
    right = all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected))
    _TRIED.append(None if right else f"torch {torch.__version__}'s flash attention for CPUs gives other results than its formula.")
    return _TRIED[0]
