"""The keyed partition: a bijection for every size, and for our use as good as torch.randperm."""

import pytest
import torch

from massl_fast.kernels import partition_indices

# Seeds are fixed, so these tests never flicker; the level is that of each single test, two-sided.
LEVEL_SIGMAS = 4.5  # 7e-6


@pytest.mark.parametrize("entries", [1, 2, 3, 7, 64, 100, 1000, 4097, 65536, 131072])
def test_a_permutation_at_any_size(entries):
    partition = partition_indices(entries, seed=1, step=2)
    assert partition.dtype == torch.int32
    assert torch.equal(partition.long().sort().values, torch.arange(entries))


def test_seed_and_step_decide_alone():
    one = partition_indices(4096, seed=5, step=9)
    assert torch.equal(one, partition_indices(4096, seed=5, step=9))
    assert torch.equal(one, partition_indices(4096, seed=5, step=torch.tensor(9)))
    assert not torch.equal(one, partition_indices(4096, seed=5, step=10))
    assert not torch.equal(one, partition_indices(4096, seed=6, step=9))
    assert not torch.equal(partition_indices(4096, seed=2**33, step=0), partition_indices(4096, seed=0, step=0))


def blocks_of_entries(entries: int, blocks: int, steps: int) -> torch.Tensor:
    """[steps, entries]: the block each entry falls into."""
    size = entries // blocks
    found = torch.empty(steps, entries, dtype=torch.int64)
    for step in range(steps):
        found[step, partition_indices(entries, seed=11, step=step).long()] = torch.arange(entries) // size
    return found


def chi_squared_sigmas(counts: torch.Tensor, expected: float) -> float:
    """How far the sum over cells lies from its mean, in standard deviations (cells of a row sum to a constant)."""
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = counts.shape[0] * (counts.shape[1] - 1)
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(("entries", "blocks"), [(512, 4), (500, 5)])
def test_blocks_of_an_entry_are_uniform_over_steps(entries, blocks):
    steps = 1000
    found = blocks_of_entries(entries, blocks, steps)
    counts = torch.stack([(found == block).sum(0) for block in range(blocks)], 1).double()  # [entries, blocks]
    # Entries of a block crowd each other out, which lowers the variance by (entries - 1)/entries; far below the level.
    assert abs(chi_squared_sigmas(counts, steps / blocks)) < LEVEL_SIGMAS


def test_pairs_share_a_block_as_often_as_chance_has_it():
    entries, blocks, steps = 512, 4, 1000
    found = blocks_of_entries(entries, blocks, steps)
    rate = (entries // blocks - 1) / (entries - 1)
    sigma = (rate * (1 - rate) / steps) ** 0.5
    for distance in (1, 2, 3, 64, 128, 255):
        together = (found == found.roll(distance, dims=1)).double().mean(0)  # one rate for each entry
        # 512 rates at a time: the mean must fit tightly, none may stray.
        assert (together.mean() - rate).abs() < LEVEL_SIGMAS * sigma / entries**0.5 * 2
        assert (together - rate).abs().max() < 6 * sigma


def test_next_steps_are_independent():
    entries, steps = 1024, 400
    partitions = torch.stack([partition_indices(entries, seed=3, step=step) for step in range(steps)]).double()
    centred = partitions - (entries - 1) / 2
    correlations = (centred[1:] * centred[:-1]).sum(1) / centred[0].square().sum()
    assert correlations.mean().abs() < LEVEL_SIGMAS / (entries * (steps - 1)) ** 0.5
    assert correlations.abs().max() < 6 / entries**0.5


@pytest.mark.parametrize("entries", [0, -1, 2**31])
def test_sizes_that_cannot_be(entries):
    with pytest.raises(ValueError, match="num_entries"):
        partition_indices(entries, seed=0, step=0)
