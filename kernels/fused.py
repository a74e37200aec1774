"""The read-out as one Triton pass: compute capability 8.0 and newer; float32, bfloat16 and float16; rows up to 512 wide.

Schedule. Student and teacher rows are cut into row tiles, each block of the memory into tiles of entries. The list (row tile, block, entry
tile) is dealt out evenly to one program per multiprocessor slot, so that the last wave is full whatever the shape; a program's share runs
over at most a few (row tile, block) items and leaves one partial result for each. A second kernel adds the partials of a row in a fixed
order (no atomics: results repeat bit for bit on the same kind of GPU), a third turns read-outs into loss, telemetry and gradient.
"""

import contextlib
import functools
import os
import warnings
from typing import Any

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion
from triton import knobs
from triton.errors import TritonError

from massl_fast.kernels.configurations import Configuration, configuration, neighbours, padded_width
from massl_fast.kernels.fused_kernels import CONSTANT_PIVOT_TEMP, HALF_HEADROOM, assemble_kernel, combine_kernel, read_kernel
from massl_fast.kernels.loss import count_pairs

PRECISION = "tf32"  # of float32 products; 16-bit ones are exact
# A program of the second kernel: that many partials of that many columns are one tile.
COMBINED_PARTIALS, COMBINED_COLUMNS = 32, 64
# In the interpreter: small tiles, two parts, and shares that cut blocks in two.
INTERPRETED = Configuration(16, 32, 2, 4, 1)
INTERPRETED_PROGRAMS = 5
INTERPRETING = knobs.runtime.interpret  # read once: compiled code cannot ask for it
AUTOTUNE = "MASSL_FAST_AUTOTUNE"
# Before it Triton put no fence.proxy.async between cp.async and the wgmma or tcgen05 that reads what was copied: results of B200 differed
# from call to call (pytorch#181248, triton#9610); H100 was not seen to.
FENCED_SINCE = (3, 7, 1)
FENCED = TorchVersion(triton.__version__) >= FENCED_SINCE


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
    if capability >= (10, 0) and not FENCED:
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}, on which Triton {triton.__version__} lets tensor cores read "
            f"tiles before their asynchronous copies are visible; Triton {'.'.join(map(str, FENCED_SINCE))} and newer do not."
        )
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
    statistics = memory.new_empty((4, (V + T) * N), dtype=torch.float32)
    gradient = memory.new_empty((V, N, D), dtype=torch.float32)
    with _on(memory.device):
        assemble_kernel[(N, V + T)](
            student, teacher, readout, logsumexp, *temps, statistics, gradient,
            V, T, N, memory.shape[0] // block_size, count_pairs(V, T),
            WIDTH=D, PADDED_WIDTH=triton.next_power_of_2(D), TEACHERS=triton.next_power_of_2(T),
            TEMPS_ON_DEVICE=isinstance(temps[0], Tensor), num_warps=1 if D <= 128 else 2, enable_fp_fusion=True,
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
) -> list:
    """Read and combine with a given configuration and number of programs; the compiled read kernels."""
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
    compiled = []
    with _on(memory.device):
        variants = pivot_variants(memory.dtype, student_temp, teacher_temp)
        for constant_pivot in variants:
            kernel = read_kernel[(programs,)](
                student, teacher, memory, partition, student_temp, teacher_temp, values, totals, pivots,
                student.shape[0], teacher.shape[0], student_tiles, block_size, blocks, tiles, share, extra,
                WIDTH=width, PADDED_WIDTH=padded, PARTS=choice.parts,
                BLOCK_ROWS=choice.block_rows, BLOCK_ENTRIES=choice.block_entries,
                EVEN_BLOCK=block_size % choice.block_entries == 0, CONSTANT_PIVOT=constant_pivot, TEMPS_ON_DEVICE=on_device,
                HEADROOM=headroom(memory.dtype), PRECISION=PRECISION, STAGES=choice.stages,
                MASK_STORES=choice.mask_stores, LOAD_KEYS=choice.load_keys,
                num_warps=choice.warps, num_stages=choice.stages, enable_fp_fusion=True,
            )  # fmt: skip
            compiled.append(kernel)
        columns = min(COMBINED_COLUMNS, padded)
        slots = 2 if share >= tiles else 8  # a block's partials: two at most where a share holds a block
        combine_kernel[(readout.shape[0], triton.cdiv(width, columns))](
            values, totals, pivots, student_temp, teacher_temp, readout, logsumexp,
            student.shape[0], student_tiles, blocks, tiles, share, extra,
            WIDTH=width, COLUMNS=columns, BLOCKS=COMBINED_PARTIALS // slots, SLOTS=slots, BLOCK_ROWS=choice.block_rows,
            CONSTANT_PIVOT=variants[0], TEMPS_ON_DEVICE=on_device, num_warps=2, enable_fp_fusion=True,
        )  # fmt: skip
    return compiled


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
    if capability[0] == 9 and not FENCED:
        _warn_of_old_triton()
    choice = configuration(capability, memory.shape[1], memory.dtype, shared_limit)
    if os.environ.get(AUTOTUNE) == "1" and not torch.cuda.is_current_stream_capturing():
        choice = _tune(inputs, readout, logsumexp, choice, multiprocessors)
    return choice, multiprocessors * choice.programs


def resident_programs(compiled: Any, warps: int, device: torch.device) -> int:
    """Programs of a compiled kernel that one multiprocessor of ``device`` holds at a time; its warps are never what runs out."""
    found = torch.cuda.get_device_properties(device)
    registers = -(-compiled.n_regs * 32 // 256) * 256 * warps  # a warp's registers are handed out in units of 256
    shared = compiled.metadata.shared + 1024  # the system's own share of each program
    return min(found.regs_per_multiprocessor // registers, found.shared_memory_per_multiprocessor // shared)


def _tune(inputs: tuple, readout: Tensor, logsumexp: Tensor, fixed: Configuration, multiprocessors: int) -> Configuration:
    """The fastest neighbour of the fixed choice for this shape, timed once a process."""
    memory, block_size = inputs[2], inputs[4]
    key = (memory.device, memory.dtype, memory.shape, block_size, readout.shape[0].bit_length(), isinstance(inputs[5], Tensor))
    if key not in _TUNED:
        times = {}
        for choice in neighbours(fixed, padded_width(memory.shape[1])):
            run = functools.partial(launch, *inputs, readout, logsumexp, choice, multiprocessors * choice.programs)
            try:
                compiled = run()
            except (TritonError, RuntimeError) as error:
                # Too many resources, or a tile that the compiler cannot make; an error of CUDA's is none of these.
                if choice == fixed or not (isinstance(error, TritonError) or "PassManager" in str(error)):
                    raise
                continue
            if choice == fixed or all(resident_programs(one, choice.warps, memory.device) >= choice.programs for one in compiled):
                times[choice] = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
        _TUNED[key] = min(times, key=times.__getitem__)
    return _TUNED[key]


_TUNED: dict[tuple, Configuration] = {}


@functools.cache
def _warn_of_old_triton() -> None:
    warnings.warn(
        f"Triton {triton.__version__} puts no fence between asynchronous copies and the tensor cores of compute capability 9.0. No wrong "
        f"result is known there, but on 10.0 the same made results differ from call to call; Triton {'.'.join(map(str, FENCED_SINCE))} and "
        "newer have the fence.",
        stacklevel=2,
    )


@torch.compiler.assume_constant_result
def _device_limits(index: int) -> tuple[tuple[int, int], int, int, str]:
    """Compute capability, shared memory of a program in bytes, multiprocessors, name; compiled code takes them as constants."""
    return _cached_limits(index)


@functools.lru_cache
def _cached_limits(index: int) -> tuple[tuple[int, int], int, int, str]:
    found = torch.cuda.get_device_properties(index)
    return (found.major, found.minor), found.shared_memory_per_block_optin, found.multi_processor_count, found.name


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
