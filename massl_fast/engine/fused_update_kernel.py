"""The pass of fused_update.py as one Triton kernel over many tensors.

A launch takes up to ``GROUP`` weights. Addresses travel as launch arguments: gradients lie elsewhere every step, and a table of addresses
would have to be copied to the device. Which weight and which part of it is a program's, a table made once says.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 32
"""Weights of a launch: 5 addresses each are 1.3 of the 4 KB that a kernel's arguments may take."""
BLOCK = 2048
"""Elements of a program."""
WARPS = 4


@triton.jit
def _update_kernel(
    students,  # tuples of COUNT pointers
    gradients,
    firsts,
    seconds,
    teachers,
    parts_ptr,  # [programs, 2] int32: number of the weight in this launch, block within it
    sizes_ptr,  # [COUNT] int32: elements
    decays_ptr,  # [COUNT] int32: 1 for weights that decay
    factors_ptr,  # [COUNT]
    corrections_ptr,  # [COUNT, 2] float64
    finite_ptr,  # bool
    settings_ptr,  # [4] float64
    beta1,
    rest1,  # 1 − β1, taken in float64: in float32 it would lose five digits
    beta2,
    rest2,
    eps,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16 bytes
):
    if tl.load(finite_ptr):
        program = tl.program_id(0)
        weight = tl.load(parts_ptr + 2 * program)
        block = tl.load(parts_ptr + 2 * program + 1)
        student, gradient, first, second, teacher = students[0], gradients[0], firsts[0], seconds[0], teachers[0]
        for i in tl.static_range(1, COUNT):
            student = tl.where(weight == i, students[i], student)
            gradient = tl.where(weight == i, gradients[i], gradient)
            first = tl.where(weight == i, firsts[i], first)
            second = tl.where(weight == i, seconds[i], second)
            teacher = tl.where(weight == i, teachers[i], teacher)

        if ALIGNED:
            student, gradient = tl.multiple_of(student, 16), tl.multiple_of(gradient, 16)
            first, second, teacher = tl.multiple_of(first, 16), tl.multiple_of(second, 16), tl.multiple_of(teacher, 16)

        rate = tl.load(settings_ptr)
        decay = tl.load(settings_ptr + 1) * tl.load(decays_ptr + weight)
        keep = (1 - rate * decay).to(tl.float32)
        follow = (1 - tl.load(settings_ptr + 2)).to(tl.float32)
        scale1 = (rate / tl.load(corrections_ptr + 2 * weight)).to(tl.float32)
        scale2 = (1 / tl.sqrt(tl.load(corrections_ptr + 2 * weight + 1))).to(tl.float32)
        factor = tl.load(factors_ptr + weight)

        start = block.to(tl.int64) * BLOCK
        left = tl.load(sizes_ptr + weight) - start
        o = start + tl.arange(0, BLOCK)
        student, gradient, first, second, teacher = student + o, gradient + o, first + o, second + o, teacher + o
        # Without a mask a thread moves four elements at a time.
        if left >= BLOCK:
            _update_block(
                student, gradient, first, second, teacher, None, factor, beta1, rest1, beta2, rest2, eps, keep, follow, scale1, scale2
            )
        else:
            m = tl.arange(0, BLOCK) < left
            _update_block(
                student, gradient, first, second, teacher, m, factor, beta1, rest1, beta2, rest2, eps, keep, follow, scale1, scale2
            )


@triton.jit
def _update_block(
    p_student, p_gradient, p_first, p_second, p_teacher, m, factor, beta1, rest1, beta2, rest2, eps, keep, follow, scale1, scale2
):
    b_gradient = tl.load(p_gradient, mask=m) * factor
    b_first = tl.load(p_first, mask=m) * beta1 + b_gradient * rest1
    b_second = tl.load(p_second, mask=m) * beta2 + b_gradient * b_gradient * rest2
    b_student = tl.load(p_student, mask=m) * keep - scale1 * (b_first / (tl.sqrt(b_second) * scale2 + eps))
    b_teacher = tl.load(p_teacher, mask=m)
    b_teacher += (b_student - b_teacher) * follow
    tl.store(p_first, b_first, mask=m)
    tl.store(p_second, b_second, mask=m)
    tl.store(p_student, b_student, mask=m)
    tl.store(p_teacher, b_teacher, mask=m)


def update_(
    students: list[Tensor],
    gradients: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    teachers: list[Tensor],
    decays: list[bool],
    factors: Tensor,
    corrections: Tensor,
    finite: Tensor,
    settings: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """``fused_update.update_tensors`` for float32 weights on a GPU."""
    tensors = (students, gradients, firsts, seconds, teachers)
    for name, group in zip(("weight", "gradient", "first moment", "second moment", "teacher"), tensors):
        for student, tensor in zip(students, group):
            if tensor.dtype != torch.float32 or not _laid_out_alike(tensor, student):
                raise ValueError(
                    f"The fused update takes float32 tensors laid out as their weight; found a {name} of {tensor.dtype} with strides "
                    f"{list(tensor.stride())} for a weight of shape {list(student.shape)} with strides {list(student.stride())}. "
                    f"Choose optimizer.name adamw."
                )
    factors = factors.float()
    coefficients = (betas[0], 1 - betas[0], betas[1], 1 - betas[1])
    sizes = tuple(student.numel() for student in students)
    # Triton launches on the current device.
    with torch.cuda.device(finite.device) if finite.device.type == "cuda" else contextlib.nullcontext():
        for start in range(0, len(students), GROUP):
            part = slice(start, start + GROUP)
            aligned = all(tensor.data_ptr() % 16 == 0 for kind in tensors for tensor in kind[part])
            parts, sizes_here, decays_here = _tables(sizes[part], tuple(decays[part]), finite.device)
            _update_kernel[(len(parts),)](
                *(tuple(kind[part]) for kind in tensors),
                parts, sizes_here, decays_here, factors[part], corrections[part], finite, settings, *coefficients, eps,
                COUNT=len(sizes_here), BLOCK=BLOCK, ALIGNED=aligned, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip


@functools.cache
def _tables(sizes: tuple[int, ...], decays: tuple[bool, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a launch's programs look up: (weight, block) of each program, sizes and decays; the same every step."""
    parts = [(weight, block) for weight, size in enumerate(sizes) for block in range(triton.cdiv(size, BLOCK))]
    return tuple(torch.tensor(values, dtype=torch.int32, device=device) for values in (parts, sizes, decays))


def _laid_out_alike(tensor: Tensor, student: Tensor) -> bool:
    """Whether both fill one piece of memory in the same order; the stride of a dimension of size 1 means nothing."""
    dense = student.is_contiguous() or student.is_contiguous(memory_format=torch.channels_last)
    alike = all(size == 1 or a == b for size, a, b in zip(student.shape, tensor.stride(), student.stride()))
    return dense and tensor.shape == student.shape and alike
