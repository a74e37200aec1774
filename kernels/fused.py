"""The read-out as one Triton pass: compute capability 8.0 and newer; float32, bfloat16 and float16; rows up to 512 wide.

Schedule. Student and teacher rows are cut into row tiles, each block of the memory into tiles of entries. The list (row tile, block, entry
tile) is dealt out evenly to one program per multiprocessor slot, so that the last wave is full whatever the shape; a program's share runs
over at most a few (row tile, block) items and leaves one partial result for each. A second kernel adds the partials of a row in a fixed
order (no atomics: results repeat bit for bit on the same kind of GPU), a third turns read-outs into loss, telemetry and gradient.

In the loop. A tile of entries is gathered once, through indices loaded one iteration ahead (an index load in the iteration that needs it
would stop Triton from pipelining the gather), multiplied with the rows, exponentiated, and multiplied again as values. The width is split
into parts no wider than the row tile where the compiler would otherwise hand both products a layout in which every warp reads every row.

Pivot. |x·m| ≤ 1 for unit rows, so the constant 1/τ replaces the running maximum where exp(-2/τ) stays a normal number: bfloat16 and float32
at τ ≥ 0.025. Temperatures that only the GPU knows launch both variants; each looks at them first and the wrong one leaves at once.
"""

# ruff: noqa: RUF005  (Triton's language adds tuples but does not unpack them)

import contextlib
import functools
import os
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from massl_fast.kernels.loss import count_pairs

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Smallest temperature of the constant pivot: weights reach down to 2**(-2 log2(e) / 0.025) = 2**-115, still 2**11 above the smallest
# normal number, which leaves room for rows up to 4% longer than a unit.
CONSTANT_PIVOT_TEMP: tl.constexpr = tl.constexpr(0.025)
# float16 weights below 2**-14 lose bits; 2**15 times larger, a row's largest is still in range and its small ones keep theirs.
HALF_HEADROOM = 15.0
PRECISION = "tf32"  # of float32 products; 16-bit ones are exact


@triton.jit
def _read_kernel(
    student_ptr,  # [student_rows, WIDTH]
    teacher_ptr,  # [teacher_rows, WIDTH]
    memory_ptr,  # [K, WIDTH]
    partition_ptr,  # [K] int32
    student_temp,  # a number, or a pointer where TEMPS_ON_DEVICE
    teacher_temp,
    values_ptr,  # [slots, BLOCK_ROWS, WIDTH] float32: Σ weight · entry
    totals_ptr,  # [slots, BLOCK_ROWS] float32: Σ weight
    pivots_ptr,  # [slots, BLOCK_ROWS] float32: log2 of the scale of both
    student_rows,
    teacher_rows,
    student_tiles,  # row tiles of the student; the teacher's follow
    block_size,
    blocks,
    tiles,  # entry tiles of a block
    share,  # entry tiles of a program; the first `extra` programs have one more
    extra,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    EVEN_BLOCK: tl.constexpr,  # block_size is a multiple of BLOCK_ENTRIES
    CONSTANT_PIVOT: tl.constexpr,
    TEMPS_ON_DEVICE: tl.constexpr,
    HEADROOM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    MASK_STORES: tl.constexpr,
    LOAD_KEYS: tl.constexpr,
):
    i_program = tl.program_id(0)
    if TEMPS_ON_DEVICE:
        student_tau = tl.load(student_temp)
        teacher_tau = tl.load(teacher_temp)
        constant_is_safe = tl.minimum(student_tau, teacher_tau) >= CONSTANT_PIVOT_TEMP
        if HEADROOM == 0.0 and constant_is_safe != CONSTANT_PIVOT:
            return
    else:
        student_tau = student_temp
        teacher_tau = teacher_temp
    begin = i_program * share + tl.minimum(i_program, extra)
    end = begin + share + (i_program < extra).to(tl.int32)

    PART: tl.constexpr = PADDED_WIDTH // PARTS
    EVEN_WIDTH: tl.constexpr = WIDTH == PADDED_WIDTH
    ROUNDS_WEIGHTS: tl.constexpr = memory_ptr.dtype.element_ty != tl.float32
    o_row = tl.arange(0, BLOCK_ROWS)
    o_entry = tl.arange(0, BLOCK_ENTRIES)
    o_column = tl.arange(0, PART)
    o_cell = o_row[:, None] * WIDTH + o_column[None, :]  # [BLOCK_ROWS, PART]
    for item in range(begin // tiles, tl.cdiv(end, tiles)):
        first = tl.maximum(begin - item * tiles, 0)
        last = tl.minimum(end - item * tiles, tiles)
        i_rows = item // blocks
        i_block = item % blocks
        if i_rows < student_tiles:
            p_x = student_ptr
            start_row = i_rows * BLOCK_ROWS
            rows = student_rows
            scale = LOG2E / student_tau
        else:
            p_x = teacher_ptr
            start_row = (i_rows - student_tiles) * BLOCK_ROWS
            rows = teacher_rows
            scale = LOG2E / teacher_tau
        m_x = (o_row < rows - start_row)[:, None]
        p_x = p_x + start_row.to(tl.int64) * WIDTH + o_cell
        b_x = ()  # PARTS × [BLOCK_ROWS, PART]
        b_values = ()
        for part in tl.static_range(PARTS):
            m_part = m_x if EVEN_WIDTH else m_x & (part * PART + o_column < WIDTH)[None, :]
            b_x = b_x + (tl.load(p_x + part * PART, mask=m_part, other=0.0),)
            b_values = b_values + (tl.zeros([BLOCK_ROWS, PART], tl.float32),)
        b_total = tl.zeros([BLOCK_ROWS], tl.float32)
        b_rounded = tl.zeros([BLOCK_ROWS], tl.float32)  # Σ of the weights as the second product has them
        b_pivot = tl.full([BLOCK_ROWS], scale if CONSTANT_PIVOT else float("-inf"), tl.float32)

        p_index = partition_ptr + i_block.to(tl.int64) * block_size + o_entry
        if EVEN_BLOCK:
            b_index = tl.load(p_index + first * BLOCK_ENTRIES)
        else:
            b_index = tl.load(p_index + first * BLOCK_ENTRIES, mask=first * BLOCK_ENTRIES + o_entry < block_size, other=0)
        for tile in tl.range(first, last, num_stages=STAGES):
            start = tile * BLOCK_ENTRIES
            p_entry = memory_ptr + b_index.to(tl.int64) * WIDTH
            p_m = p_entry[:, None] + o_column[None, :]
            if EVEN_BLOCK:
                b_index = tl.load(p_index + tl.minimum(start + BLOCK_ENTRIES, block_size - BLOCK_ENTRIES))
            else:
                m_entry = start + o_entry < block_size
                m_next = start + BLOCK_ENTRIES + o_entry < block_size
                b_index = tl.load(p_index + start + BLOCK_ENTRIES, mask=m_next, other=0)
            b_m = ()  # PARTS × [BLOCK_ENTRIES, PART]
            b_logits = tl.zeros([BLOCK_ROWS, BLOCK_ENTRIES], tl.float32)
            for part in tl.static_range(PARTS):
                if EVEN_WIDTH:
                    b_part = tl.load(p_m + part * PART)
                else:
                    b_part = tl.load(p_m + part * PART, mask=(part * PART + o_column < WIDTH)[None, :], other=0.0)
                if LOAD_KEYS:
                    p_key = p_entry[None, :] + part * PART + o_column[:, None]
                    if EVEN_WIDTH:
                        b_key = tl.load(p_key)
                    else:
                        b_key = tl.load(p_key, mask=(part * PART + o_column < WIDTH)[:, None], other=0.0)
                else:
                    b_key = b_part.T
                b_logits = tl.dot(b_x[part], b_key, b_logits, input_precision=PRECISION)
                b_m = b_m + (b_part,)

            if CONSTANT_PIVOT:
                b_weights = tl.exp2(b_logits * scale - scale)
            else:
                if not EVEN_BLOCK:
                    b_logits = tl.where(m_entry[None, :], b_logits, float("-inf"))
                b_new = tl.maximum(b_pivot, tl.max(b_logits, 1) * scale - HEADROOM)
                b_rescale = tl.exp2(b_pivot - b_new)
                b_pivot = b_new
                b_weights = tl.exp2(b_logits * scale - b_pivot[:, None])
                b_total = b_total * b_rescale
                b_rounded = b_rounded * b_rescale
                b_old = b_values
                b_values = ()
                for part in tl.static_range(PARTS):
                    b_values = b_values + (b_old[part] * b_rescale[:, None],)
            if not EVEN_BLOCK:
                b_weights = tl.where(m_entry[None, :], b_weights, 0.0)
            b_total += tl.sum(b_weights, 1)
            b_operand = b_weights.to(memory_ptr.dtype.element_ty)
            if ROUNDS_WEIGHTS:
                b_rounded += tl.sum(b_operand.to(tl.float32), 1)
            b_old = b_values
            b_values = ()
            for part in tl.static_range(PARTS):
                b_values = b_values + (tl.dot(b_operand, b_m[part], b_old[part], input_precision=PRECISION),)

        # Of two pieces of work that follow each other the second has a later program or a later item: the sum tells them apart.
        slot = (i_program + item).to(tl.int64)
        # Makes the read-out a mean of entries however the weights were rounded; their exact sum stays the softmax's.
        b_correction = (b_total / b_rounded)[:, None] if ROUNDS_WEIGHTS else 1.0
        tl.store(totals_ptr + slot * BLOCK_ROWS + o_row, b_total)
        if not CONSTANT_PIVOT:
            tl.store(pivots_ptr + slot * BLOCK_ROWS + o_row, b_pivot)
        p_values = values_ptr + slot * BLOCK_ROWS * WIDTH + o_cell
        for part in tl.static_range(PARTS):
            if EVEN_WIDTH and not MASK_STORES:
                tl.store(p_values + part * PART, b_values[part] * b_correction)
            else:
                m_part = m_x if EVEN_WIDTH else m_x & (part * PART + o_column < WIDTH)[None, :]
                tl.store(p_values + part * PART, b_values[part] * b_correction, mask=m_part)


@triton.jit
def _owner(tile, share, extra):
    """The program that has a tile of the list."""
    long = extra * (share + 1)
    return tl.where(tile < long, tile // (share + 1), extra + (tile - long) // share)


@triton.jit
def _combine_kernel(
    values_ptr,
    totals_ptr,
    pivots_ptr,
    student_temp,
    teacher_temp,
    readout_ptr,  # [student_rows + teacher_rows, WIDTH] float32
    logsumexp_ptr,  # [student_rows + teacher_rows] float32
    student_rows,
    student_tiles,
    blocks,
    tiles,
    share,
    extra,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CONSTANT_PIVOT: tl.constexpr,
    TEMPS_ON_DEVICE: tl.constexpr,
):
    """One program a row: the partials of each block are brought to one scale and normalised, the blocks are added up."""
    row = tl.program_id(0)
    o_column = tl.arange(0, PADDED_WIDTH)
    m_column = o_column < WIDTH
    student_tau = tl.load(student_temp) if TEMPS_ON_DEVICE else student_temp
    teacher_tau = tl.load(teacher_temp) if TEMPS_ON_DEVICE else teacher_temp
    constant = CONSTANT_PIVOT
    if TEMPS_ON_DEVICE:
        constant = CONSTANT_PIVOT & (tl.minimum(student_tau, teacher_tau) >= CONSTANT_PIVOT_TEMP)
    local = tl.where(row < student_rows, row, row - student_rows)
    i_rows = local // BLOCK_ROWS + tl.where(row < student_rows, 0, student_tiles)
    b_readout = tl.zeros([PADDED_WIDTH], tl.float32)
    logsumexp = 0.0
    for block in range(blocks):
        item = i_rows * blocks + block
        slot = (_owner(item * tiles, share, extra) + item).to(tl.int64)
        last_slot = (_owner(item * tiles + tiles - 1, share, extra) + item).to(tl.int64)
        cell = slot * BLOCK_ROWS + local % BLOCK_ROWS
        pivot = LOG2E / tl.where(row < student_rows, student_tau, teacher_tau)
        if not constant:
            pivot = tl.load(pivots_ptr + cell)
        total = tl.load(totals_ptr + cell)
        b_values = tl.load(values_ptr + cell * WIDTH + o_column, mask=m_column, other=0.0)
        while slot < last_slot:
            slot += 1
            cell = slot * BLOCK_ROWS + local % BLOCK_ROWS
            other = pivot
            if not constant:
                other = tl.load(pivots_ptr + cell)
            new = tl.maximum(pivot, other)
            rescale = tl.exp2(pivot - new)
            weight = tl.exp2(other - new)
            pivot = new
            total = total * rescale + tl.load(totals_ptr + cell) * weight
            b_other = tl.load(values_ptr + cell * WIDTH + o_column, mask=m_column, other=0.0)
            b_values = b_values * rescale + b_other * weight
        b_readout += b_values / total
        logsumexp += (pivot + tl.log2(total)) / LOG2E
    tl.store(logsumexp_ptr + row, logsumexp)
    tl.store(readout_ptr + row.to(tl.int64) * WIDTH + o_column, b_readout, mask=m_column)


@triton.jit
def _assemble_kernel(
    student_ptr,
    teacher_ptr,
    readout_ptr,
    logsumexp_ptr,
    student_temp,
    teacher_temp,
    statistics_ptr,  # [4, images] float32: each image's part of the four statistics of loss.assemble
    gradient_ptr,  # [V, images, WIDTH] float32
    student_views,
    teacher_views,
    images,
    blocks,
    pairs,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TEMPS_ON_DEVICE: tl.constexpr,
):
    """One program an image: loss.assemble on its views."""
    image = tl.program_id(0)
    o_column = tl.arange(0, PADDED_WIDTH)
    m_column = o_column < WIDTH
    student_tau = tl.load(student_temp) if TEMPS_ON_DEVICE else student_temp
    teacher_tau = tl.load(teacher_temp) if TEMPS_ON_DEVICE else teacher_temp
    shared = tl.minimum(student_views, teacher_views)
    scale = 1.0 / (pairs * 1.0 * images * blocks)

    b_target = tl.zeros([PADDED_WIDTH], tl.float32)  # Σ over teacher views
    teacher_entropy = 0.0
    paired_entropy = 0.0
    for j in range(teacher_views):
        row = ((student_views + j) * images + image).to(tl.int64)
        b_w = tl.load(teacher_ptr + (j * images + image).to(tl.int64) * WIDTH + o_column, mask=m_column, other=0.0)
        b_readout = tl.load(readout_ptr + row * WIDTH + o_column, mask=m_column, other=0.0)
        b_target += b_readout
        entropy = tl.load(logsumexp_ptr + row) - tl.sum(b_w.to(tl.float32) * b_readout) / teacher_tau
        teacher_entropy += entropy
        paired_entropy += entropy * (student_views - (j < shared).to(tl.float32))

    loss = 0.0
    student_entropy = 0.0
    for i in range(student_views):
        row = (i * images + image).to(tl.int64)
        is_shared = (i < shared).to(tl.float32)
        same = ((student_views + tl.minimum(i, shared - 1)) * images + image).to(tl.int64)  # the teacher's view of the same crop
        b_z = tl.load(student_ptr + row * WIDTH + o_column, mask=m_column, other=0.0).to(tl.float32)
        b_readout = tl.load(readout_ptr + row * WIDTH + o_column, mask=m_column, other=0.0)
        b_target_i = b_target - is_shared * tl.load(readout_ptr + same * WIDTH + o_column, mask=m_column, other=0.0)
        targets = teacher_views - is_shared
        logsumexp = tl.load(logsumexp_ptr + row)
        loss += targets * logsumexp - tl.sum(b_z * b_target_i) / student_tau
        student_entropy += logsumexp - tl.sum(b_z * b_readout) / student_tau
        b_gradient = (targets * b_readout - b_target_i) * (scale / student_tau)
        tl.store(gradient_ptr + row * WIDTH + o_column, b_gradient, mask=m_column)
    tl.store(statistics_ptr + image, loss * scale)
    tl.store(statistics_ptr + images + image, student_entropy / (student_views * 1.0 * images * blocks))
    tl.store(statistics_ptr + 2 * images + image, teacher_entropy / (teacher_views * 1.0 * images * blocks))
    tl.store(statistics_ptr + 3 * images + image, (loss - paired_entropy) * scale)


@dataclass(frozen=True)
class Configuration:
    """Tile sizes and resources of the read kernel."""

    block_rows: int
    block_entries: int
    parts: int
    """Pieces of the width; no wider than the row tile."""
    warps: int
    stages: int
    mask_stores: bool = False
    """Leave rows past the end unwritten: nobody reads them, but on some architectures the mask saves the compiler a spill."""
    load_keys: bool = False
    """Load keys and values separately, for float32: products that want one tile in two layouts keep Triton from pipelining its load."""
    programs: int = 1
    """Programs at a time on one multiprocessor."""


# One table a class of GPU: bytes an element → padded width → choice (width 16 takes that of 32). Chosen from machine code
# (docs/kernels.md) for tensor cores, asynchronous copies, more than one tile in flight and no spill; a test holds them to it.
_SMALL = {  # 99 KiB of shared memory: compute capability 8.6, 8.9, 12.0 and whatever is not known
    2: {
        32: Configuration(128, 64, 1, 4, 3, programs=2),
        64: Configuration(128, 64, 1, 8, 4),
        128: Configuration(128, 32, 1, 8, 4),
        256: Configuration(64, 32, 2, 4, 3),
        512: Configuration(32, 16, 4, 8, 3),
    },
    4: {
        32: Configuration(64, 32, 1, 4, 3, load_keys=True, programs=3),
        64: Configuration(64, 32, 1, 8, 3, load_keys=True),
        128: Configuration(64, 16, 1, 8, 3, load_keys=True),
        256: Configuration(32, 16, 2, 8, 3, load_keys=True),
    },
}
_AMPERE = {  # 163 KiB: A100
    2: {
        32: Configuration(128, 64, 1, 4, 3, programs=2),
        64: Configuration(128, 64, 1, 8, 4),
        128: Configuration(128, 64, 1, 8, 4),
        256: Configuration(128, 32, 2, 8, 4, mask_stores=True),
        512: Configuration(64, 32, 4, 8, 3),
    },
    4: {
        32: Configuration(64, 32, 1, 4, 3, load_keys=True, programs=4),
        64: Configuration(64, 32, 1, 8, 3, load_keys=True, programs=2),
        128: Configuration(64, 32, 1, 8, 3, load_keys=True),
        256: Configuration(64, 16, 2, 8, 3, load_keys=True),
        512: Configuration(16, 16, 4, 8, 3, load_keys=True),
    },
}
_HOPPER = {  # 227 KiB: H100, H200
    2: {
        32: Configuration(128, 64, 1, 8, 4, programs=2),
        64: Configuration(128, 64, 1, 8, 4),
        128: Configuration(128, 128, 1, 8, 3),
        256: Configuration(128, 64, 2, 8, 3),
        512: Configuration(32, 32, 4, 8, 3),
    },
    4: {
        32: Configuration(64, 32, 1, 4, 3, load_keys=True, programs=4),
        64: Configuration(64, 32, 1, 8, 3, load_keys=True, programs=2),
        128: Configuration(64, 32, 1, 8, 3, load_keys=True),
        256: Configuration(64, 16, 2, 8, 3, load_keys=True),
        512: Configuration(32, 16, 4, 8, 3, load_keys=True),
    },
}
_BLACKWELL = {  # 227 KiB: B200
    2: {
        32: Configuration(128, 64, 1, 8, 3),
        64: Configuration(128, 64, 1, 8, 3),
        128: Configuration(128, 64, 1, 8, 3),
        256: Configuration(128, 64, 2, 8, 3),
    },
    4: {
        32: Configuration(64, 32, 1, 4, 3, load_keys=True, programs=4),
        64: Configuration(64, 32, 1, 8, 3, load_keys=True, programs=2),
        128: Configuration(64, 32, 1, 8, 3, load_keys=True),
        256: Configuration(64, 16, 2, 8, 3, load_keys=True),
    },
}
# Each table with the shared memory in bytes that its largest choice was given; a GPU with less takes the next one.
_TABLES = {8: (_AMPERE, 163 * 1024), 9: (_HOPPER, 227 * 1024), 10: (_BLACKWELL, 227 * 1024)}
_SMALL_SHARED = 99 * 1024
# In the interpreter: small tiles, two parts, and shares that cut blocks in two.
INTERPRETED = Configuration(16, 32, 2, 4, 1)
INTERPRETED_PROGRAMS = 5
INTERPRETING = knobs.runtime.interpret  # read once: compiled code cannot ask for it
AUTOTUNE = "MASSL_FAST_AUTOTUNE"


def configuration(capability: tuple[int, int], width: int, dtype: torch.dtype, shared_limit: int) -> Configuration | None:
    """The fixed choice for a GPU whose programs can have ``shared_limit`` bytes of shared memory; None where none fits."""
    table, needed = _TABLES.get(capability[0], (_SMALL, _SMALL_SHARED))
    if shared_limit < needed:
        table, needed = _SMALL, _SMALL_SHARED
    if shared_limit < needed:
        return None
    return table[dtype.itemsize].get(max(32, padded_width(width)))


def obstacle(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """A sentence saying why the kernels cannot run on these inputs, or None."""
    if dtype == torch.float64:
        return "It computes in float32, bfloat16 or float16, not in float64."
    if INTERPRETING:
        return "Triton's interpreter multiplies bfloat16 wrongly." if dtype == torch.bfloat16 else None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"It needs an NVIDIA GPU; the tensors are on {device.type}. (TRITON_INTERPRET=1 interprets it on the CPU, slowly.)"
    capability, shared_limit, _, name = _device_limits(device.index or 0)
    if capability < (8, 0):
        return f"{name} has compute capability {capability[0]}.{capability[1]}; Triton's tensor cores need 8.0."
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return 'It multiplies float32 as TF32, which torch.set_float32_matmul_precision("high") allows and "highest" does not.'
    if width is not None and configuration(capability, width, dtype, shared_limit) is None:
        return f"It has no configuration for {dtype} rows {width} wide on {name}."
    return None


def memory_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    partition: Tensor,
    block_size: int,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """``loss.assemble`` of the read-out of student [V, N, D] and teacher [T, N, D]: statistics [4], gradient [V, N, D], float32."""
    (V, N, D), T = student.shape, teacher.shape[0]
    student, teacher = student.contiguous(), teacher.contiguous()
    temps = _temperatures(student_temp, teacher_temp, memory)
    readout, logsumexp = _read(student.view(-1, D), teacher.view(-1, D), memory, partition, block_size, *temps)
    statistics = memory.new_empty((4, N), dtype=torch.float32)
    gradient = memory.new_empty((V, N, D), dtype=torch.float32)
    with _on(memory.device):
        _assemble_kernel[(N,)](
            student, teacher, readout, logsumexp, *temps, statistics, gradient,
            V, T, N, memory.shape[0] // block_size, count_pairs(V, T),
            WIDTH=D, PADDED_WIDTH=triton.next_power_of_2(D), TEMPS_ON_DEVICE=isinstance(temps[0], Tensor),
            num_warps=1 if D <= 128 else 2, enable_fp_fusion=True,
        )  # fmt: skip
    return statistics.sum(1), gradient


def memory_readout(rows: Tensor, memory: Tensor, partition: Tensor, block_size: int, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Read-out [R, D] and logsumexp [R] of rows [R, D], summed over blocks, float32."""
    return _read(rows.contiguous(), rows[:0], memory, partition, block_size, *_temperatures(temperature, temperature, memory))


def _read(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    partition: Tensor,
    block_size: int,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Read-out [R, D] and logsumexp [R] of the student's rows followed by the teacher's, both [·, D] and contiguous."""
    rows, width = student.shape[0] + teacher.shape[0], memory.shape[1]
    readout = memory.new_empty((rows, width), dtype=torch.float32)
    logsumexp = memory.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return readout, logsumexp
    inputs = (student, teacher, memory.contiguous(), partition.int(), block_size, student_temp, teacher_temp)
    choice, programs = _choose(inputs, readout, logsumexp)
    launch(*inputs, readout, logsumexp, choice, programs)
    return readout, logsumexp


def launch(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    partition: Tensor,
    block_size: int,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    readout: Tensor,
    logsumexp: Tensor,
    choice: Configuration,
    programs: int,
) -> None:
    """Read and combine with a given configuration and number of programs."""
    width, blocks = memory.shape[1], memory.shape[0] // block_size
    padded = padded_width(width)
    student_tiles = triton.cdiv(student.shape[0], choice.block_rows)
    items = (student_tiles + triton.cdiv(teacher.shape[0], choice.block_rows)) * blocks
    tiles = triton.cdiv(block_size, choice.block_entries)
    work = items * tiles
    if work >= 2**31:
        raise ValueError(f"{readout.shape[0]} rows against {memory.shape[0]} entries are too many for one call; split the rows.")
    programs = min(programs, work)
    share, extra = divmod(work, programs)
    slots = programs + items - 1
    values = memory.new_empty((slots, choice.block_rows, width), dtype=torch.float32)
    totals = memory.new_empty((slots, choice.block_rows), dtype=torch.float32)
    pivots = torch.empty_like(totals)
    on_device = isinstance(student_temp, Tensor)
    with _on(memory.device):
        variants = pivot_variants(memory.dtype, student_temp, teacher_temp)
        for constant_pivot in variants:
            _read_kernel[(programs,)](
                student, teacher, memory, partition, student_temp, teacher_temp, values, totals, pivots,
                student.shape[0], teacher.shape[0], student_tiles, block_size, blocks, tiles, share, extra,
                WIDTH=width, PADDED_WIDTH=padded, PARTS=choice.parts,
                BLOCK_ROWS=choice.block_rows, BLOCK_ENTRIES=choice.block_entries,
                EVEN_BLOCK=block_size % choice.block_entries == 0, CONSTANT_PIVOT=constant_pivot, TEMPS_ON_DEVICE=on_device,
                HEADROOM=headroom(memory.dtype), PRECISION=PRECISION, STAGES=choice.stages,
                MASK_STORES=choice.mask_stores, LOAD_KEYS=choice.load_keys,
                num_warps=choice.warps, num_stages=choice.stages, enable_fp_fusion=True,
            )  # fmt: skip
        _combine_kernel[(readout.shape[0],)](
            values, totals, pivots, student_temp, teacher_temp, readout, logsumexp,
            student.shape[0], student_tiles, blocks, tiles, share, extra,
            WIDTH=width, PADDED_WIDTH=padded, BLOCK_ROWS=choice.block_rows,
            CONSTANT_PIVOT=variants[0], TEMPS_ON_DEVICE=on_device,
            num_warps=1 if width <= 128 else 2, enable_fp_fusion=True,
        )  # fmt: skip


def padded_width(width: int) -> int:
    """Columns of a tile: a power of two, at least the 16 that a tensor-core product takes."""
    return max(16, triton.next_power_of_2(width))


def headroom(dtype: torch.dtype) -> float:
    return HALF_HEADROOM if dtype == torch.float16 else 0.0


def pivot_variants(dtype: torch.dtype, student_temp: float | Tensor, teacher_temp: float | Tensor) -> tuple[bool, ...]:
    """Which variants to launch: the constant pivot, the running maximum, or both where only the GPU knows the temperatures."""
    if dtype == torch.float16:
        return (False,)
    if isinstance(student_temp, Tensor):
        return (True, False)
    return (min(student_temp, teacher_temp) >= CONSTANT_PIVOT_TEMP.value,)


def _temperatures(student_temp: float | Tensor, teacher_temp: float | Tensor, memory: Tensor) -> tuple:
    """Both as numbers or both as float32 tensors on the device."""
    if not isinstance(student_temp, Tensor) and not isinstance(teacher_temp, Tensor):
        return float(student_temp), float(teacher_temp)
    return tuple(
        temp.float() if isinstance(temp, Tensor) else torch.full((), temp, device=memory.device, dtype=torch.float32)
        for temp in (student_temp, teacher_temp)
    )


def _choose(inputs: tuple, readout: Tensor, logsumexp: Tensor) -> tuple[Configuration, int]:
    """Configuration and number of programs for these inputs: fixed, or timed once where MASSL_FAST_AUTOTUNE=1."""
    memory = inputs[2]
    if INTERPRETING:
        return INTERPRETED, INTERPRETED_PROGRAMS
    capability, shared_limit, multiprocessors, _ = _device_limits(memory.device.index)
    choice = configuration(capability, memory.shape[1], memory.dtype, shared_limit)
    if os.environ.get(AUTOTUNE) == "1" and not torch.cuda.is_current_stream_capturing():
        choice = _tune(inputs, readout, logsumexp, choice, multiprocessors)
    return choice, multiprocessors * choice.programs


def _tune(inputs: tuple, readout: Tensor, logsumexp: Tensor, fixed: Configuration, multiprocessors: int) -> Configuration:
    """The fastest neighbour of the fixed choice for this shape, timed once a process."""
    memory, block_size = inputs[2], inputs[4]
    key = (memory.device, memory.dtype, memory.shape, block_size, readout.shape[0].bit_length(), isinstance(inputs[5], Tensor))
    if key not in _TUNED:
        times = {}
        for choice in neighbours(fixed, padded_width(memory.shape[1])):
            run = functools.partial(launch, *inputs, readout, logsumexp, choice, multiprocessors * choice.programs)
            try:
                times[choice] = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
            except triton.runtime.errors.OutOfResources:
                continue
        _TUNED[key] = min(times, key=times.get)
    return _TUNED[key]


def neighbours(fixed: Configuration, width: int) -> list[Configuration]:
    """The fixed choice and those one step away from it: ten compiles at most."""
    steps = [
        {"stages": fixed.stages - 1},
        {"stages": fixed.stages + 1},
        {"block_entries": fixed.block_entries // 2, "stages": fixed.stages + 1},
        {"block_entries": fixed.block_entries * 2, "stages": fixed.stages - 1},
        {"block_rows": fixed.block_rows // 2, "warps": fixed.warps // 2, "programs": 2 * fixed.programs},
        {"warps": 12 - fixed.warps},
        {"parts": 1 if fixed.parts > 1 else 2},
        {"programs": fixed.programs + 1},
        {"mask_stores": not fixed.mask_stores},
    ]
    choices = [fixed, *(replace(fixed, **step) for step in steps)]
    return [c for c in choices if c.stages >= 2 and min(c.block_entries, c.block_rows, width // c.parts) >= 16]


_TUNED: dict[tuple, Configuration] = {}


@torch.compiler.assume_constant_result
def _device_limits(index: int) -> tuple[tuple[int, int], int, int, str]:
    """Compute capability, shared memory of a program in bytes, multiprocessors, name; compiled code takes them as constants."""
    return _cached_limits(index)


@functools.lru_cache
def _cached_limits(index: int) -> tuple[tuple[int, int], int, int, str]:
    found = torch.cuda.get_device_properties(index)
    return (found.major, found.minor), found.shared_memory_per_block_optin, found.multi_processor_count, found.name


def _on(device: torch.device):
    """Triton launches on the current device; make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
