"""The loss and the read-out as their users meet them: checks, choice of backend, custom ops, autograd.

The gradient is a by-product of the forward pass (kernels/loss.py), so each op returns a fixed tuple of plain tensors, autograd stays
outside it, and backward is one multiplication.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from massl_fast.kernels import checks, reference, streaming
from massl_fast.kernels.loss import assemble
from massl_fast.kernels.partition import partition_indices

if find_spec("triton") is not None:
    from massl_fast.kernels import fused
else:
    fused = None

BACKENDS = ("auto", "reference", "streaming", "triton")


class MemoryCrossEntropy(NamedTuple):
    """What ``memory_cross_entropy`` returns: 0-d tensors, float32 (float64 for float64 inputs), in nats."""

    loss: Tensor
    """Cross-entropy, differentiable in the student alone; mean or sum over blocks, mean over pairs and images."""
    student_entropy: Tensor
    """Entropy of the student's distributions, mean over rows and blocks."""
    teacher_entropy: Tensor
    """Entropy of the teacher's distributions, mean over rows and blocks."""
    kl: Tensor
    """Divergence of the student's from the teacher's distributions, mean over pairs, images and blocks."""


def memory_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    *,
    block_size: int,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    partition: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    block_reduction: str = "mean",
    backend: str = "auto",
) -> MemoryCrossEntropy:
    """Cross-entropy of student views against teacher views, both seen as distributions over each block of the memory.

    Learning from Memory (ICML 2024), section 3, equation 3: every student view i against every teacher view j ≠ i; teacher view j is
    the same crop as student view j. The memory is cut into floor(K / block_size) blocks by the partition; a remainder is left out.

    Arguments:
        student: unit rows [V, N, D]; float32, bfloat16, float16 (float64 for the reference and streaming backends).
        teacher: unit rows [T, N, D] of the same dtype; receives no gradient.
        memory: unit rows [K, D] of the same dtype; receives no gradient. Under autocast all three are cast to its dtype.
        block_size: entries of a block, 1 to K.
        student_temp, teacher_temp: positive numbers, or float tensors of one element on the device. A tensor's value is never read by
            the host, hence not checked; a changing value then recompiles nothing and may change between replays of a CUDA graph.
        partition: a permutation of [0, K), int32 or int64 [K]. None: ``partition_indices(K, seed=seed, step=step)``. Contents are checked
            on the CPU; on a GPU, where that means waiting, when MASSL_FAST_CHECK_PARTITION=1.
        seed, step: of the keyed partition; step is an integer or an int64 tensor of one element on the device.
        block_reduction: "mean" (published code) or "sum" (paper) over blocks, for the loss; the other results are always means.
        backend: "auto" takes the first of ``available_backends`` that supports D; a named backend that cannot run is an error.

    Raises ValueError with the argument's name for anything that does not fit.
    """
    student, teacher, memory = _autocast(student, teacher, memory)
    checks.check_views(student, teacher, memory)
    checks.check_blocks(memory, block_size)
    if block_reduction not in ("mean", "sum"):
        raise ValueError(f'block_reduction must be "mean" or "sum"; found {block_reduction!r}.')
    backend = _choose_backend(backend, memory)
    student_temp = checks.check_temperature("student_temp", student_temp, memory)
    teacher_temp = checks.check_temperature("teacher_temp", teacher_temp, memory)
    step = checks.check_partition(partition, step, memory)
    teacher, memory = teacher.detach(), memory.detach()

    if backend == "reference":
        if partition is None:
            partition = partition_indices(memory.shape[0], seed=seed, step=step, device=memory.device)
        else:
            checks.check_permutation(partition)
        values = reference.memory_cross_entropy(student, teacher, memory, partition, block_size, student_temp, teacher_temp)
        loss, *telemetry = values
        telemetry = [value.detach() for value in telemetry]
    else:
        statistics, gradient = torch.ops.massl_fast.memory_cross_entropy(
            student.detach(), teacher, memory, partition, block_size, *_split(student_temp), *_split(teacher_temp),
            seed, *_split(step), backend,
        )  # fmt: skip
        value, *telemetry = statistics.unbind()
        loss = _AttachGradient.apply(student, value, gradient)
    if block_reduction == "sum":
        loss = loss * (memory.shape[0] // block_size)
    return MemoryCrossEntropy(loss, *telemetry)


def memory_readout(
    rows: Tensor,
    memory: Tensor,
    *,
    block_size: int,
    temperature: float | Tensor,
    partition: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The memory read out at each row: (readout [..., D], logsumexp [...]), both summed over blocks, float32 (float64 for float64).

    readout = Σ_b softmax_b(rows · M_bᵀ / τ) M_b, logsumexp = Σ_b logsumexp_b(rows · M_bᵀ / τ); rows [..., D]. The other arguments and
    errors are those of ``memory_cross_entropy``. The results carry no gradient: ∂logsumexp/∂rows is readout / τ.
    """
    rows, memory = _autocast(rows, memory)
    checks.check_rows("rows", rows, memory)
    checks.check_blocks(memory, block_size)
    backend = _choose_backend(backend, memory)
    temperature = checks.check_temperature("temperature", temperature, memory)
    step = checks.check_partition(partition, step, memory)
    flat, memory = rows.detach().reshape(-1, rows.shape[-1]), memory.detach()

    if backend == "reference":
        if partition is None:
            partition = partition_indices(memory.shape[0], seed=seed, step=step, device=memory.device)
        else:
            checks.check_permutation(partition)
        readout, logsumexp = reference.memory_readout(flat, memory, partition, block_size, temperature)
    else:
        readout, logsumexp = torch.ops.massl_fast.memory_readout(
            flat, memory, partition, block_size, *_split(temperature), seed, *_split(step), backend
        )
    return readout.view(rows.shape), logsumexp.view(rows.shape[:-1])


def available_backends(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends that can run on ``device`` with rows of ``dtype``, fastest first."""
    device = torch.device(device)
    if dtype not in checks.DTYPES:
        return ()
    if triton_obstacle(device, dtype) is not None:
        return ("streaming", "reference")
    # Interpreted on a CPU, Triton is there for tests and slower than anything else.
    return ("triton", "streaming", "reference") if device.type == "cuda" else ("streaming", "reference", "triton")


def _choose_backend(asked: str, memory: Tensor) -> str:
    if asked not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; found {asked!r}.")
    if asked not in ("auto", "triton"):
        return asked
    obstacle = triton_obstacle(memory.device, memory.dtype, memory.shape[1])
    if asked == "triton" and obstacle is not None:
        raise ValueError(f'backend "triton" cannot run here: {obstacle} Use "streaming" or "auto".')
    return "triton" if obstacle is None and (asked == "triton" or memory.device.type == "cuda") else "streaming"


def triton_obstacle(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """A sentence saying why the fused kernel cannot run, or None."""
    if fused is None:
        return "Triton is not installed."
    return fused.obstacle(device, dtype, width)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast would have them: 16-bit or 32-bit ones in its dtype, others untouched."""
    checks.check_plain_tensors(tensors)
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _split(value: float | int | Tensor) -> tuple[float | int, Tensor | None]:
    """A scalar argument as the op takes it: the number, or 0 and the tensor that holds it on the device."""
    return (0, value) if isinstance(value, Tensor) else (value, None)


class _AttachGradient(torch.autograd.Function):
    """The loss already computed, with the gradient already computed: wide, so that a loss scale multiplies it before it is rounded."""

    @staticmethod
    def forward(ctx, student: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(ctx.dtype), None, None


@torch.library.custom_op("massl_fast::memory_cross_entropy", mutates_args=())
def _memory_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    partition: Tensor | None,
    block_size: int,
    student_temp: float,
    student_temp_tensor: Tensor | None,
    teacher_temp: float,
    teacher_temp_tensor: Tensor | None,
    seed: int,
    step: int,
    step_tensor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Statistics [4] of ``loss.assemble`` and the gradient [V, N, D], float32 (float64 for float64)."""
    student_temp = student_temp if student_temp_tensor is None else student_temp_tensor
    teacher_temp = teacher_temp if teacher_temp_tensor is None else teacher_temp_tensor
    partition = _partition(partition, memory, seed, step, step_tensor)
    if backend == "triton":
        return fused.memory_cross_entropy(student, teacher, memory, partition, block_size, student_temp, teacher_temp)
    (V, N, D), T = student.shape, teacher.shape[0]
    rows = torch.cat((student, teacher)).view(-1, D)
    wide = _wide(memory)
    inverse = torch.empty((V + T) * N, device=memory.device, dtype=wide)
    inverse[: V * N] = 1 / student_temp
    inverse[V * N :] = 1 / teacher_temp
    readout, logsumexp = streaming.memory_readout(rows, memory, partition, block_size, inverse)
    blocks = memory.shape[0] // block_size
    return assemble(student, teacher, readout, logsumexp, student_temp, teacher_temp, blocks)


@_memory_cross_entropy.register_fake
def _(student, teacher, memory, *_):
    wide = _wide(memory)
    return memory.new_empty(4, dtype=wide), student.new_empty(student.shape, dtype=wide)


@torch.library.custom_op("massl_fast::memory_readout", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """Read-out [R, D] and logsumexp [R] of rows [R, D]."""
    temperature = temperature if temperature_tensor is None else temperature_tensor
    partition = _partition(partition, memory, seed, step, step_tensor)
    if backend == "triton":
        return fused.memory_readout(rows, memory, partition, block_size, temperature)
    inverse = torch.empty(rows.shape[0], device=memory.device, dtype=_wide(memory))
    inverse[:] = 1 / temperature
    return streaming.memory_readout(rows, memory, partition, block_size, inverse)


@_memory_readout.register_fake
def _(rows, memory, *_):
    wide = _wide(memory)
    return rows.new_empty(rows.shape, dtype=wide), rows.new_empty(rows.shape[:1], dtype=wide)


def _partition(partition: Tensor | None, memory: Tensor, seed: int, step: int, step_tensor: Tensor | None) -> Tensor:
    if partition is None:
        step = step if step_tensor is None else step_tensor
        return partition_indices(memory.shape[0], seed=seed, step=step, device=memory.device)
    checks.check_permutation(partition)
    return partition


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
