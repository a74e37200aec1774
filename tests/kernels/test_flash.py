"""The CPU's passes by PyTorch's flash attention: against the loop that they replace, in any division into chunks and parts."""

import pytest
import torch
from problems import unit_rows
from torch._subclasses.fake_tensor import FakeTensorMode

from massl_fast.kernels import flash, memory_readback, memory_readout, partition_indices, streaming


@pytest.fixture
def tried_anew():
    before = flash._TRIED[:]
    flash._TRIED.clear()
    yield
    flash._TRIED[:] = before


def case(rows=70, width=12, entries=230, *, dtype=torch.float32):
    x, memory, values, y = (unit_rows(n, width, seed=n).to(dtype) for n in (rows, entries, entries + 1, rows + 1))
    return x, memory, values[:entries], y[:rows].float(), partition_indices(entries, seed=0, step=0)


def passes(x, memory, values, y, partition, block_size):
    inverse = torch.full((len(x),), 10.0)
    readout, logsumexp = streaming.memory_readout(x, memory, partition, block_size, inverse, values=values, per_block=True)
    weight = torch.linspace(-1, 2, logsumexp.numel()).view(logsumexp.shape)
    bias = torch.linspace(0, 1, len(memory))
    back = streaming.memory_readback(x, memory, logsumexp, partition, block_size, inverse, row_values=y, row_weight=weight, key_bias=bias)
    return readout, logsumexp, back


def test_this_torch_has_the_operator_and_float32_on_a_cpu_takes_it(monkeypatch):
    called = []
    monkeypatch.setattr(
        flash,
        "OPERATOR",
        lambda *args, **kwargs: called.append(1) or torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs),
    )
    x, memory, *_ = case()
    assert flash.obstacle(x) is None
    memory_readout(x, memory, block_size=64, temperature=0.1)
    assert called
    called.clear()
    memory_readout(x.double(), memory.double(), block_size=64, temperature=0.1)
    assert not called and "float64" in flash.obstacle(x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own_values", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, 64, 97, 230])
@pytest.mark.parametrize("shuffled", [False, True])
def test_flash_equals_the_loop(dtype, own_values, block_size, shuffled, monkeypatch):
    x, memory, values, y, partition = case(dtype=dtype)
    given = (x, memory, values if own_values else None, y, partition if shuffled else None, block_size)
    found = passes(*given)
    monkeypatch.setattr(flash, "OPERATOR", None)
    torch.testing.assert_close(found, passes(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_division_into_rows_chunks_and_parts_gives_the_same_result(threads, monkeypatch):
    given = case()
    expected = passes(*given, 97)
    monkeypatch.setattr(flash, "MOST_ROWS", 32)
    monkeypatch.setattr(flash, "QUERIES", 16)
    monkeypatch.setattr(flash, "CHUNK", 7)
    monkeypatch.setattr(flash, "PART", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.testing.assert_close(passes(*given, 97), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_give_nothing_back():
    x, memory, _, y, _ = case()
    logsumexp = torch.zeros(70)
    logsumexp[::2] = -torch.inf
    found = memory_readback(x, memory, logsumexp, row_values=y, block_size=230, temperature=0.1)
    torch.testing.assert_close(
        found, memory_readback(x[1::2], memory, logsumexp[1::2], row_values=y[1::2], block_size=230, temperature=0.1)
    )
    none = memory_readback(x, memory, torch.full((70,), -torch.inf), row_values=y, block_size=230, temperature=0.1)
    assert (none == 0).all()


def test_sharp_rows_of_length_300_stay_finite_and_equal(monkeypatch):
    x, memory, values, y, partition = case()
    found = passes(300 * x, memory, values, y, partition, 64)
    assert all(f.isfinite().all() for f in found)
    monkeypatch.setattr(flash, "OPERATOR", None)
    # Logits reach 3000, so that a weight is known to 3000 units in the last place.
    torch.testing.assert_close(found, passes(300 * x, memory, values, y, partition, 64), rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (None, "has no flash attention"),
        (lambda *args, **kwargs: (_ for _ in ()).throw(TypeError("unknown argument scale")), "refuses: unknown argument scale"),
        (lambda q, k, v, *args, **kwargs: (q.clone(), q[..., 0].clone()), "other results"),
    ],
    ids=["missing", "refusing", "wrong"],
)
def test_the_loop_takes_over_where_the_operator_is_missing_refuses_or_errs(operator, words, tried_anew, monkeypatch):
    monkeypatch.setattr(flash, "OPERATOR", operator)
    x, memory, *_ = case()
    assert words in flash.obstacle(x) and words in flash.obstacle(x)
    readout, _ = memory_readout(x, memory, block_size=64, temperature=0.1)
    expected, _ = memory_readout(x, memory, block_size=64, temperature=0.1, backend="reference")
    torch.testing.assert_close(readout, expected)


def test_shapes_alone_prove_nothing(tried_anew):
    with FakeTensorMode():
        assert flash.obstacle(torch.empty(2, 4)) is None
    assert not flash._TRIED
