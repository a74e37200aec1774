import pytest
import torch

from massl_fast.distributed.integrity import checksum, find_drift
from massl_fast.distributed.world import World


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 16), ()])
def test_a_single_bit_shows(dtype, shape):
    tensor = (torch.randn(shape) * 100).to(dtype)
    assert torch.equal(checksum(tensor), checksum(tensor.clone()))
    for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
        other = tensor.clone()
        other.view(-1).view(torch.uint8)[place * tensor.element_size()] ^= 1
        assert not torch.equal(checksum(tensor), checksum(other))


def test_rows_that_changed_places_show():
    rows = torch.randn(64, 16)
    assert not torch.equal(checksum(rows), checksum(rows.flip(0)))


class Others(World):
    """A world whose other ranks hold what the test says."""

    tables: list

    def gather_rows(self, rows):
        return torch.cat([rows, *[rows + torch.tensor([change]) for change in self.tables]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([[0, 0], [0, 0]], None),
        ([[0, 0], [5, 0]], "rank 2 holds other memory than the rest"),
        ([[0, 1], [0, 1]], "rank 0 holds other weights than the rest"),
        ([[1, 0], [2, 0]], "they hold different memory, and no majority agrees"),
    ],
)
def test_the_rank_that_differs_is_named(changes, sentence):
    world = Others(0, 3, 0, torch.device("cpu"))
    object.__setattr__(world, "tables", changes)
    found = find_drift(world, {"memory": [torch.randn(8, 4), torch.tensor([3])], "weights": [torch.randn(5)]})
    assert found is None if sentence is None else sentence in found
