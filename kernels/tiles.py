"""Where the entries of a block lie, a tile at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor


def tiles(partition: Tensor | None, block: int, block_size: int, tile_size: int) -> Iterator[slice | Tensor]:
    """Indices of at most ``tile_size`` entries of the block at a time, or slices where blocks are made of entries as they lie."""
    for start in range(block * block_size, (block + 1) * block_size, tile_size):
        tile = slice(start, min(start + tile_size, (block + 1) * block_size))
        yield tile if partition is None else partition[tile]


def gather(of_entries: Tensor, where: slice | Tensor, into: Tensor | None = None) -> Tensor:
    """What belongs to the entries of a tile: a view where they lie together, else a copy.

    ``into``: a buffer for the copy, of as many entries or more, whose dtype the result has; a fresh copy per tile would be fresh pages
    from the system.
    """
    if isinstance(where, slice):
        return of_entries[where] if into is None else of_entries[where].to(into.dtype)
    if into is None:
        return of_entries.index_select(0, where)
    into = into[: len(where)]
    if into.dtype != of_entries.dtype:
        return into.copy_(of_entries.index_select(0, where))
    return torch.index_select(of_entries, 0, where, out=into)
