"""Both passes of ``consistency.py`` as Triton kernels: CARP's logits exist a tile at a time, for all views of some images at once.

Student and teacher rows lie image by image, so that a tile of IMAGES whole images has every pair of views. ``statistics_kernel`` runs over
the entries of a block once: logsumexp of each row, and Σ_k e^{z_k} e^{w_k} of every pair against both running maxima, a product of the two
tiles of weights (what underflows there is far below the clamp). Probabilities summed over rows are the read-back of ones. For the
gradients the tile of G = s ⊙ (g − ⟨s,g⟩) is made twice, once where rows stay and once where entries stay, so that each result has one
writer: no atomics, results repeat bit for bit.

Products of weights take three TF32 products each, as accurate as float32; G is rounded to bfloat16 for entries of that dtype, else to TF32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from massl_fast.kernels import fused
from massl_fast.kernels.configurations import padded_width
from massl_fast.kernels.fused_kernels import LOG2E, NO_PIVOT

WEIGHT_PRECISION: tl.constexpr = tl.constexpr("tf32x3")
# Rows, entries, stages of a tile, the first that fits the shared memory of a program.
TILES = ((64, 64, 2), (64, 32, 2), (64, 16, 2), (32, 16, 2), (32, 16, 1), (16, 16, 1))
MOST_OF_GRADIENTS = 32  # rows, and entries, of a tile of gradients: 64 of both spill on Hopper
INTERPRETED_TILE = (16, 16, 1)
SPLITS = 16  # of the blocks, where rows stay


@triton.jit
def _load_rows(p_rows, first, count, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS, PADDED_WIDTH] from ``first``, zeros after ``count`` of them."""
    o_row = tl.arange(0, ROWS)
    o_column = tl.arange(0, PADDED_WIDTH)
    mask = (o_row < count)[:, None] & (o_column < WIDTH)[None, :]
    return tl.load(p_rows + (first + o_row).to(tl.int64)[:, None] * WIDTH + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def _load_entries(p_entries, b_index, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr):
    o_column = tl.arange(0, PADDED_WIDTH)
    p_entry = p_entries + b_index.to(tl.int64)[:, None] * WIDTH + o_column[None, :]
    if WIDTH == PADDED_WIDTH:
        return tl.load(p_entry)
    return tl.load(p_entry, mask=(o_column < WIDTH)[None, :], other=0.0)


@triton.jit(do_not_specialize=["images"])
def statistics_kernel(
    student_ptr,  # [images · V, WIDTH]
    teacher_ptr,  # [images · T, WIDTH]
    keys_ptr,  # [K, WIDTH]
    teacher_keys_ptr,  # [K, WIDTH]
    partition_ptr,  # [K] int32
    slope_ptr,  # [K] float32 where HAS_SLOPE
    products_ptr,  # [blocks, images, V, T] float32: ⟨s,t⟩ of each pair of views, i = j among them
    student_sums_ptr,  # [2, blocks, images · V] float32: log2 of the greatest e^z, Σ e^z in units of it
    teacher_sums_ptr,  # [2, blocks, images · T] float32
    means_ptr,  # [blocks, images · V] float32: ⟨s,slope⟩
    images,
    block_size,
    V: tl.constexpr,
    T: tl.constexpr,
    IMAGES: tl.constexpr,  # of a tile
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TEACHER_ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per tile of images and block."""
    first_image = tl.program_id(0) * IMAGES
    i_block = tl.program_id(1).to(tl.int64)
    count = tl.minimum(IMAGES, images - first_image)
    b_z = _load_rows(student_ptr, first_image * V, count * V, WIDTH, PADDED_WIDTH, ROWS)
    b_w = _load_rows(teacher_ptr, first_image * T, count * T, WIDTH, PADDED_WIDTH, TEACHER_ROWS)
    o_entry = tl.arange(0, ENTRIES)
    p_index = partition_ptr + i_block * block_size + o_entry
    b_z_pivot = tl.full([ROWS], NO_PIVOT, tl.float32)
    b_w_pivot = tl.full([TEACHER_ROWS], NO_PIVOT, tl.float32)
    b_z_total = tl.zeros([ROWS], tl.float32)
    b_w_total = tl.zeros([TEACHER_ROWS], tl.float32)
    b_mean = tl.zeros([ROWS], tl.float32)
    b_products = tl.zeros([ROWS, TEACHER_ROWS], tl.float32)
    b_index = tl.load(p_index, mask=o_entry < block_size, other=0)
    for tile in tl.range(0, tl.cdiv(block_size, ENTRIES), num_stages=STAGES):
        start = tile * ENTRIES
        b_c = _load_entries(keys_ptr, b_index, WIDTH, PADDED_WIDTH)
        b_teacher_c = _load_entries(teacher_keys_ptr, b_index, WIDTH, PADDED_WIDTH)
        m_entry = start + o_entry < block_size
        if HAS_SLOPE:
            b_slope = tl.load(slope_ptr + b_index, mask=m_entry, other=0.0)
        b_index = tl.load(p_index + start + ENTRIES, mask=start + ENTRIES + o_entry < block_size, other=0)
        b_z_logits = tl.where(m_entry[None, :], tl.dot(b_z, b_c.T, input_precision=PRECISION) * LOG2E, float("-inf"))
        b_w_logits = tl.where(m_entry[None, :], tl.dot(b_w, b_teacher_c.T, input_precision=PRECISION) * LOG2E, float("-inf"))
        b_z_new = tl.maximum(b_z_pivot, tl.max(b_z_logits, 1))
        b_w_new = tl.maximum(b_w_pivot, tl.max(b_w_logits, 1))
        b_z_rescale = tl.exp2(b_z_pivot - b_z_new)
        b_w_rescale = tl.exp2(b_w_pivot - b_w_new)
        b_z_pivot = b_z_new
        b_w_pivot = b_w_new
        b_s = tl.exp2(b_z_logits - b_z_pivot[:, None])
        b_t = tl.exp2(b_w_logits - b_w_pivot[:, None])
        b_z_total = b_z_total * b_z_rescale + tl.sum(b_s, 1)
        b_w_total = b_w_total * b_w_rescale + tl.sum(b_t, 1)
        b_products = b_products * (b_z_rescale[:, None] * b_w_rescale[None, :])
        b_products = tl.dot(b_s, b_t.T, b_products, input_precision=WEIGHT_PRECISION)
        if HAS_SLOPE:
            b_mean = b_mean * b_z_rescale + tl.sum(b_s * b_slope[None, :], 1)

    o_row = tl.arange(0, ROWS)
    o_teacher = tl.arange(0, TEACHER_ROWS)
    m_row = o_row < count * V
    m_teacher = o_teacher < count * T
    p_row = i_block * images * V + first_image * V + o_row
    p_teacher = i_block * images * T + first_image * T + o_teacher
    tl.store(student_sums_ptr + p_row, b_z_pivot, mask=m_row)
    tl.store(student_sums_ptr + tl.num_programs(1) * images * V + p_row, b_z_total, mask=m_row)
    tl.store(teacher_sums_ptr + p_teacher, b_w_pivot, mask=m_teacher)
    tl.store(teacher_sums_ptr + tl.num_programs(1) * images * T + p_teacher, b_w_total, mask=m_teacher)
    if HAS_SLOPE:
        tl.store(means_ptr + p_row, b_mean / b_z_total, mask=m_row)
    m_pair = m_row[:, None] & m_teacher[None, :] & (o_row[:, None] // V == o_teacher[None, :] // T)
    b_products = b_products / (b_z_total[:, None] * b_w_total[None, :])
    tl.store(products_ptr + p_row[:, None] * T + o_teacher[None, :] % T, b_products, mask=m_pair)


@triton.jit
def _gradient_tile(
    b_z,  # [ROWS, PADDED_WIDTH]
    b_w,  # [TEACHER_ROWS, PADDED_WIDTH]
    b_c,  # [ENTRIES, PADDED_WIDTH]
    b_teacher_c,
    b_slope,  # [ENTRIES]
    m_entry,
    student_sums_ptr,
    teacher_sums_ptr,
    coefficients_ptr,  # [blocks, images, V, T] float32: what multiplies t_j in g_i
    means_ptr,  # [blocks, images · V] float32: ⟨s,g⟩
    i_block,
    blocks,
    first_image,
    images,
    V: tl.constexpr,
    T: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    TEACHER_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G [ROWS, ENTRIES]: the gradient of the student's logits; 0 where there is no row or no entry."""
    count = tl.minimum(IMAGES, images - first_image)
    o_row = tl.arange(0, ROWS)
    o_teacher = tl.arange(0, TEACHER_ROWS)
    m_row = o_row < count * V
    m_teacher = o_teacher < count * T
    p_row = i_block * images * V + first_image * V + o_row
    # Pivot and sum apart: their logarithm, as large as the logits, would cost s and t the digits that g − ⟨s,g⟩ loses.
    b_z_pivot = tl.load(student_sums_ptr + p_row, mask=m_row, other=float("inf"))
    b_z_total = tl.load(student_sums_ptr + blocks * images * V + p_row, mask=m_row, other=1.0)
    p_teacher = teacher_sums_ptr + i_block * images * T + first_image * T + o_teacher
    b_w_pivot = tl.load(p_teacher, mask=m_teacher, other=float("inf"))
    b_w_total = tl.load(p_teacher + blocks * images * T, mask=m_teacher, other=1.0)
    b_mean = tl.load(means_ptr + p_row, mask=m_row, other=0.0)
    m_pair = m_row[:, None] & m_teacher[None, :] & (o_row[:, None] // V == o_teacher[None, :] // T)
    b_a = tl.load(coefficients_ptr + p_row[:, None] * T + o_teacher[None, :] % T, mask=m_pair, other=0.0)
    b_s = tl.exp2(tl.dot(b_z, b_c.T, input_precision=PRECISION) * LOG2E - b_z_pivot[:, None]) / b_z_total[:, None]
    b_t = tl.exp2(tl.dot(b_w, b_teacher_c.T, input_precision=PRECISION) * LOG2E - b_w_pivot[:, None]) / b_w_total[:, None]
    b_g = tl.dot(b_a, b_t, input_precision=WEIGHT_PRECISION) + b_slope[None, :]
    return tl.where(m_entry[None, :], b_s * (b_g - b_mean[:, None]), 0.0)


@triton.jit
def _product_with_gradient(b_g, b_other, b_sum):
    """b_sum + b_g @ b_other, in bfloat16 where the other one is, else as TF32: G is too small for float16."""
    if b_other.dtype == tl.bfloat16:
        return tl.dot(b_g.to(tl.bfloat16), b_other, b_sum)
    return tl.dot(b_g, b_other.to(tl.float32), b_sum, input_precision="tf32")


@triton.jit(do_not_specialize=["images", "blocks"])
def row_gradient_kernel(
    student_ptr,
    teacher_ptr,
    keys_ptr,
    teacher_keys_ptr,
    partition_ptr,
    slope_ptr,
    student_sums_ptr,
    teacher_sums_ptr,
    coefficients_ptr,
    means_ptr,
    result_ptr,  # [SPLITS, images · V, WIDTH] float32
    images,
    blocks,
    block_size,
    SPLITS: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    IMAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TEACHER_ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """∂z = Σ_k G_k c_k: one program per tile of images and part of the blocks."""
    first_image = tl.program_id(0) * IMAGES
    i_split = tl.program_id(1)
    count = tl.minimum(IMAGES, images - first_image)
    b_z = _load_rows(student_ptr, first_image * V, count * V, WIDTH, PADDED_WIDTH, ROWS)
    b_w = _load_rows(teacher_ptr, first_image * T, count * T, WIDTH, PADDED_WIDTH, TEACHER_ROWS)
    o_entry = tl.arange(0, ENTRIES)
    tiles = tl.cdiv(block_size, ENTRIES)
    b_result = tl.zeros([ROWS, PADDED_WIDTH], tl.float32)
    first = i_split * blocks // SPLITS
    last = (i_split + 1) * blocks // SPLITS
    b_index = tl.load(partition_ptr + first.to(tl.int64) * block_size + o_entry, mask=(o_entry < block_size), other=0)
    for item in tl.range(first * tiles, last * tiles, num_stages=STAGES):
        i_block = (item // tiles).to(tl.int64)
        m_entry = item % tiles * ENTRIES + o_entry < block_size
        b_c = _load_entries(keys_ptr, b_index, WIDTH, PADDED_WIDTH)
        b_teacher_c = _load_entries(teacher_keys_ptr, b_index, WIDTH, PADDED_WIDTH)
        b_slope = tl.load(slope_ptr + b_index, mask=m_entry, other=0.0)
        ahead = tl.minimum(item + 1, last * tiles - 1)
        b_local = ahead % tiles * ENTRIES + o_entry
        p_index = partition_ptr + (ahead // tiles).to(tl.int64) * block_size + b_local
        b_index = tl.load(p_index, mask=b_local < block_size, other=0)
        b_g = _gradient_tile(
            b_z, b_w, b_c, b_teacher_c, b_slope, m_entry, student_sums_ptr, teacher_sums_ptr, coefficients_ptr, means_ptr,
            i_block, blocks, first_image, images, V, T, IMAGES, ROWS, TEACHER_ROWS, PRECISION,
        )  # fmt: skip
        b_result = _product_with_gradient(b_g, b_c, b_result)
    o_row = tl.arange(0, ROWS)
    o_column = tl.arange(0, PADDED_WIDTH)
    p_result = (i_split * images * V + first_image * V + o_row).to(tl.int64)[:, None] * WIDTH + o_column[None, :]
    tl.store(result_ptr + p_result, b_result, mask=(o_row < count * V)[:, None] & (o_column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["images", "blocks", "tiles"])
def entry_gradient_kernel(
    student_ptr,
    teacher_ptr,
    keys_ptr,
    teacher_keys_ptr,
    partition_ptr,
    slope_ptr,
    student_sums_ptr,
    teacher_sums_ptr,
    coefficients_ptr,
    means_ptr,
    result_ptr,  # [K, WIDTH] float32
    images,
    blocks,
    tiles,  # of a block
    block_size,
    V: tl.constexpr,
    T: tl.constexpr,
    IMAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TEACHER_ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """∂c_k = Σ_i G_ik z_i: one program per tile of entries, which sees all images."""
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    b_local = tl.program_id(0) % tiles * ENTRIES + tl.arange(0, ENTRIES)
    m_entry = b_local < block_size
    b_index = tl.load(partition_ptr + i_block * block_size + b_local, mask=m_entry, other=0)
    b_c = _load_entries(keys_ptr, b_index, WIDTH, PADDED_WIDTH)
    b_teacher_c = _load_entries(teacher_keys_ptr, b_index, WIDTH, PADDED_WIDTH)
    b_slope = tl.load(slope_ptr + b_index, mask=m_entry, other=0.0)
    b_result = tl.zeros([ENTRIES, PADDED_WIDTH], tl.float32)
    for first_image in tl.range(0, images, IMAGES, num_stages=STAGES):
        count = tl.minimum(IMAGES, images - first_image)
        b_z = _load_rows(student_ptr, first_image * V, count * V, WIDTH, PADDED_WIDTH, ROWS)
        b_w = _load_rows(teacher_ptr, first_image * T, count * T, WIDTH, PADDED_WIDTH, TEACHER_ROWS)
        b_g = _gradient_tile(
            b_z, b_w, b_c, b_teacher_c, b_slope, m_entry, student_sums_ptr, teacher_sums_ptr, coefficients_ptr, means_ptr,
            i_block, blocks, first_image, images, V, T, IMAGES, ROWS, TEACHER_ROWS, PRECISION,
        )  # fmt: skip
        b_result = _product_with_gradient(b_g.T, b_z, b_result)
    o_column = tl.arange(0, PADDED_WIDTH)
    p_result = b_index.to(tl.int64)[:, None] * WIDTH + o_column[None, :]
    tl.store(result_ptr + p_result, b_result, mask=m_entry[:, None] & (o_column < WIDTH)[None, :])


def pass_one(
    student: Tensor, teacher: Tensor, prototypes: Tensor, teacher_prototypes: Tensor, partition: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """⟨s,t⟩ [B, N, V, T] and the sums [K] of all probabilities, 0 outside the partition; float32.

    ``student`` [V, N, D], ``teacher`` [T, N, D], both prototypes [K, D], ``partition`` [K].
    """
    given = (student, teacher, prototypes, teacher_prototypes, partition)
    products, *sums, _ = _statistics(*given, block_size, None)
    parts = []
    for rows, entries, (pivot, total) in zip(given[:2], given[2:4], sums):
        flat = rows.transpose(0, 1).reshape(-1, rows.shape[2])  # image by image, as the sums are
        logsumexp = pivot / LOG2E.value + total.log()
        parts.append(fused.memory_readback(flat, entries, logsumexp.T, partition, block_size, 1.0))
    return products, parts[0].add_(parts[1])


def pass_two(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    partition: Tensor,
    block_size: int,
    slope: Tensor,
    scale: Tensor,
    clamp: float,
    different: Tensor,
    learned: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of student [V, N, D] and, where ``learned``, of prototypes [K, D] (else [0, D]), float32.

    ``slope`` [K] and ``scale`` are u/(B(V+T)N) and 1/(|P|NB), both times upstream; ``different`` bool [V, T], which pairs count.
    """
    (V, N, D), blocks = student.shape, prototypes.shape[0] // block_size
    products, student_sums, teacher_sums, means = _statistics(
        student, teacher, prototypes, teacher_prototypes, partition, block_size, slope.contiguous()
    )
    inside = (products >= clamp) & (products <= 1 - clamp) & different
    coefficients = torch.where(inside, -scale / products, 0)  # of t_j in g_i
    means += (coefficients * products).sum(-1).flatten(1)  # ⟨s,g⟩
    tensors, constants, grid = _arguments(student, teacher, prototypes, teacher_prototypes, partition, MOST_OF_GRADIENTS)
    given = (*tensors, slope.contiguous(), student_sums, teacher_sums, coefficients, means)
    splits = min(SPLITS, blocks)
    of_student = prototypes.new_empty((splits, N, V, D), dtype=torch.float32)
    of_entries = prototypes.new_zeros((prototypes.shape[0] if learned else 0, D), dtype=torch.float32)
    with fused.on_device(prototypes.device):
        row_gradient_kernel[(grid, splits)](*given, of_student, N, blocks, block_size, SPLITS=splits, num_warps=8, **constants)
        if learned:
            tiles = triton.cdiv(block_size, constants["ENTRIES"])
            entry_gradient_kernel[(blocks * tiles,)](*given, of_entries, N, blocks, tiles, block_size, num_warps=8, **constants)
    return of_student.sum(0).transpose(0, 1).contiguous(), of_entries


def _statistics(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    partition: Tensor,
    block_size: int,
    slope: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """⟨s,t⟩ [B, N, V, T]; pivots and sums of e^z [2, B, N·V] and of e^w [2, B, N·T]; ⟨s,slope⟩ [B, N·V] where a slope [K] is given."""
    (V, N, _), T, blocks = student.shape, teacher.shape[0], prototypes.shape[0] // block_size
    tensors, constants, grid = _arguments(student, teacher, prototypes, teacher_prototypes, partition)
    products = prototypes.new_empty((blocks, N, V, T), dtype=torch.float32)
    student_sums = prototypes.new_empty((2, blocks, N * V), dtype=torch.float32)
    teacher_sums = prototypes.new_empty((2, blocks, N * T), dtype=torch.float32)
    means = prototypes.new_empty((blocks, N * V), dtype=torch.float32)
    with fused.on_device(prototypes.device):
        statistics_kernel[(grid, blocks)](
            *tensors, products if slope is None else slope, products, student_sums, teacher_sums, means, N, block_size,
            HAS_SLOPE=slope is not None, num_warps=4, **constants,
        )  # fmt: skip
    return products, student_sums, teacher_sums, means


def _arguments(
    student: Tensor, teacher: Tensor, prototypes: Tensor, teacher_prototypes: Tensor, partition: Tensor, most: int = 64
) -> tuple[tuple[Tensor, ...], dict[str, Any], int]:
    """Rows image by image, entries and partition; the constants of a kernel whose tile has at most so many of both; tiles of images."""
    (V, N, D), T = student.shape, teacher.shape[0]
    rows, entries, stages = _tile(V, T, D, prototypes)
    rows, entries = max(min(rows, most), triton.next_power_of_2(V)), min(entries, most)
    images = min(N, rows // V, max(1, rows // T))
    by_image = (views.transpose(0, 1).contiguous() for views in (student, teacher))
    constants = dict(
        V=V, T=T, IMAGES=images, WIDTH=D, PADDED_WIDTH=padded_width(D), ROWS=rows, TEACHER_ROWS=max(16, triton.next_power_of_2(images * T)),
        ENTRIES=entries, PRECISION=fused.PRECISION, STAGES=stages, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    tensors = (*by_image, prototypes.contiguous(), teacher_prototypes.contiguous(), partition.int())
    return tensors, constants, triton.cdiv(N, images)


def _tile(V: int, T: int, width: int, prototypes: Tensor) -> tuple[int, int, int]:
    """Rows, entries and stages of a tile; ValueError where no tile holds all views of an image."""
    if fused.INTERPRETING:
        rows, entries, stages = INTERPRETED_TILE
        return max(rows, triton.next_power_of_2(V)), entries, stages
    limit, item = fused.shared_limit(prototypes.device), prototypes.element_size()
    for rows, entries, stages in TILES:
        teacher_rows = max(16, triton.next_power_of_2(max(1, rows // V) * T))
        of_images = rows + teacher_rows
        in_flight = max(of_images + 2 * stages * entries, stages * of_images + 2 * entries)  # where rows stay, where entries stay
        tiles = in_flight * padded_width(width) * item
        weights = 4 * of_images * (entries + 16)  # operands of the products of weights
        if rows >= V and tiles + weights <= limit:
            return rows, entries, stages
    raise ValueError(f'backend "triton" has no tile for {V} views of {width} columns in {prototypes.dtype}. Use "streaming".')
