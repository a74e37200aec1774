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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion
from triton import knobs
from triton.errors import TritonError

from massl_fast.kernels.configurations import Configuration, back_configuration, configuration, neighbours, padded_width, with_two_tiles
from massl_fast.kernels.fused_kernels import (
    CONSTANT_PIVOT_TEMP,
    HALF_HEADROOM,
    LOG2E,
    assemble_kernel,
    back_kernel,
    combine_kernel,
    read_kernel,
)
from massl_fast.kernels.loss import count_pairs

PRECISION = "tf32"  # of float32 products; 16-bit ones are exact
# A program of the second kernel: that many partials of that many columns are one tile.
COMBINED_PARTIALS, COMBINED_COLUMNS = 32, 64
# In the interpreter: small tiles, two parts, and shares that cut blocks in two.
INTERPRETED = Configuration(16, 32, 2, 4, 1)
INTERPRETED_PROGRAMS = 5
INTERPRETED_SPLITS = 2
INTERPRETING = knobs.runtime.interpret  # read once: compiled code cannot read it
AUTOTUNE = "MASSL_FAST_AUTOTUNE"
# Before it Triton put no fence.proxy.async between cp.async and the wgmma or tcgen05 that reads what was copied: results of B200 differed
# from call to call (pytorch#181248, triton#9610); H100's were never seen to.
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
    readout, logsumexp = _read(student.view(-1, D), teacher.view(-1, D), memory, partition, block_size, *temps, Extensions(unit=True))
    statistics = memory.new_empty((4, (V + T) * N), dtype=torch.float32)
    gradient = memory.new_empty((V, N, D), dtype=torch.float32)
    with on_device(memory.device):
        assemble_kernel[(N, V + T)](
            student, teacher, readout, logsumexp, *temps, statistics, gradient,
            V, T, N, memory.shape[0] // block_size, count_pairs(V, T),
            WIDTH=D, PADDED_WIDTH=triton.next_power_of_2(D), TEACHERS=triton.next_power_of_2(T),
            TEMPS_ON_DEVICE=isinstance(temps[0], Tensor), num_warps=1 if D <= 128 else 2, enable_fp_fusion=True,
        )  # fmt: skip
    return statistics.sum(1), gradient


@dataclass(frozen=True)
class Extensions:
    """What a read-out may have beyond rows, memory and partition."""

    values: Tensor | None = None
    """[K, Dv] of the memory's dtype, what is read out."""
    bias: Tensor | None = None
    """[B · block_size] float32 in the order of the partition, in units of log 2."""
    row_group: Tensor | None = None
    """int32 [R]; rows do not see the entries of their own group."""
    key_group: Tensor | None = None
    """int32 [B · block_size] in the order of the partition."""
    per_block: bool = False
    """logsumexp [R, B] instead of [R]."""
    unit: bool = False
    """Rows and entries are of unit length, so that logits have a bound."""


def memory_readout(
    rows: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    temperature: float | Tensor,
    *,
    values: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
    per_block: bool = False,
) -> tuple[Tensor, Tensor]:
    """``streaming.memory_readout``: read-out [R, Dv] and logsumexp [R] or [R, B] of rows [R, D] of any length, float32."""
    extensions = Extensions(
        None if values is None else values.contiguous(),
        *_in_order(partition, memory.shape[0] // block_size * block_size, key_bias, row_group, key_group),
        per_block,
    )
    temps = _temperatures(temperature, temperature, memory)
    return _read(rows.contiguous(), rows[:0], memory, partition, block_size, *temps, extensions)


def memory_readback(
    rows: Tensor,
    memory: Tensor,
    logsumexp: Tensor,
    partition: Tensor | None,
    block_size: int,
    temperature: float | Tensor,
    *,
    row_values: Tensor | None = None,
    row_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    row_group: Tensor | None = None,
    key_group: Tensor | None = None,
) -> Tensor:
    """``streaming.memory_readback``: what entries get back from rows [R, D] with logsumexp [R, B], [K, Dv] or [K], float32.

    float16 holds neither a weight of 2**-24 nor a mean over many rows, so both operands of its second product are brought to size: a row's
    largest weight to 2**15, the largest of ``row_weight`` and of ``row_values`` to 1.
    """
    (count, width), entries, blocks = rows.shape, memory.shape[0], memory.shape[0] // block_size
    has_values, other_values = row_values is not None, row_values is not None and not _is_same(rows, row_values)
    value_width = row_values.shape[1] if has_values else 1
    shape = (entries, value_width) if has_values else (entries,)
    if count == 0:
        return memory.new_zeros(shape, dtype=torch.float32)
    rows, memory = rows.contiguous(), memory.contiguous()
    bias, row_group, key_group = _in_order(partition, blocks * block_size, key_bias, row_group, key_group)
    above = headroom(rows.dtype) if has_values else 0.0
    shift = logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf).T * LOG2E.value - above  # rows that see nothing give nothing
    factor = None if row_weight is None else row_weight.T
    size = None
    if has_values and rows.dtype == torch.float16:
        size = torch.ones((), device=rows.device)
        if factor is not None:
            size, factor = _to_size(factor)
        if other_values:
            of_values, row_values = _to_size(row_values.float())
            size = size * of_values
    shift, factor = shift.contiguous(), None if factor is None else factor.contiguous()
    factor_stride = count if factor is not None and factor.shape[0] > 1 else 0
    given = row_values.to(rows.dtype).contiguous() if other_values else rows
    order = None if partition is None else partition.int()
    temperature = temperature.float() if isinstance(temperature, Tensor) else float(temperature)

    choice, splits = _choose_back(memory, count, blocks, block_size, value_width, other_values)
    tiles, row_tiles = triton.cdiv(block_size, choice.block_rows), triton.cdiv(count, choice.block_entries)
    leaves_some_out = blocks * block_size < entries
    result = (memory.new_zeros if leaves_some_out else memory.new_empty)((splits, *shape), dtype=torch.float32)
    with on_device(memory.device):
        back_kernel[(blocks * tiles, splits)](
            rows, memory, given, _or(order, memory), _or(bias, shift), _or(row_group, memory), _or(key_group, memory),
            shift, _or(factor, shift), factor_stride, _or(size, shift), temperature, result,
            entries, count, block_size, blocks, tiles, row_tiles, splits,
            WIDTH=width, PADDED_WIDTH=padded_width(width, choice.parts),
            VALUE_WIDTH=value_width, PADDED_VALUE_WIDTH=padded_width(value_width, choice.parts),
            PARTS=choice.parts, BLOCK_ENTRIES=choice.block_rows, BLOCK_ROWS=choice.block_entries,
            GATHERED=partition is not None, HAS_VALUES=has_values, OTHER_VALUES=other_values,
            HAS_BIAS=bias is not None, HAS_GROUPS=row_group is not None, HAS_FACTOR=factor is not None, SCALED=size is not None,
            TEMPS_ON_DEVICE=isinstance(temperature, Tensor), SIZE=2.0**-above, PRECISION=PRECISION, STAGES=choice.stages,
            LOAD_KEYS=choice.load_keys, num_warps=choice.warps, num_stages=choice.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return result[0] if splits == 1 else result.sum(0)


def _in_order(
    partition: Tensor | None, kept: int, key_bias: Tensor | None, row_group: Tensor | None, key_group: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bias in units of log 2, groups of rows and of keys; what belongs to entries as contiguous as the blocks are."""
    order = slice(kept) if partition is None else partition[:kept]
    bias = None if key_bias is None else key_bias[order].float() * LOG2E.value
    if row_group is None:
        return bias, None, None
    return bias, row_group.int().contiguous(), key_group[order].int().contiguous()


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (other.data_ptr(), other.shape, other.stride(), other.dtype)


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """The tensor, or in place of None one whose pointer no kernel reads."""
    return placeholder if tensor is None else tensor


def _to_size(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude, at least the smallest normal number, and the tensor divided by it; the host does not wait."""
    size = tensor.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return size, tensor / size


def _read(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    extensions: Extensions,
) -> tuple[Tensor, Tensor]:
    """Read-out [R, Dv] and logsumexp [R] or [R, B] of the student's rows followed by the teacher's, both [·, D] and contiguous."""
    rows, width = student.shape[0] + teacher.shape[0], _or(extensions.values, memory).shape[1]
    readout = memory.new_empty((rows, width), dtype=torch.float32)
    logsumexp = memory.new_empty((rows, memory.shape[0] // block_size) if extensions.per_block else rows, dtype=torch.float32)
    if rows == 0:
        return readout, logsumexp
    order = None if partition is None else partition.int()
    inputs = (student, teacher, memory.contiguous(), order, block_size, student_temp, teacher_temp, extensions)
    choice, programs = _choose(inputs, readout, logsumexp)
    launch(*inputs, readout, logsumexp, choice, programs)
    return readout, logsumexp


def launch(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    extensions: Extensions,
    readout: Tensor,
    logsumexp: Tensor,
    choice: Configuration,
    programs: int,
) -> list:
    """Read and combine with a given configuration and number of programs; the compiled read kernels."""
    width, value_width, blocks = memory.shape[1], readout.shape[1], memory.shape[0] // block_size
    student_tiles = triton.cdiv(student.shape[0], choice.block_rows)
    items = (student_tiles + triton.cdiv(teacher.shape[0], choice.block_rows)) * blocks
    tiles = triton.cdiv(block_size, choice.block_entries)
    work = items * tiles
    if work >= 2**31:
        raise ValueError(f"{readout.shape[0]} rows against {memory.shape[0]} entries are too many for one call; split the rows.")
    programs = min(programs, work)
    share, extra = divmod(work, programs)
    slots = programs + items - 1
    values = memory.new_empty((slots, choice.block_rows, value_width), dtype=torch.float32)
    totals = memory.new_empty((slots, choice.block_rows), dtype=torch.float32)
    pivots = torch.empty_like(totals)
    read_on_device = isinstance(student_temp, Tensor)
    compiled = []
    with on_device(memory.device):
        variants = pivot_variants(memory.dtype, student_temp, teacher_temp) if extensions.unit else (False,)
        for constant_pivot in variants:
            kernel = read_kernel[(programs,)](
                student, teacher, memory, _or(extensions.values, memory), _or(partition, memory),
                _or(extensions.bias, totals), _or(extensions.row_group, memory), _or(extensions.key_group, memory),
                student_temp, teacher_temp, values, totals, pivots,
                student.shape[0], teacher.shape[0], student_tiles, block_size, blocks, tiles, share, extra,
                WIDTH=width, PADDED_WIDTH=padded_width(width, choice.parts),
            VALUE_WIDTH=value_width, PADDED_VALUE_WIDTH=padded_width(value_width, choice.parts),
                PARTS=choice.parts, GATHERED=partition is not None, OTHER_VALUES=extensions.values is not None,
                HAS_BIAS=extensions.bias is not None, HAS_GROUPS=extensions.row_group is not None, EITHER_PIVOT=len(variants) == 2,
                BLOCK_ROWS=choice.block_rows, BLOCK_ENTRIES=choice.block_entries,
                EVEN_BLOCK=block_size % choice.block_entries == 0, CONSTANT_PIVOT=constant_pivot, TEMPS_ON_DEVICE=read_on_device,
                HEADROOM=headroom(memory.dtype), PRECISION=PRECISION, STAGES=choice.stages,
                MASK_STORES=choice.mask_stores, LOAD_KEYS=choice.load_keys,
                num_warps=choice.warps, num_stages=choice.stages, enable_fp_fusion=True,
            )  # fmt: skip
            compiled.append(kernel)
        columns = min(COMBINED_COLUMNS, padded_width(value_width))
        slots = 2 if share >= tiles else 8  # a block's partials: two at most where a share holds a block
        combine_kernel[(readout.shape[0], triton.cdiv(value_width, columns))](
            values, totals, pivots, student_temp, teacher_temp, readout, logsumexp,
            student.shape[0], student_tiles, blocks, tiles, share, extra,
            WIDTH=value_width, PER_BLOCK=extensions.per_block, COLUMNS=columns, BLOCKS=COMBINED_PARTIALS // slots, SLOTS=slots,
            BLOCK_ROWS=choice.block_rows,
            CONSTANT_PIVOT=variants[0], TEMPS_ON_DEVICE=read_on_device, num_warps=2, enable_fp_fusion=True,
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
    capability, _, multiprocessors, _ = _device_limits(memory.device.index)
    if capability[0] == 9 and not FENCED:
        _warn_of_old_triton()
    choice = _fixed(configuration, memory, readout.shape[1], inputs[7].values is not None)
    if os.environ.get(AUTOTUNE) == "1" and not torch.cuda.is_current_stream_capturing():
        choice = _tune(inputs, readout, logsumexp, choice, multiprocessors)
    return choice, multiprocessors * choice.programs


def resident_programs(compiled: Any, warps: int, device: torch.device) -> int:
    """Programs of a compiled kernel that one multiprocessor of ``device`` holds at a time; its warps are never what runs out."""
    found = torch.cuda.get_device_properties(device)
    registers = -(-compiled.n_regs * 32 // 256) * 256 * warps  # a warp's registers are handed out in units of 256
    shared = compiled.metadata.shared + 1024  # the system's own share of each program
    return min(found.regs_per_multiprocessor // registers, found.shared_memory_per_multiprocessor // shared)


def _fixed(table: Callable[..., Configuration | None], memory: Tensor, value_width: int, two_tiles: bool) -> Configuration:
    """The fixed configuration for entries and values of these widths; ValueError where only the entries have one."""
    capability, shared_limit, _, name = _device_limits(memory.device.index)
    choice = table(capability, max(memory.shape[1], value_width), memory.dtype, shared_limit)
    if choice is None:
        raise ValueError(
            f'backend "triton" has no configuration for {memory.dtype} values {value_width} wide on {name}. '
            'Use "streaming", or narrower values.'
        )
    widths = (memory.shape[1], value_width)
    return with_two_tiles(choice, capability, widths, memory.dtype, shared_limit) if two_tiles else choice


def _choose_back(
    memory: Tensor, rows: int, blocks: int, block_size: int, value_width: int, other_values: bool
) -> tuple[Configuration, int]:
    """Configuration of the read-back, of which the stationary tile is the entries', and into how many parts the rows are split."""
    if INTERPRETING:
        return INTERPRETED, min(INTERPRETED_SPLITS, triton.cdiv(rows, INTERPRETED.block_entries))
    multiprocessors = _device_limits(memory.device.index)[2]
    choice = _fixed(back_configuration, memory, value_width, other_values)
    programs = blocks * triton.cdiv(block_size, choice.block_rows)
    # Few entries leave multiprocessors idle: rows are split until all have work, and parts are added in a fixed order.
    return choice, max(1, min(multiprocessors * choice.programs // programs, triton.cdiv(rows, choice.block_entries)))


def _tune(inputs: tuple, readout: Tensor, logsumexp: Tensor, fixed: Configuration, multiprocessors: int) -> Configuration:
    """The fastest neighbour of the fixed choice for this shape, timed once per process."""
    memory, block_size = inputs[2], inputs[4]
    kind = tuple(part is not None and part is not False for part in vars(inputs[7]).values())
    key = (memory.device, memory.dtype, memory.shape, block_size, readout.shape[0].bit_length(), isinstance(inputs[5], Tensor), kind)
    if key not in _TUNED:
        times = {}
        for choice in neighbours(fixed, padded_width(min(memory.shape[1], readout.shape[1]))):
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
        _TUNED[key] = times
    return min(_TUNED[key], key=_TUNED[key].__getitem__)


def tuned_milliseconds() -> list[tuple[str, dict[Configuration, float]]]:
    """What the tuner timed in this process: the shape of the memory, and milliseconds of each configuration."""
    return [(" × ".join(map(str, key[2])), times) for key, times in _TUNED.items()]


_TUNED: dict[tuple, dict[Configuration, float]] = {}


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


def shared_limit(device: torch.device) -> int:
    """Shared memory that a program on ``device`` can have, in bytes."""
    return _device_limits(device.index)[1]


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
