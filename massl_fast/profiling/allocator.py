"""What PyTorch's caching allocator would reserve on a GPU for a book of allocations: the slack beside the bytes in use, before any run.

The rules are those of PyTorch's default allocator (one stream, no expandable segments, no limit on splitting; c10/cuda, torch 2.x): sizes
round up to 512 bytes; up to 1 MiB comes from segments of 2 MiB, below 10 MiB from segments of 20 MiB, more from a segment of its own, a
multiple of 2 MiB; the smallest free block that is large enough is taken, and split where enough remains; free neighbours are joined.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

from massl_fast.profiling.ledger import Change

MIB = 2**20
ROUNDING = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
LARGE, LARGE_SEGMENT = 10 * MIB, 20 * MIB


class Block(NamedTuple):
    """A stretch of a segment; blocks order by size, then by address, as the allocator chooses among them."""

    bytes: int
    start: int
    """Address of the first byte; segments lie far apart."""
    small: bool


class SimulatedAllocator:
    """Allocations in order → ``reserved`` bytes, which never shrink."""

    def __init__(self) -> None:
        self.reserved = 0
        self.free: dict[bool, list[Block]] = {True: [], False: []}  # by pool, in order
        self._from: dict[int, Block] = {}  # free blocks by their first byte
        self._until: dict[int, Block] = {}  # and by the byte behind their last
        self._segments = 0

    def take(self, size: int) -> Block:
        size = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        small = size <= SMALL
        free = self.free[small]
        place = bisect_left(free, (size,))
        block = self._pick(free[place]) if place < len(free) else self._segment(size, small)
        remaining = block.bytes - size
        if remaining >= ROUNDING if small else remaining > SMALL:
            self._put(Block(remaining, block.start + size, small))
            block = Block(size, block.start, small)
        return block

    def give_back(self, block: Block) -> None:
        if before := self._until.get(block.start):
            self._pick(before)
            block = Block(before.bytes + block.bytes, before.start, block.small)
        if after := self._from.get(block.start + block.bytes):
            self._pick(after)
            block = Block(block.bytes + after.bytes, block.start, block.small)
        self._put(block)

    def _segment(self, size: int, small: bool) -> Block:
        total = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else -(-size // (2 * MIB)) * 2 * MIB
        self.reserved += total
        self._segments += 1
        return Block(total, self._segments << 48, small)

    def _put(self, block: Block) -> None:
        insort(self.free[block.small], block)
        self._from[block.start] = self._until[block.start + block.bytes] = block

    def _pick(self, block: Block) -> Block:
        free = self.free[block.small]
        del free[bisect_left(free, block)], self._from[block.start], self._until[block.start + block.bytes]
        return block


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
