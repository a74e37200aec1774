"""Which images make up which step."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from massl_fast.data.order import Order


def steps(start: int, count: int, **settings) -> list[np.ndarray]:
    order = Order(**settings)
    found = list(itertools.islice(order.micro_batches(start), count * order.accumulation))
    return [np.concatenate([indices for _, indices in found[n : n + order.accumulation]]) for n in range(0, len(found), order.accumulation)]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 30), st.integers(0, 2**70), st.integers(0, 40))
def test_ranks_share_an_epoch_without_overlap(world_size, accumulation, device_batch, surplus, seed, start):
    batch = world_size * accumulation * device_batch
    common = dict(num_images=batch * 2 + surplus % batch, seed=seed, global_batch=batch)
    ranks = [
        steps(start * 2, 2, **common, device_batch=device_batch, accumulation=accumulation, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    epoch = [np.concatenate([rank[t] for rank in ranks]) for t in range(2)]
    assert len(set(np.concatenate(epoch).tolist())) == 2 * batch
    # Rank order is position order at any world size, with any accumulation.
    alone = steps(start * 2, 2, **common, device_batch=batch)
    for ours, theirs in zip(epoch, alone):
        assert (ours == theirs).all()


def test_seeking_is_going_there():
    settings = dict(num_images=103, seed=4, global_batch=10, device_batch=5, accumulation=2)
    through = steps(0, 45, **settings)
    for start in (1, 9, 10, 11, 37):
        for there, here in zip(through[start:], steps(start, 5, **settings)):
            assert (there == here).all()


def test_epochs_and_seeds_differ_and_cover():
    order = Order(100, seed=1, global_batch=10, device_batch=10)
    permutations = [order.permutation(0), order.permutation(1), Order(100, seed=2, global_batch=10, device_batch=10).permutation(0)]
    for permutation in permutations:
        assert sorted(permutation) == list(range(100))
    for a, b in itertools.combinations(permutations, 2):
        assert (a == b).sum() < 10


def test_every_image_gets_its_turn_though_the_remainder_is_left_out():
    settings = dict(num_images=19, seed=0, global_batch=10, device_batch=10)
    assert Order(**settings).steps_per_epoch == 1
    assert set(np.concatenate(steps(0, 40, **settings)).tolist()) == set(range(19))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(num_images=1, global_batch=256, device_batch=256), "holds 1 image, but one step takes a global batch of 256"),
        (dict(num_images=100, global_batch=128, device_batch=128), "at most 100"),
        (dict(num_images=100, global_batch=12, device_batch=5, accumulation=2), "is not 1 ranks × 2 micro-batches × 5"),
        (dict(num_images=100, global_batch=0, device_batch=0), "at least 1"),
        (dict(num_images=100, global_batch=8, device_batch=4, rank=2, world_size=2), "rank 2 of 2"),
    ],
)
def test_impossible_batches_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Order(seed=0, **settings)
