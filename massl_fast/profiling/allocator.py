"""What PyTorch's caching allocator would reserve on a GPU for a book of allocations: the slack beside the bytes in use, before any run.

The rules are those of PyTorch's default allocator (one stream, no expandable segments, no limit on splitting; c10/cuda, torch 2.x): sizes
round up to 512 bytes; up to 1 MiB comes from segments of 2 MiB, below 10 MiB from segments of 20 MiB, more from a segment of its own, a
multiple of 2 MiB; the smallest free block that is large enough is taken, and split where enough remains; free neighbours are joined.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from massl_fast.profiling.ledger import Change

KIB, MIB = 2**10, 2**20
ROUNDING = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE, LARGE_SEGMENT = 10 * MIB, 20 * MIB


@dataclass(eq=False)
class Block:
    """A stretch of a segment, in use or free."""

    start: int
    """Address of the first byte; segments lie far apart."""
    bytes: int
    small: bool
    before: Block | None = None
    after: Block | None = None
    free: bool = False


class SimulatedAllocator:
    """Allocations in order → ``reserved`` bytes, which never shrink."""

    def __init__(self) -> None:
        self.reserved = 0
        self.in_use = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by pool: (bytes, address, block), in order
        self._segments = 0

    def take(self, size: int) -> Block:
        size = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, (size, -1))
        block = free.pop(place)[2] if place < len(free) else self._segment(size, small)
        block.free = False
        remaining = block.bytes - size
        if remaining >= ROUNDING if small else remaining > SMALL:
            rest = Block(block.start + size, remaining, small, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.bytes = rest, size
            self._put(rest)
        self.in_use += block.bytes
        return block

    def give_back(self, block: Block) -> None:
        self.in_use -= block.bytes
        if (before := block.before) is not None and before.free:
            self._pick(before)
            before.bytes += block.bytes
            before.after = block.after
            if block.after is not None:
                block.after.before = before
            block = before
        if (after := block.after) is not None and after.free:
            self._pick(after)
            block.bytes += after.bytes
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        self._put(block)

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            total = SMALL_SEGMENT
        elif size < LARGE:
            total = LARGE_SEGMENT
        else:
            total = -(-size // (2 * MIB)) * 2 * MIB
        self.reserved += total
        self._segments += 1
        return Block(self._segments << 48, total, small)

    def _put(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.bytes, block.start, block))

    def _pick(self, block: Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, (block.bytes, block.start))]


def reserved_bytes(changes: Iterable[Change], steps: int = 2) -> int:
    """Bytes reserved after ``steps`` equal steps of one step's book. What the first leaves behind stays for the others."""
    allocator = SimulatedAllocator()
    blocks: dict[int, Block] = {}
    changes = list(changes)
    going = {id(change.piece) for change in changes if change.sign < 0}
    for number in range(steps):
        for change in changes:
            piece = id(change.piece)
            if change.sign > 0 and (number == 0 or piece in going):
                blocks[piece] = allocator.take(change.piece.bytes)
            elif change.sign < 0 and piece in blocks:
                allocator.give_back(blocks.pop(piece))
    return allocator.reserved
