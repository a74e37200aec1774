"""Which backend runs an operation, and how every public function reads the arguments that all of them share."""

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from massl_fast.kernels import checks
from massl_fast.kernels.partition import partition_indices

if find_spec("triton") is not None:
    from massl_fast.kernels import consistency_kernel, fused
else:
    fused = None  # type: ignore[assignment]  # a module or nothing

BACKENDS = ("auto", "reference", "streaming", "triton")
# What the fused kernels can do, by operation; the other backends can do everything. A kernel joins by a line here.
TRITON: dict[str, Callable] = {}
if fused is not None:
    TRITON = {
        "memory_cross_entropy": fused.memory_cross_entropy,
        "memory_readout": fused.memory_readout,
        "memory_readback": fused.memory_readback,
        "partition_consistency": consistency_kernel.pass_one,
        "partition_consistency_gradient": consistency_kernel.pass_two,
    }


def available_backends(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends that can run on ``device`` with rows of ``dtype``, fastest first."""
    device = torch.device(device)
    if dtype not in checks.DTYPES:
        return ()
    if triton_obstacle(device, dtype) is not None:
        return ("streaming", "reference")
    # Triton's interpreter on a CPU serves tests and is slower than anything else.
    return ("triton", "streaming", "reference") if device.type == "cuda" else ("streaming", "reference", "triton")


def choose_backend(name: str, memory: Tensor, operation: str = "memory_readout") -> str:
    """The backend that runs ``operation`` on rows like those of ``memory``. Raises ValueError where the named one cannot run it."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; found {name!r}.")
    if name not in ("auto", "triton"):
        return name
    obstacle = triton_obstacle(memory.device, memory.dtype, memory.shape[1], operation)
    if name == "triton" and obstacle is not None:
        raise ValueError(f'backend "triton" cannot run here: {obstacle} Use "streaming" or "auto".')
    if operation not in TRITON and memory.device.type == "cuda" and not torch.compiler.is_compiling():
        _say_once(f'{operation} takes the backend "streaming", because "triton" cannot run it: {obstacle}')
    return "triton" if obstacle is None and (name == "triton" or memory.device.type == "cuda") else "streaming"


def triton_obstacle(
    device: torch.device, dtype: torch.dtype, width: int | None = None, operation: str = "memory_cross_entropy"
) -> str | None:
    """A sentence saying why the fused kernels cannot run the operation, or None."""
    if fused is None:
        return "Triton is not installed."
    if operation not in TRITON:
        return f"It has no kernel for {operation}."
    return fused.obstacle(device, dtype, width)


@functools.lru_cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast would have them: 16-bit or 32-bit ones in its dtype, others, and None, untouched."""
    given = tuple(t for t in tensors if t is not None)
    checks.check_plain_tensors(given)
    device = given[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def split_scalar(value: float | int | Tensor) -> tuple[float | int, Tensor | None]:
    """A scalar argument as an op takes it: the number, or 0 and the tensor that holds it on the device."""
    return (0, value) if isinstance(value, Tensor) else (value, None)


def partition_of(partition: Tensor | None, memory: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """The partition given, looked over, or the keyed one of (seed, step)."""
    if partition is None:
        return partition_indices(memory.shape[0], seed=seed, step=step, device=memory.device)
    checks.check_permutation(partition)
    return partition


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of results and sums."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
