"""Tile sizes and resources of the read kernel: a table per class of GPU, and the neighbours that the tuner tries."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Configuration:
    """Tile sizes and resources of the read kernel."""

    block_rows: int
    block_entries: int
    parts: int
    """Pieces of the width; no wider than the row tile."""
    warps: int
    stages: int
    mask_stores: bool = False
    """Leave rows past the end unwritten: nobody reads them, but on some architectures the mask saves the compiler registers."""
    load_keys: bool = False
    """Load keys and values separately, for float32: products that want one tile in two layouts keep Triton from pipelining its load."""
    programs: int = 1
    """Programs at a time on one multiprocessor."""


# One table per class of GPU: bytes per element → padded width → choice (width 16 takes that of 32). Chosen from machine code
# (bench/notes/kernels.md) for tensor cores, asynchronous copies, more than one tile in flight and no spill; a test holds them to it.
_SMALL = {  # 99 KiB of shared memory: compute capability 8.6, 8.9, 12.0 and whatever is not known
    2: {
        32: Configuration(128, 64, 1, 4, 3, programs=2),
        64: Configuration(128, 64, 1, 8, 4),
        128: Configuration(128, 32, 1, 8, 4),
        256: Configuration(64, 32, 2, 4, 3, mask_stores=True),
        512: Configuration(32, 16, 4, 8, 3),
    },
    4: {
        32: Configuration(64, 32, 1, 4, 3, load_keys=True, programs=3),
        64: Configuration(64, 32, 1, 8, 3, load_keys=True),
        128: Configuration(64, 16, 1, 8, 3, load_keys=True),
        256: Configuration(32, 16, 2, 8, 3, load_keys=True),
    },
}
_AMPERE = {  # 163 KiB: A100
    2: {
        32: Configuration(128, 64, 1, 4, 3, programs=2),
        64: Configuration(128, 64, 1, 8, 4),
        128: Configuration(128, 64, 1, 8, 4),
        256: Configuration(128, 32, 2, 8, 4, mask_stores=True),
        512: Configuration(64, 32, 4, 8, 3),
    },
    4: {
        32: Configuration(64, 32, 1, 4, 3, load_keys=True, programs=4),
        64: Configuration(64, 32, 1, 8, 3, mask_stores=True, load_keys=True, programs=2),
        128: Configuration(64, 32, 1, 8, 3, load_keys=True),
        256: Configuration(64, 16, 2, 8, 3, load_keys=True),
        512: Configuration(16, 16, 4, 8, 3, load_keys=True),
    },
}
_HOPPER = {  # 227 KiB: H100, H200
    2: {
        32: Configuration(128, 64, 1, 8, 4, programs=2),
        64: Configuration(128, 64, 1, 8, 4),
        128: Configuration(128, 128, 1, 8, 3),
        256: Configuration(128, 64, 1, 8, 3),
        512: Configuration(32, 32, 4, 8, 3),
    },
    4: {
        32: Configuration(64, 32, 1, 4, 3, load_keys=True, programs=4),
        64: Configuration(64, 32, 1, 8, 3, load_keys=True, programs=2),
        128: Configuration(64, 32, 1, 8, 3, load_keys=True),
        256: Configuration(64, 16, 2, 8, 3, load_keys=True),
        512: Configuration(32, 16, 4, 8, 3, load_keys=True),
    },
}
_BLACKWELL = {  # 227 KiB: B200
    2: {
        32: Configuration(128, 64, 1, 8, 3),
        64: Configuration(128, 64, 1, 8, 3),
        128: Configuration(128, 64, 1, 8, 3),
        256: Configuration(128, 64, 2, 8, 3),
    },
    4: {
        32: Configuration(64, 32, 1, 4, 3, load_keys=True, programs=4),
        64: Configuration(64, 32, 1, 8, 3, load_keys=True, programs=2),
        128: Configuration(64, 32, 1, 8, 3, load_keys=True),
        256: Configuration(64, 16, 2, 8, 3, load_keys=True),
    },
}
# Each table with the shared memory in bytes that its largest choice was given; a GPU with less takes the next one.
_TABLES = {8: (_AMPERE, 163 * 1024), 9: (_HOPPER, 227 * 1024), 10: (_BLACKWELL, 227 * 1024)}
_SMALL_SHARED = 99 * 1024


def configuration(capability: tuple[int, int], width: int, dtype: torch.dtype, shared_limit: int) -> Configuration | None:
    """The fixed choice for a GPU whose programs can have ``shared_limit`` bytes of shared memory; None where none fits."""
    table, needed = _TABLES.get(capability[0], (_SMALL, _SMALL_SHARED))
    if shared_limit < needed:
        table, needed = _SMALL, _SMALL_SHARED
    if shared_limit < needed:
        return None
    return table[dtype.itemsize].get(max(32, padded_width(width)))


def back_configuration(capability: tuple[int, int], width: int, dtype: torch.dtype, shared_limit: int) -> Configuration | None:
    """The fixed choice of the read-back, whose stationary tile is the entries': the read-out's where its registers suffice."""
    choice = configuration(capability, width, dtype, shared_limit)
    # Beside these accumulators the shifts and weights of so many rows would spill 80 and 16 bytes.
    if choice in (_AMPERE[2][256], _HOPPER[2][128]):
        return replace(choice, block_entries=choice.block_entries // 2)
    return choice


def with_two_tiles(
    choice: Configuration, capability: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, shared_limit: int
) -> Configuration:
    """The choice where keys and values are two tensors of these widths: as many tiles in flight as shared memory still holds."""
    if choice.load_keys:  # two tiles in any case
        return choice
    keys, values = (padded_width(width, choice.parts) * dtype.itemsize for width in widths)
    left = shared_limit - choice.block_rows * keys - 1024  # what belongs to single rows and entries
    extra = int(capability[0] < 9)  # before Hopper one stage is no buffer
    entries = choice.block_entries
    while entries > 16 and left // (entries * (keys + values)) < 2:
        entries //= 2
    return replace(choice, block_entries=entries, stages=min(choice.stages, left // (entries * (keys + values)) + extra))


def padded_width(width: int, parts: int = 1) -> int:
    """Columns of a tile: a power of two, at least the 16 that a tensor-core product takes for each part."""
    return max(16 * parts, triton.next_power_of_2(width))


def neighbours(fixed: Configuration, width: int) -> list[Configuration]:
    """The fixed choice and those one step away from it: twelve compiles at most."""
    two_programs = {"block_rows": fixed.block_rows // 2, "warps": fixed.warps // 2, "programs": 2 * fixed.programs}
    steps: list[dict[str, Any]] = [
        {"stages": fixed.stages - 1},
        {"stages": fixed.stages + 1},
        {"block_entries": fixed.block_entries // 2, "stages": fixed.stages + 1},
        {"block_entries": fixed.block_entries * 2, "stages": fixed.stages - 1},
        two_programs,
        # With fewer bytes in flight, so that shared memory holds both programs where the tile is wide.
        two_programs | {"block_entries": fixed.block_entries // 2, "stages": fixed.stages + 1},
        two_programs | {"stages": fixed.stages - 1},
        {"warps": 12 - fixed.warps},
        {"parts": 1 if fixed.parts > 1 else 2},
        {"programs": fixed.programs + 1},
        {"mask_stores": not fixed.mask_stores},
    ]
    choices = [fixed, *(replace(fixed, **step) for step in steps)]
    return [c for c in choices if c.stages >= 2 and min(c.block_entries, c.block_rows, width // c.parts) >= 16]
