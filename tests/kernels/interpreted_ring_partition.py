"""Cases of the ring's and the partition's kernels that test_fused_interpreted.py runs where Triton interprets them on the CPU."""

import pytest
import torch

from massl_fast.kernels import enqueue_, partition_indices, partition_kernel, ring_kernel
from massl_fast.kernels.ring import EPS

CPU = torch.device("cpu")


KEYS = [(0, 0), (5, 9), (-1, 2**31), (2**33 + 1, 2**40 + 3), (2**63 + 7, -9)]


@pytest.mark.parametrize(("entries", "seed", "step"), [(n, 5, 9) for n in (1, 2, 3, 255, 256, 1000)] + [(257, *key) for key in KEYS])
def test_partition_bit_for_bit(entries, seed, step):
    expected = partition_indices(entries, seed=seed, step=step, device=CPU)
    found = partition_kernel.partition_indices(entries, seed, step, CPU)
    assert found.dtype == torch.int32 and torch.equal(found, expected)


@pytest.mark.parametrize("step", [0, 7, 2**32 - 1, 2**40 + 3, -9])
def test_partition_of_a_step_on_the_device(step):
    expected = partition_indices(300, seed=11, step=step, device=CPU)
    assert torch.equal(partition_kernel.partition_indices(300, 11, torch.tensor(step), CPU), expected)


def both_rings(memory, pointer, rows, enabled=None):
    """Memory and pointer after the kernel and after its twin."""
    ours, theirs = (memory.clone(), pointer.clone()), (memory.clone(), pointer.clone())
    ring_kernel.enqueue_(*ours, rows, EPS, enabled)
    enqueue_(*theirs, rows, enabled=enabled)
    return ours, theirs


def check_equal(ours, theirs):
    """Equal pointers; rows equal up to one rounding, as the sums of squares run in another order; untouched ones bit for bit."""
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True, rtol=torch.finfo(ours[0].dtype).eps * 2, atol=1e-7)
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ring_dtypes_and_the_end(memory_dtype, rows_dtype):
    generator = torch.Generator().manual_seed(0)
    memory = torch.full((7, 24), torch.nan, dtype=memory_dtype)
    rows = (40 * torch.randn(4, 24, generator=generator)).to(rows_dtype)
    ours, theirs = both_rings(memory, torch.tensor([5]), rows)
    check_equal(ours, theirs)
    assert ours[0][2:5].isnan().all() and not ours[0][[5, 6, 0, 1]].isnan().any() and ours[1].item() == 2


@pytest.mark.parametrize(("entries", "count", "width", "start"), [(1, 1, 3, 0), (5, 5, 16, 3), (9, 1, 33, 8), (6, 2, 1, 1)])
def test_ring_shapes(entries, count, width, start):
    generator = torch.Generator().manual_seed(1)
    memory, rows = torch.randn(entries, width, generator=generator), torch.randn(count, width, generator=generator)
    check_equal(*both_rings(memory, torch.tensor([start]), rows))


@pytest.mark.parametrize("enabled", [torch.tensor(True), torch.tensor([True]), torch.tensor(False), torch.tensor([False])])
def test_ring_held_still(enabled):
    memory, rows = torch.randn(6, 8), torch.randn(4, 8)
    ours, theirs = both_rings(memory, torch.tensor([4]), rows, enabled)
    check_equal(ours, theirs)
    if not enabled.item():
        assert torch.equal(ours[0], memory) and ours[1].item() == 4
        ring_kernel.enqueue_(*ours, torch.full((4, 8), torch.nan), EPS, enabled)
        assert torch.equal(ours[0], memory) and ours[1].item() == 4


def test_ring_a_row_of_zeros_strided_rows_and_a_memory_inside_a_larger_one():
    whole = torch.randn(6, 10)
    before, pointer = whole.clone(), torch.tensor([1])
    rows = torch.cat((torch.randn(3, 8), torch.zeros(1, 8)))
    ring_kernel.enqueue_(whole[:, :8], pointer, rows.T.contiguous().T, EPS, None)
    expected, expected_pointer = before[:, :8].clone(), torch.tensor([1])
    enqueue_(expected, expected_pointer, rows)
    check_equal((whole[:, :8], pointer), (expected, expected_pointer))
    assert torch.equal(whole[:, 8:], before[:, 8:]), "columns beyond the memory's own were written"


def test_ring_a_row_that_holds_nan_becomes_nan():
    """All of it, as in the twin: a row that is NaN here and huge there would be a valid-looking entry of the memory."""
    rows = torch.randn(3, 8)
    rows[1, 2] = torch.nan
    check_equal(*both_rings(torch.zeros(5, 8), torch.tensor([0]), rows))
