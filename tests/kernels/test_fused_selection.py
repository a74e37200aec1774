"""Which configuration a GPU gets and why the kernels cannot run somewhere, with GPUs that are only described."""

from types import SimpleNamespace

import pytest
import torch
from torch.torch_version import TorchVersion
from triton.runtime.errors import OutOfResources

from massl_fast.kernels import available_backends, configurations, fused

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
        return configurations.configuration(capability, 256, torch.bfloat16, shared_kib * KIB)

    assert choice(8, 0, shared_kib=163) == configurations._AMPERE[2][256]
    assert choice(8, 7, shared_kib=163) == configurations._AMPERE[2][256]
    assert choice(8, 6, shared_kib=99) == choice(8, 9, shared_kib=99) == choice(12, 0, shared_kib=99) == configurations._SMALL[2][256]
    assert choice(9, 0, shared_kib=227) == configurations._HOPPER[2][256]
    assert choice(10, 0, shared_kib=227) == configurations._BLACKWELL[2][256]
    assert choice(17, 3, shared_kib=500) == configurations._SMALL[2][256]
    assert choice(8, 6, shared_kib=64) is None


@pytest.mark.parametrize("width", [1, 16, 32, 33, 100, 256, 300, 512])
def test_any_width_up_to_512_is_taken_in_16_bits(width):
    choice = configurations.configuration((9, 0), width, torch.bfloat16, 227 * KIB)
    assert choice is not None and configurations.padded_width(width) >= max(16, width)


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


def test_an_unfenced_triton_is_refused_where_results_differ_and_warned_of_once_where_they_might(gpu, monkeypatch):
    monkeypatch.setattr(fused, "FENCED", False)
    gpu(10, 0, 227)
    sentence = fused.obstacle(GPU, torch.bfloat16, 256)
    assert "compute capability 10.0" in sentence and "3.7.1" in sentence and fused.triton.__version__ in sentence
    gpu(9, 0, 227)
    assert fused.obstacle(GPU, torch.bfloat16, 256) is None
    memory = SimpleNamespace(device=GPU, shape=(4096, 256), dtype=torch.bfloat16)
    inputs, readout = (None, None, memory, None, 32, 0.1, 0.05, fused.Extensions(unit=True)), torch.empty(8, 256)
    fused._warn_of_old_triton.cache_clear()
    with pytest.warns(UserWarning, match="no fence") as warned:
        choices = [fused._choose(inputs, readout, None) for _ in range(3)]
    assert len(warned) == 1 and choices[0] == (configurations._HOPPER[2][256], 100)
    monkeypatch.setattr(fused, "FENCED", True)
    gpu(10, 0, 227)
    assert fused.obstacle(GPU, torch.bfloat16, 256) is None


@pytest.mark.parametrize(("version", "fenced"), [("3.5.1", False), ("3.7.0", False), ("3.7.1", True), ("3.10.0+git1234", True)])
def test_versions_compare_as_numbers(version, fenced):
    assert (TorchVersion(version) >= fused.FENCED_SINCE) is fenced


def test_the_tuner_leaves_out_what_does_not_compile_or_does_not_fit_twice(gpu, monkeypatch):
    gpu(9, 0, 227)
    fixed = configurations._HOPPER[2][256]
    compiled, timed = {}, []

    def launch(*arguments):
        choice = arguments[-2]
        if choice.block_entries == 128:
            raise RuntimeError("PassManager::run failed")
        if choice.stages == 4 and choice.block_rows == 128:
            raise OutOfResources(300_000, 232_448, "shared memory")
        shared = 98_304 if choice.stages * choice.block_entries == 128 else 163_840
        compiled[choice] = SimpleNamespace(n_regs=250, metadata=SimpleNamespace(shared=shared))
        return [compiled[choice]]

    def do_bench(run, **_):
        timed.append(run.args[-2])
        run()
        return 1.0 if timed[-1].block_rows == 64 else 2.0

    monkeypatch.setattr(fused, "launch", launch)
    monkeypatch.setattr(fused.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(fused, "_TUNED", {})
    inputs = (None, None, torch.empty(64, 256, device="meta", dtype=torch.bfloat16), None, 32, 0.1, 0.05, fused.Extensions(unit=True))
    limits = SimpleNamespace(regs_per_multiprocessor=65536, shared_memory_per_multiprocessor=228 * KIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)
    best = fused._tune(inputs, torch.empty(8, 256), None, fixed, 132)
    pairs = {(choice.block_rows, choice.block_entries, choice.stages) for choice in timed if choice.programs == 2}
    assert timed[0] == fixed and pairs == {(64, 32, 4), (64, 64, 2)} and best.block_rows == 64
    assert not any(choice.block_entries == 128 or (choice.stages, choice.block_rows) == (4, 128) for choice in timed)

    monkeypatch.setattr(fused, "launch", lambda *_: (_ for _ in ()).throw(RuntimeError("Triton Error [CUDA]: an illegal memory access")))
    monkeypatch.setattr(fused, "_TUNED", {})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fused._tune(inputs, torch.empty(8, 256), None, fixed, 132)


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


@pytest.mark.parametrize("table", [configurations._SMALL, configurations._AMPERE, configurations._HOPPER, configurations._BLACKWELL])
def test_neighbours_of_a_choice_are_few_and_possible(table):
    for choices in table.values():
        for width, choice in choices.items():
            tried = configurations.neighbours(choice, width)
            assert tried[0] == choice and 3 <= len(tried) <= 12 and len(set(tried)) == len(tried)
            for one in tried:
                sizes = (one.block_rows, one.block_entries, one.warps, width // one.parts)
                assert all(size & (size - 1) == 0 for size in sizes) and one.stages >= 2
