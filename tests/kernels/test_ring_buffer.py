"""The memory as a ring: in place, first in first out, around the end, and still where told to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from massl_fast.kernels import enqueue_


@settings(max_examples=50, deadline=None)
@given(entries=st.integers(1, 40), width=st.integers(1, 9), batches=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_against_a_list(entries, width, batches):
    memory, pointer = torch.zeros(entries, width, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    address, expected, position = memory.data_ptr(), [torch.zeros(width, dtype=torch.float64)] * entries, 0
    for number, count in enumerate(batches):
        rows = torch.randn(min(count, entries), width, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        enqueue_(memory, pointer, rows)
        for row in normalize(rows, dim=-1, eps=1e-6):
            expected[position % entries] = row
            position += 1
    torch.testing.assert_close(memory, torch.stack(expected))
    assert pointer.item() == position % entries and memory.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_normalised_wide_and_cast(dtype):
    memory, pointer = torch.full((8, 16), torch.nan, dtype=dtype), torch.tensor([6])
    rows = 40 * torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0))
    enqueue_(memory, pointer, rows)
    expected = normalize(rows.view(4, 16), dim=-1).to(dtype)
    assert torch.equal(memory[[6, 7, 0, 1]], expected) and pointer.item() == 2
    assert memory[2:6].isnan().all()


def test_a_ring_that_is_held_still():
    memory, pointer = torch.randn(8, 4), torch.tensor([5])
    before = memory.clone()
    enqueue_(memory, pointer, torch.full((4, 4), torch.nan), enabled=torch.tensor(False))
    assert torch.equal(memory, before) and pointer.item() == 5
    enqueue_(memory, pointer, torch.randn(4, 4), enabled=torch.tensor(True))
    assert not torch.equal(memory, before) and pointer.item() == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(memory=torch.zeros(8)), "memory must be"),
        (dict(pointer=torch.zeros(1)), "pointer must be int64"),
        (dict(pointer=torch.zeros(2, dtype=torch.int64)), "pointer must be int64"),
        (dict(rows=torch.zeros(2, 5)), "rows must be"),
        (dict(rows=torch.zeros(9, 4)), "more than the 8 entries"),
        (dict(rows=torch.zeros(2, 4, device="meta")), "one device"),
    ],
)
def test_mistakes_are_sentences(change, words):
    arguments = dict(memory=torch.zeros(8, 4), pointer=torch.zeros(1, dtype=torch.int64), rows=torch.ones(2, 4)) | change
    with pytest.raises(ValueError, match=words):
        enqueue_(**arguments)
