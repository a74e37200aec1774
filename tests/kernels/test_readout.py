"""Read-out and read-back with values, biases, groups and sums per block: against their definition in float64, and as public functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import defined_readback, defined_readout, unit_rows, without
from problems import readout_case as case

from massl_fast.kernels import memory_readback, memory_readout

BACKENDS = ["reference", "streaming"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left_out", [(), ("values",), ("key_bias",), ("row_group", "key_group"), ("values", "key_bias")], ids=str)
def test_readout_against_its_definition(backend, left_out):
    arguments = without(case(), *left_out)
    expected, expected_logsumexp = defined_readout(**arguments)
    readout, logsumexp = memory_readout(**arguments, per_block=True, backend=backend)
    torch.testing.assert_close(readout, expected)
    torch.testing.assert_close(logsumexp, expected_logsumexp)
    torch.testing.assert_close(memory_readout(**arguments, backend=backend)[1], expected_logsumexp.sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left_out", [(), ("key_bias",), ("row_group", "key_group"), ("row_values",), ("row_weight",)], ids=str)
def test_readback_against_its_definition(backend, left_out):
    arguments = without(case(), "values")
    for name in left_out:
        arguments.pop(name, None)
    _, logsumexp = defined_readout(**arguments)
    more = dict(row_values=unit_rows(13, 9, seed=5), row_weight=torch.rand(13, 3, dtype=torch.float64) - 0.3)
    more = without(more, *left_out)
    found = memory_readback(**arguments, logsumexp=logsumexp, **more, backend=backend)
    torch.testing.assert_close(found, defined_readback(**arguments, logsumexp=logsumexp, **more))
    left = arguments["partition"][48:].long()
    assert (found[left] == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 20),
    entries=st.integers(1, 60),
    values=st.integers(1, 12),
    block_share=st.floats(0.01, 1.0),
    seed=st.integers(0, 5),
)
def test_streaming_equals_the_reference_at_odd_shapes(rows, width, entries, values, block_share, seed):
    arguments = case(rows, width, entries, values, max(1, int(entries * block_share)), seed=seed)
    expected = memory_readout(**arguments, per_block=True, backend="reference")
    found = memory_readout(**arguments, per_block=True, backend="streaming")
    torch.testing.assert_close(found, expected)
    arguments = without(arguments, "values")
    more = dict(logsumexp=expected[1], row_weight=torch.rand(rows, dtype=torch.float64), row_values=arguments["rows"])
    one, other = (memory_readback(**arguments, **more, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(other, one)


def test_tiles_smaller_than_a_block_and_than_the_rows_change_nothing(monkeypatch):
    arguments = case(rows=150, entries=400, block_size=190)
    expected = defined_readout(**arguments)
    monkeypatch.setattr("massl_fast.kernels.streaming.CPU_TILE", (40, 40 * 64))
    found = memory_readout(**arguments, per_block=True, backend="streaming")
    torch.testing.assert_close(found, expected)
    more = dict(logsumexp=expected[1], row_values=arguments["rows"])
    found = memory_readback(**without(arguments, "values"), **more, backend="streaming")
    torch.testing.assert_close(found, defined_readback(**without(arguments, "values"), **more))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_read_zero_and_give_nothing_back(backend):
    arguments = without(case(), "key_bias")
    arguments["key_group"] = torch.zeros(57, dtype=torch.int32)
    arguments["row_group"] = torch.arange(13, dtype=torch.int32) % 2
    readout, logsumexp = memory_readout(**arguments, per_block=True, backend=backend)
    blind = arguments["row_group"] == 0
    assert (readout[blind] == 0).all() and (logsumexp[blind] == -torch.inf).all()
    assert readout.isfinite().all() and logsumexp[~blind].isfinite().all()
    arguments = without(arguments, "values")
    back = memory_readback(**arguments, logsumexp=logsumexp, backend=backend)
    alone = {name: value[~blind] if name in ("rows", "row_group") else value for name, value in arguments.items()}
    torch.testing.assert_close(back, memory_readback(**alone, logsumexp=logsumexp[~blind], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_entry_of_bias_minus_infinity_is_left_out(backend):
    arguments = without(case(), "row_group", "key_group")
    arguments["key_bias"][::2] = -torch.inf
    readout, logsumexp = memory_readout(**arguments, per_block=True, backend=backend)
    torch.testing.assert_close((readout, logsumexp), defined_readout(**arguments))
    back = memory_readback(**without(arguments, "values"), logsumexp=logsumexp, backend=backend)
    assert (back[::2] == 0).all() and back.isfinite().all()


def test_blocks_of_one_entry_read_out_that_entry():
    arguments = without(case(block_size=1), "row_group", "key_group")
    readout, logsumexp = memory_readout(**arguments, per_block=True, backend="streaming")
    torch.testing.assert_close(readout, arguments["values"].sum(0).expand(13, -1))
    back = memory_readback(**without(arguments, "values"), logsumexp=logsumexp, backend="streaming")
    torch.testing.assert_close(back, torch.full((57,), 13.0, dtype=torch.float64))


def test_readback_is_the_transpose_of_the_readout():
    """⟨u, readout of v⟩ = ⟨readback of u, v⟩."""
    arguments = case()
    u = unit_rows(13, 7, seed=9)
    readout, logsumexp = memory_readout(**arguments, per_block=True, backend="streaming")
    back = memory_readback(**without(arguments, "values"), logsumexp=logsumexp, row_values=u, backend="streaming")
    torch.testing.assert_close((readout * u).sum(), (back * arguments["values"]).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1.0, 300.0])
def test_error_is_at_most_twice_that_of_the_reference_in_the_same_precision(dtype, length):
    arguments = case(40, 32, 500, 24, 120, dtype=dtype)
    arguments["rows"] = (arguments["rows"] * length).to(dtype)
    if length > 1:
        arguments["temperature"] = 1.0
    truth = defined_readout(**arguments)
    more = dict(row_weight=torch.rand(40, dtype=torch.float64), logsumexp=truth[1])
    back_truth = defined_readback(**without(arguments, "values"), row_values=arguments["rows"], **more)
    errors = {}
    for backend in BACKENDS:
        readout, logsumexp = memory_readout(**arguments, per_block=True, backend=backend)
        back = memory_readback(**without(arguments, "values"), row_values=arguments["rows"], **more, backend=backend)
        assert readout.dtype == logsumexp.dtype == back.dtype == torch.float32
        errors[backend] = [float((f.double() - t).abs().max()) for f, t in zip((readout, logsumexp, back), (*truth, back_truth))]
    eps = torch.finfo(torch.float32).eps
    floors = [4 * eps * float(t.abs().max()) for t in (*truth, back_truth)]
    for ours, theirs, floor in zip(errors["streaming"], errors["reference"], floors):
        assert ours <= 2 * theirs + floor


def test_nothing_is_read_before_it_is_written(monkeypatch):
    arguments = case(dtype=torch.float32)
    expected = memory_readout(**arguments, per_block=True)

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    assert all(torch.equal(one, other) for one, other in zip(memory_readout(**arguments, per_block=True), expected))
    assert memory_readback(**without(arguments, "values"), logsumexp=expected[1]).isfinite().all()


def test_results_repeat_bit_for_bit():
    arguments = case(dtype=torch.float32)
    (one, logsumexp), (other, _) = (memory_readout(**arguments, per_block=True) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(*(memory_readback(**without(arguments, "values"), logsumexp=logsumexp) for _ in range(2)))


def test_opcheck():
    a = case(dtype=torch.float32)
    bias = a["key_bias"].float()
    readout = (a["rows"], a["memory"], a["partition"], 16, 0.1, None, 0, 0, None, "streaming")
    extended = (a["values"], bias, a["row_group"], a["key_group"], True, False)
    torch.library.opcheck(torch.ops.massl_fast.memory_readout.default, (*readout, *extended))
    torch.library.opcheck(torch.ops.massl_fast.memory_readout.default, (*readout, None, None, None, None, False, True))
    logsumexp = memory_readout(**a, per_block=True)[1]
    for row_values in (None, a["rows"]):
        back = (a["rows"], a["memory"], logsumexp, *readout[2:], row_values, None, bias, a["row_group"], a["key_group"], False)
        torch.library.opcheck(torch.ops.massl_fast.memory_readback.default, back)


def test_compiles_whole():
    arguments = without(case(dtype=torch.float32), "partition")

    def both(rows, temperature):
        _, logsumexp = memory_readout(**arguments | dict(rows=rows, temperature=temperature), per_block=True, step=3)
        return memory_readback(**without(arguments, "values") | dict(rows=rows, temperature=temperature), logsumexp=logsumexp, step=3)

    torch._dynamo.reset()
    temperature = torch.tensor(0.1)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(arguments["rows"], temperature), both(arguments["rows"], temperature))


def test_rows_of_any_shape_and_strided_entries():
    arguments = case(rows=12)
    expected = memory_readout(**arguments)
    shaped = arguments | dict(rows=arguments["rows"].view(3, 4, 10), row_group=arguments["row_group"].view(3, 4))
    shaped["memory"] = arguments["memory"].T.contiguous().T
    readout, logsumexp = memory_readout(**shaped)
    torch.testing.assert_close((readout.view(12, 7), logsumexp.view(12)), expected)
    per_block = memory_readout(**shaped, per_block=True)[1]
    assert per_block.shape == (3, 4, 3)
    back = memory_readback(**without(shaped, "values"), logsumexp=per_block, row_values=shaped["rows"])
    assert back.shape == (57, 10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(values=torch.zeros(56, 7, dtype=torch.float64)), "values must hold a row for each"),
        (dict(values=torch.zeros(57, 7)), "values must have the memory's dtype"),
        (dict(key_bias=torch.zeros(57, dtype=torch.int64)), "key_bias must be a float tensor"),
        (dict(key_bias=torch.zeros(3)), "for each of the 57 entries"),
        (dict(key_group=None), "go together"),
        (dict(row_group=torch.zeros(12, dtype=torch.int64)), "row_group must be"),
        (dict(key_group=torch.zeros(57)), "key_group must be"),
        (dict(backend="triton"), "cannot run here"),
    ],
)
def test_mistakes_of_a_readout_are_sentences(changes, words):
    with pytest.raises(ValueError, match=words):
        memory_readout(**case() | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(logsumexp=torch.zeros(13)), "one number for each row and block"),
        (dict(logsumexp=torch.zeros(13, 2)), "logsumexp must be a float tensor of shape"),
        (dict(row_weight=torch.zeros(12)), "row_weight must be"),
        (dict(row_values=torch.zeros(12, 4)), "row_values must be"),
    ],
)
def test_mistakes_of_a_readback_are_sentences(changes, words):
    with pytest.raises(ValueError, match=words):
        memory_readback(**without(case(), "values") | dict(logsumexp=torch.zeros(13, 3)) | changes)
