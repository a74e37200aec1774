"""Which configuration a GPU gets and why the kernels cannot run somewhere, with GPUs that are only described."""

from types import SimpleNamespace

import pytest
import torch

from massl_fast.kernels import available_backends, fused

KIB = 1024
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Describe the GPU that PyTorch finds."""

    def describe(major, minor, shared_kib):
        fused._cached_limits.cache_clear()
        found = SimpleNamespace(
            major=major, minor=minor, shared_memory_per_block_optin=shared_kib * KIB, multi_processor_count=100, name="a described GPU"
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)

    monkeypatch.setattr(fused, "INTERPRETING", False)
    yield describe
    fused._cached_limits.cache_clear()


def test_a_gpu_gets_the_table_of_its_class_if_it_has_the_shared_memory_and_the_small_one_else():
    def choice(*capability, shared_kib):
        return fused.configuration(capability, 256, torch.bfloat16, shared_kib * KIB)

    assert choice(8, 0, shared_kib=163) == fused._AMPERE[2][256]
    assert choice(8, 7, shared_kib=163) == fused._AMPERE[2][256]
    assert choice(8, 6, shared_kib=99) == choice(8, 9, shared_kib=99) == choice(12, 0, shared_kib=99) == fused._SMALL[2][256]
    assert choice(9, 0, shared_kib=227) == fused._HOPPER[2][256]
    assert choice(10, 0, shared_kib=227) == fused._BLACKWELL[2][256]
    assert choice(17, 3, shared_kib=500) == fused._SMALL[2][256]
    assert choice(8, 6, shared_kib=64) is None


@pytest.mark.parametrize("width", [1, 16, 32, 33, 100, 256, 300, 512])
def test_any_width_up_to_512_is_taken_in_16_bits(width):
    choice = fused.configuration((9, 0), width, torch.bfloat16, 227 * KIB)
    assert choice is not None and fused.padded_width(width) >= max(16, width)


def test_obstacles_are_sentences(gpu):
    gpu(7, 0, 96)
    assert "compute capability 7.0" in fused.obstacle(GPU, torch.float16)
    assert available_backends(GPU, torch.float16) == ("streaming", "reference")
    gpu(9, 0, 227)
    assert fused.obstacle(GPU, torch.bfloat16, 256) is None
    assert available_backends(GPU, torch.bfloat16) == ("triton", "streaming", "reference")
    assert "600 wide" in fused.obstacle(GPU, torch.bfloat16, 600)
    assert "float64" in fused.obstacle(GPU, torch.float64)
    assert "NVIDIA GPU" in fused.obstacle(torch.device("cpu"), torch.float32)


def test_float32_follows_the_precision_that_products_are_allowed(gpu):
    gpu(9, 0, 227)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert "TF32" in fused.obstacle(GPU, torch.float32, 256)
        torch.set_float32_matmul_precision("high")
        assert fused.obstacle(GPU, torch.float32, 256) is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_choice_is_a_constant_of_compiled_code(gpu):
    gpu(9, 0, 227)

    def chosen(x):
        return x if fused.obstacle(GPU, torch.bfloat16, 256) is not None else x + 1

    torch._dynamo.reset()
    assert torch.equal(torch.compile(chosen, fullgraph=True, backend="eager")(torch.ones(2)), torch.full((2,), 2.0))


def test_pivots():
    assert fused.pivot_variants(torch.bfloat16, 0.1, 0.04) == (True,)
    assert fused.pivot_variants(torch.float32, 0.1, 0.02) == (False,)
    assert fused.pivot_variants(torch.float16, 0.1, 0.04) == (False,)
    assert fused.pivot_variants(torch.bfloat16, torch.tensor(0.1), torch.tensor(0.04)) == (True, False)


@pytest.mark.parametrize("table", [fused._SMALL, fused._AMPERE, fused._HOPPER, fused._BLACKWELL])
def test_neighbours_of_a_choice_are_few_and_possible(table):
    for choices in table.values():
        for width, choice in choices.items():
            tried = fused.neighbours(choice, width)
            assert tried[0] == choice and 3 <= len(tried) <= 10 and len(set(tried)) == len(tried)
            for one in tried:
                sizes = (one.block_rows, one.block_entries, one.warps, width // one.parts)
                assert all(size & (size - 1) == 0 for size in sizes) and one.stages >= 2
