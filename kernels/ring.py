"""The memory as a ring buffer on the device: first in, first out, written in place, never waiting for the host."""

import torch
from torch import Tensor

EPS = 1e-6  # of the published normalisation


def enqueue_(memory: Tensor, pointer: Tensor, rows: Tensor, *, enabled: Tensor | None = None) -> None:
    """Write ``rows`` into ``memory`` at ``pointer``, wrapping around, and move the pointer past them; all in place.

    ``memory`` [K, D] floating point; ``pointer`` int64 [1] in [0, K), on the same device; ``rows`` [..., D] of any floating dtype, at most
    K of them, normalised to unit length (in float32 or wider) and cast to the memory's dtype. The row that entered last lies before the
    pointer. Nothing waits for the host, so a CUDA graph can hold it. Raises ValueError for arguments that do not fit each other.

    ``enabled``: bool tensor of one element on the device; where it is false, memory and pointer stay as they are (a trainer that finds
    a step unsound only on the device uses it).
    """
    _check(memory, pointer, rows)
    rows = rows.detach().reshape(-1, memory.shape[1])
    if rows.shape[0] == 0:
        return
    if memory.device.type == "cuda" and not torch.compiler.is_compiling():
        from massl_fast.kernels import ring_kernel

        if ring_kernel.supported(memory, rows):
            return ring_kernel.enqueue_(memory, pointer, rows, EPS, enabled)
    with torch.no_grad():
        wide = torch.promote_types(rows.dtype, torch.float32)
        unit = torch.nn.functional.normalize(rows.to(wide), dim=-1, eps=EPS)
        positions = (pointer + torch.arange(rows.shape[0], device=memory.device)) % memory.shape[0]
        entering, count = unit.to(memory.dtype), rows.shape[0]
        if enabled is not None:
            entering = torch.where(enabled, entering, memory.index_select(0, positions))
            count = count * enabled.to(pointer.dtype)
        memory.index_copy_(0, positions, entering)
        pointer.add_(count).remainder_(memory.shape[0])


def _check(memory: Tensor, pointer: Tensor, rows: Tensor) -> None:
    if memory.ndim != 2 or not memory.is_floating_point():
        raise ValueError(f"memory must be floating point [K, D]; found {memory.dtype} of shape {list(memory.shape)}.")
    if pointer.dtype != torch.int64 or pointer.shape != (1,):
        raise ValueError(f"pointer must be int64 of shape [1]; found {pointer.dtype} of shape {list(pointer.shape)}.")
    if rows.ndim < 1 or not rows.is_floating_point() or rows.shape[-1] != memory.shape[1]:
        raise ValueError(
            f"rows must be floating point [..., {memory.shape[1]}], as wide as the memory; found {rows.dtype} of shape {list(rows.shape)}."
        )
    if not memory.device == pointer.device == rows.device:
        raise ValueError(f"memory, pointer and rows must lie on one device; found {memory.device}, {pointer.device} and {rows.device}.")
    if rows.numel() > memory.numel():
        raise ValueError(
            f"rows holds {rows.numel() // memory.shape[1]} rows, more than the {memory.shape[0]} entries of the memory; "
            "a row would be overwritten in the same call. Enqueue fewer rows or use a larger memory."
        )
