"""The simulated caching allocator against its rules, counted by hand."""

import itertools
import random

import pytest

from massl_fast.profiling.allocator import MIB, SimulatedAllocator, reserved_bytes
from massl_fast.profiling.ledger import Change, Piece


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([1], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 1], 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([9 * MIB, 9 * MIB], 20 * MIB),
        ([9 * MIB, 9 * MIB, 9 * MIB], 40 * MIB),
        ([10 * MIB], 10 * MIB),
        ([11 * MIB], 12 * MIB),
        ([11 * MIB, MIB + 512], 32 * MIB),  # a remainder of 1 MiB is not split off
    ],
)
def test_segments(sizes, reserved):
    allocator = SimulatedAllocator()
    for size in sizes:
        allocator.take(size)
    assert allocator.reserved == reserved


def test_free_neighbours_are_joined_and_taken_again():
    allocator = SimulatedAllocator()
    blocks = [allocator.take(4 * MIB) for _ in range(5)]
    assert allocator.reserved == 20 * MIB
    allocator.give_back(blocks[1])
    allocator.give_back(blocks[3])
    allocator.take(8 * MIB)  # two holes of 4 MiB are no place for 8
    assert allocator.reserved == 40 * MIB
    allocator.give_back(blocks[2])
    allocator.take(9 * MIB)  # into the 12 MiB that three neighbours leave
    assert allocator.reserved == 40 * MIB


def test_the_smallest_block_that_fits_is_taken():
    allocator = SimulatedAllocator()
    large, small = allocator.take(40 * MIB), allocator.take(12 * MIB)
    allocator.give_back(large)
    allocator.give_back(small)
    assert allocator.take(12 * MIB) == small
    assert allocator.take(40 * MIB) == large
    assert allocator.reserved == 52 * MIB


def test_nothing_overlaps_and_nothing_is_lost():
    draw, allocator, living = random.Random(0), SimulatedAllocator(), []
    for _ in range(3000):
        if living and draw.random() < 0.5:
            allocator.give_back(living.pop(draw.randrange(len(living))))
        else:
            living.append(allocator.take(draw.choice([100, 700_000, 3 * MIB, 15 * MIB])))
    places = sorted((block.start, block.start + block.bytes) for block in living)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))
    taken = sum(block.bytes for block in living)
    assert taken + sum(block.bytes for pool in allocator.free.values() for block in pool) == allocator.reserved
    for block in living:
        allocator.give_back(block)
    # Everything free: each segment is one block again.
    assert sum(block.bytes for pool in allocator.free.values() for block in pool) == allocator.reserved
    assert all(block.start % 2**48 == 0 for pool in allocator.free.values() for block in pool)


def test_equal_steps_reserve_once():
    weights, activation = (Piece(12 * MIB, "", "", "op", "", ()) for _ in range(2))
    book = [Change(0, "", weights, 1), Change(1, "", activation, 1), Change(2, "", activation, -1)]
    assert reserved_bytes(book, steps=5) == 24 * MIB
