"""The partition of the memory of one step, by the keyed shuffle (``shuffle``): on a GPU one launch, elsewhere its readable twin."""

import torch
from torch import Tensor

from massl_fast.kernels.shuffle import check_step, round_keys, shuffle


def partition_indices(num_entries: int, *, seed: int, step: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """The partition of one step, int32 [num_entries]; its slice [b·block_size : (b+1)·block_size] holds the entries of block b.

    ``step`` is an integer or an int64 tensor of one element on ``device`` (read there, never on the host). ``device`` defaults to the
    tensor's, else to torch's default device. Raises ValueError for fewer than 1 or at least 2**31 entries.
    """
    if not isinstance(num_entries, torch.SymInt) and not 0 < num_entries < 2**31:
        raise ValueError(f"num_entries must be between 1 and 2**31 - 1; found {num_entries}.")
    device = None if device is None else torch.device(device)
    if isinstance(step, Tensor):
        step = check_step(step)
        if device is not None and (device.type, device.index or 0) != (step.device.type, step.device.index or 0):
            raise ValueError(f"step and device must name one device; found step on {step.device} and device {device}.")
        device = step.device
    elif device is None:
        device = torch.get_default_device()
    if device.type == "cuda" and not torch.compiler.is_compiling():
        from massl_fast.kernels import partition_kernel

        if partition_kernel.supported(device):
            return partition_kernel.partition_indices(num_entries, seed, step, device)
    return shuffle(torch.arange(num_entries, device=device), num_entries, *round_keys(num_entries, seed, step)).int()
