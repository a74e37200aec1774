"""What can be asked of the operators from outside: their functions, and their operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from massl_fast import kernels
from massl_fast.kernels import flops, reference  # noqa: F401  flops registers the formulas
from massl_fast.kernels.operators import implementation

V, T, N, D, K, BLOCK = 3, 2, 4, 8, 32, 16
OPERATORS = torch.ops.massl_fast


def operations(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, D), dim=-1)


def test_the_function_behind_an_operator_gives_what_the_operator_gives():
    rows, memory, order = unit(5), unit(K), torch.arange(K, dtype=torch.int32)
    arguments = (rows, memory, order, BLOCK, 0.1, None, 0, 0, None, "streaming")
    overload = OPERATORS.memory_readout.default
    for ours, theirs in zip(implementation(overload)(*arguments), overload(*arguments)):
        assert torch.equal(ours, theirs)
    assert implementation(torch.ops.aten.mm.default) is None


def test_operations_of_a_read_out_are_those_of_its_plain_products():
    rows, memory, order = unit(5), unit(K), torch.arange(K, dtype=torch.int32)
    plain = operations(lambda: reference.memory_readout(rows, memory, order, BLOCK, 0.1))
    assert operations(lambda: kernels.memory_readout(rows, memory, block_size=BLOCK, temperature=0.1, partition=order)) == plain
    assert plain == 2 * 2 * 5 * K * D


def test_the_loss_costs_two_products_per_row_and_entries_without_a_block_nothing():
    student, teacher, memory = unit(V, N), unit(T, N), unit(K + 3)
    call = lambda: kernels.memory_cross_entropy(  # noqa: E731
        student, teacher, memory, block_size=BLOCK, student_temp=0.1, teacher_temp=0.05, seed=0, step=0
    )
    assert operations(call) == 4 * D * (V + T) * N * K


@pytest.mark.parametrize("name", ["memory_readback", "prototype_gradient", "partition_consistency", "partition_consistency_gradient"])
def test_every_operator_that_multiplies_has_a_formula(name):
    assert getattr(OPERATORS, name) in flop_registry


def test_triton_makes_carps_tiles_again_where_streaming_keeps_them():
    shapes = [torch.empty(*size, D, device="meta") for size in ((V, N), (T, N), (K,), (K,))]
    row = 2 * D * K * N  # one product of a view's rows with all keys
    pairs = 2 * V * T * N * K
    for backend, first, second in (("streaming", 0, 0), ("triton", V + T, 3)):
        one = flop_registry[OPERATORS.partition_consistency](*shapes, BLOCK, 1e-7, None, 0, 0, None, backend, out_val=None)
        assert one == (V + T + first) * row + pairs
        gradient = flop_registry[OPERATORS.partition_consistency_gradient]
        two = gradient(None, None, *shapes, BLOCK, 1e-7, None, 0, 0, None, backend, True, out_val=None)
        tiles = second or 1
        assert two == tiles * (V + T) * row + (3 if second else 2) * pairs + 2 * V * row
