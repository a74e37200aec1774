"""Whether the ranks still hold the same numbers.

The memory is never sent between ranks: each writes the same rows in the same order, and so it stays the same everywhere, as do the weights
of replicas. A fault of a device or of a network would break that silently. A checksum of the bits finds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from massl_fast.distributed.world import World


def checksum(tensor: Tensor) -> Tensor:
    """int64 0-d tensor on the device: each 8 bytes times an odd factor of its position, summed modulo 2^64.

    An odd factor maps no two words to one, so a difference in a single word always shows; factors differ, so rows that changed places do.
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if tail := raw.numel() % 8:
        raw = torch.cat([raw, raw.new_zeros(8 - tail)])
    words = raw.view(torch.int64)
    factors = torch.arange(words.numel(), device=words.device) * 0x9E3779B97F4A + 1
    return (words * (factors | 1)).sum()


@torch.no_grad()
def find_drift(world: World, groups: dict[str, list[Tensor]]) -> str | None:
    """A sentence naming what differs between ranks and where, or None. A collective call that waits for the device.

    ``groups``: tensors that ought to be the same on every rank, by what to call them.
    """
    if world.size == 1 or not groups:
        return None
    sums: list[Any] = [sum(checksum(tensor) * (2 * index + 1) for index, tensor in enumerate(tensors)) for tensors in groups.values()]
    table = world.gather_rows(torch.stack(sums)[None]).tolist()
    for column, name in enumerate(groups):
        found = [row[column] for row in table]
        common = max(found, key=found.count)
        others = [str(rank) for rank, value in enumerate(found) if value != common]
        if 2 * len(others) >= len(found):
            return f"The ranks have drifted apart: they hold different {name}, and no majority agrees."
        if others:
            ranks = f"rank {others[0]} holds" if len(others) == 1 else f"ranks {', '.join(others)} hold"
            return f"The ranks have drifted apart: {ranks} other {name} than the rest."
    return None
