"""Cases of the extended read-out and the read-back that test_fused_interpreted.py runs where Triton interprets kernels on the CPU."""

from dataclasses import replace

import pytest
import torch
from interpreted_fused import bfloat16, poisoned  # noqa: F401  (fixtures)
from problems import defined_readback, defined_readout, unit_rows, without
from problems import readout_case as case

from massl_fast.kernels import fused, memory_readback, memory_readout

EVERYTHING = ("values", "key_bias", "row_group", "key_group")
# What the losses ask for: DINO's and iBOT's student, their teacher, MMC, a whole memory; and everything at once.
READOUTS = [EVERYTHING, ("row_group", "key_group"), ("values", "key_bias"), ("key_bias",), ()]


def check_budget(ours, theirs, true):
    """At most twice the error of the reference in the same precision, or a few roundings of what is summed."""
    assert ours.dtype == torch.float32 and ours.shape == true.shape
    error, allowed = (ours - true).abs().max(), 2 * (theirs - true).abs().max()
    assert error <= allowed + 4 * torch.finfo(torch.float32).eps * true.abs().max(), f"error {error:.3e}, allowed {allowed:.3e}"


def of_dtype(arguments, dtype):
    """Rows, memory and values as ``dtype`` has them, exactly so in the float64 of the truth."""
    return {k: v.to(dtype) if k in ("rows", "memory", "values", "row_values") else v for k, v in arguments.items()}


@pytest.mark.parametrize(("left_out", "dtype"), [*((left, torch.float32) for left in READOUTS), ((), torch.float16)], ids=str)
def test_readout_with_extensions(left_out, dtype):
    # Rows that fill no tile, a remainder, blocks of two tiles less some, widths that are no powers of two.
    arguments = of_dtype(without(case(19, 40, 133, 23, block_size=43), *left_out), dtype)
    true = defined_readout(**arguments)
    theirs = memory_readout(**arguments, per_block=True, backend="reference")
    ours = memory_readout(**arguments, per_block=True, backend="triton")
    for parts in zip(ours, theirs, true):
        check_budget(*parts)
    readout, logsumexp = memory_readout(**arguments, backend="triton")
    assert torch.equal(readout, ours[0])
    torch.testing.assert_close(logsumexp, ours[1].sum(1))


@pytest.mark.parametrize(
    ("values", "weights", "dtype"),
    [
        (None, None, torch.float32),
        (None, "per row", torch.float32),
        ("rows", "per block", torch.float32),
        ("others", "per row", torch.float32),
        ("rows", "per block", torch.float16),
        ("others", "per row", torch.float16),
    ],
    ids=str,
)
def test_readback(values, weights, dtype):
    arguments = of_dtype(without(case(37, 40, 133, 23, block_size=43), "values"), dtype)
    generator = torch.Generator().manual_seed(8)
    more = {"logsumexp": defined_readout(**arguments)[1]}
    if values is not None:
        more["row_values"] = arguments["rows"] if values == "rows" else torch.randn(37, 23, generator=generator)
    if weights is not None:
        more["row_weight"] = torch.randn(*((37,) if weights == "per row" else (37, 3)), generator=generator)
    theirs = memory_readback(**arguments, **more, backend="reference")
    ours = memory_readback(**arguments, **more, backend="triton")
    check_budget(ours, theirs, defined_readback(**arguments, **more))
    assert (ours[arguments["partition"][129:].long()] == 0).all()
    if weights is not None:  # a mean over a million rows: float16 would hold none of its weights
        more["row_weight"] = more["row_weight"] * 2**-20
        assert torch.equal(memory_readback(**arguments, **more, backend="triton"), ours * 2**-20)


def test_both_passes_in_bfloat16(bfloat16):  # noqa: F811
    arguments = of_dtype(case(19, 40, 133, 23, block_size=43), bfloat16)
    true = defined_readout(**arguments)
    theirs = memory_readout(**arguments, per_block=True, backend="reference")
    for parts in zip(memory_readout(**arguments, per_block=True, backend="triton"), theirs, true):
        check_budget(*parts)
    arguments = without(arguments, "values") | dict(logsumexp=true[1], row_values=arguments["rows"], row_weight=torch.linspace(-1, 1, 19))
    check_budget(
        memory_readback(**arguments, backend="triton"), memory_readback(**arguments, backend="reference"), defined_readback(**arguments)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_rows_of_length_300_and_of_length_0(temperature):
    """Embeddings need not be of unit length: no pivot but the true maximum is safe."""
    arguments = without(case(21, 24, 100, 24, block_size=33), "values", "key_bias", "row_group", "key_group")
    arguments["rows"] = (300 * arguments["rows"]).float()
    arguments["rows"][3] = 0
    arguments |= dict(memory=arguments["memory"].float(), temperature=temperature)
    true = defined_readout(**arguments)
    ours = memory_readout(**arguments, per_block=True, backend="triton")
    torch.testing.assert_close(ours[0].double(), true[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(ours[1].double(), true[1], rtol=1e-6, atol=1e-5)
    arguments |= dict(logsumexp=true[1], row_values=arguments["rows"])
    found = memory_readback(**arguments, backend="triton")
    torch.testing.assert_close(found.double(), defined_readback(**arguments), rtol=0, atol=0.3 if temperature == 0.1 else 0.03)


def test_rows_that_see_nothing_give_and_get_nothing():
    arguments = of_dtype(without(case(19, 24, 70, 9, block_size=33), "values"), torch.float32)
    arguments["row_group"][:5] = 7
    arguments["key_group"][arguments["partition"][:33].long()] = 7  # the whole first block
    arguments["key_bias"][::3] = -torch.inf
    readout, logsumexp = memory_readout(**arguments, per_block=True, backend="triton")
    assert (logsumexp[:5, 0] == -torch.inf).all() and logsumexp[:, 1].isfinite().all() and readout.isfinite().all()
    expected = memory_readout(**arguments, per_block=True, backend="reference")
    torch.testing.assert_close((readout, logsumexp), expected)
    found = memory_readback(**arguments, logsumexp=logsumexp, backend="triton")
    torch.testing.assert_close(found, memory_readback(**arguments, logsumexp=logsumexp, backend="reference"))
    arguments["row_group"][:], arguments["key_group"][:] = 1, 1
    readout, logsumexp = memory_readout(**arguments, backend="triton")
    assert (readout == 0).all() and (logsumexp == -torch.inf).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row_against_blocks_of_one_entry(rows):
    arguments = of_dtype(without(case(rows, 5, 6, 3, block_size=1), "row_group", "key_group"), torch.float32)
    found = memory_readout(**arguments, per_block=True, backend="triton")
    torch.testing.assert_close(found, memory_readout(**arguments, per_block=True, backend="reference"))
    arguments = without(arguments, "values") | dict(logsumexp=found[1], row_values=arguments["rows"])
    torch.testing.assert_close(memory_readback(**arguments, backend="triton"), arguments["rows"].sum(0).expand(6, 5))


@pytest.mark.parametrize("change", [dict(parts=1), dict(parts=4), dict(load_keys=True), dict(block_rows=32)], ids=str)
def test_every_kind_of_configuration_gives_the_same(monkeypatch, change):
    arguments = of_dtype(case(19, 40, 90, 23, block_size=43), torch.float32)
    expected = memory_readout(**arguments, per_block=True, backend="reference")
    back = without(arguments, "values") | dict(logsumexp=expected[1], row_values=arguments["rows"])
    returned = memory_readback(**back, backend="reference")
    monkeypatch.setattr(fused, "INTERPRETED", replace(fused.INTERPRETED, **change))
    monkeypatch.setattr(fused, "INTERPRETED_SPLITS", 1)
    torch.testing.assert_close(memory_readout(**arguments, per_block=True, backend="triton"), expected)
    torch.testing.assert_close(memory_readback(**back, backend="triton"), returned)


def test_temperatures_and_steps_on_the_device_and_strided_tensors_change_nothing():
    arguments = of_dtype(case(19, 40, 90, 23, block_size=43), torch.float32)
    arguments = without(arguments, "partition") | dict(step=3)
    back = without(arguments, "values") | dict(row_values=unit_rows(19, 7, seed=3), row_weight=torch.rand(19, 2))
    on_device = dict(temperature=torch.tensor(0.1), step=torch.tensor(3))

    def strided(tensors):
        return {k: v.T.contiguous().T if isinstance(v, torch.Tensor) and v.ndim == 2 else v for k, v in tensors.items()}

    expected = memory_readout(**arguments, per_block=True, backend="triton")
    found = memory_readout(**strided(arguments) | on_device, per_block=True, backend="triton")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    returned = memory_readback(**back, logsumexp=expected[1], backend="triton")
    found = memory_readback(**strided(back | {"logsumexp": expected[1]}) | on_device, backend="triton")
    torch.testing.assert_close(found, returned, rtol=1e-5, atol=1e-6)
