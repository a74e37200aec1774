"""Enqueue as two Triton launches: normalise, cast and write the rows at the pointer; then move the pointer."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_kernel(
    memory_ptr,  # [entries, WIDTH]
    pointer_ptr,  # int64 [1]
    rows_ptr,  # [count, WIDTH]
    enabled_ptr,  # int8 [1] where GUARDED
    entries,
    stride,  # elements from entry to entry
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, PADDED_WIDTH)
    m_column = o_column < WIDTH
    m_written = m_column
    if GUARDED:
        m_written = o_column < tl.where(tl.load(enabled_ptr) != 0, WIDTH, 0)
    b_row = tl.load(rows_ptr + row * WIDTH + o_column, mask=m_column, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(b_row * b_row))
    norm = tl.where(norm < EPS, EPS, norm)  # a row that holds NaN stays NaN
    position = (tl.load(pointer_ptr) + row) % entries
    b_unit = (b_row / norm).to(memory_ptr.dtype.element_ty)
    tl.store(memory_ptr + position * stride + o_column, b_unit, mask=m_written)


@triton.jit
def _advance_kernel(pointer_ptr, enabled_ptr, entries, count, GUARDED: tl.constexpr):
    """Moves the pointer, in a launch after the writing, whose programs all have to read it first."""
    pointer = tl.load(pointer_ptr)
    moved = (pointer + count) % entries
    if GUARDED:
        moved = tl.where(tl.load(enabled_ptr) != 0, moved, pointer)
    tl.store(pointer_ptr, moved)


def supported(memory: Tensor, rows: Tensor) -> bool:
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(memory.device) >= (8, 0)
        and torch.float64 not in (memory.dtype, rows.dtype)
        and memory.stride(1) == 1
    )


def enqueue_(memory: Tensor, pointer: Tensor, rows: Tensor, eps: float, enabled: Tensor | None) -> None:
    """``ring.enqueue_`` of rows [n, D] on a GPU."""
    rows = rows.contiguous()
    (count, width), entries = rows.shape, memory.shape[0]
    guarded = enabled is not None
    flag = pointer if enabled is None else enabled.view(torch.int8)
    with torch.cuda.device(memory.device) if memory.device.type == "cuda" else contextlib.nullcontext():
        _write_kernel[(count,)](
            memory, pointer, rows, flag, entries, memory.stride(0),
            WIDTH=width, PADDED_WIDTH=triton.next_power_of_2(width), EPS=eps, GUARDED=guarded, num_warps=1,
            enable_fp_fusion=True,
        )  # fmt: skip
        _advance_kernel[(1,)](pointer, flag, entries, count, GUARDED=guarded, num_warps=1, enable_fp_fusion=True)
