"""Where the entries of a block lie, a tile at a time."""

from collections.abc import Iterator

from torch import Tensor


def tiles(partition: Tensor | None, block: int, block_size: int, tile_size: int) -> Iterator[slice | Tensor]:
    """Indices of at most ``tile_size`` entries of the block at a time, or slices where blocks are made of entries as they lie."""
    for start in range(block * block_size, (block + 1) * block_size, tile_size):
        tile = slice(start, min(start + tile_size, (block + 1) * block_size))
        yield tile if partition is None else partition[tile]


def gather(of_entries: Tensor, where: slice | Tensor) -> Tensor:
    """What belongs to the entries of a tile; a view where they lie together."""
    return of_entries[where] if isinstance(where, slice) else of_entries.index_select(0, where)
