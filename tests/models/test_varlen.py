"""Attention of all crops in one call: the packed pass through its twin equals a pass per crop size, and the choice says why."""

import pytest
import torch
from test_packed import VARIANTS, assert_same, make_crops, twins

from massl_fast.models import varlen
from massl_fast.models.precision import Precision

CUDA = torch.device("cuda", 0)
BF16 = Precision("bf16", "test")


@pytest.mark.parametrize("variant", ["plain", "registers_layer_scale", "query_key_norm", "attention_pool", "norms_everywhere"])
def test_one_call_equals_separate_passes(variant):
    encoder, separate, sizes = twins(variant, torch.float64 if VARIANTS[variant][2] == 64 else torch.float32)
    dtype = next(encoder.parameters()).dtype
    encoder.packed.varlen = varlen.one_by_one
    # timm resamples position embeddings in float32 whatever their format.
    assert_same(encoder, separate, make_crops(sizes, dtype), 1e-5)


def test_drop_path_recompute_and_compilation_go_with_it():
    encoder, _, sizes = twins("plain", drop_path=0.3)
    encoder.packed.varlen = varlen.one_by_one
    found = []
    for recompute in ("nothing", "pointwise", "blocks"):
        encoder.packed.recompute = recompute
        torch.manual_seed(3)
        encoder.zero_grad()
        values = encoder(make_crops_again(sizes))
        values.square().sum().backward()
        found.append([values.detach(), *(parameter.grad.clone() for parameter in encoder.parameters())])
    encoder.packed.varlen = None
    torch.manual_seed(3)
    encoder.zero_grad()
    values = encoder(make_crops_again(sizes))
    values.square().sum().backward()
    expected = [values.detach(), *(parameter.grad.clone() for parameter in encoder.parameters())]
    for ours in found:
        for one, other in zip(ours, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def make_crops_again(sizes):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, size, size, generator=generator) for size in (sizes[0], sizes[0], sizes[1], sizes[1])]


def test_the_table_is_made_once_and_stays_where_it_is():
    encoder, _, sizes = twins("plain")
    encoder.packed.varlen = varlen.one_by_one
    crops = make_crops(sizes)
    encoder(crops)
    (table,) = encoder.packed._sequences.values()
    assert table.starts.dtype == torch.int32 and table.starts.tolist() == [0, *torch.tensor([17] * 6 + [5] * 9).cumsum(0).tolist()]
    assert table.counts.tolist() == list(range(16)) and table.longest == 17
    encoder(crops)
    assert [id(each.starts) for each in encoder.packed._sequences.values()] == [id(table.starts)]


def choice(asked="auto", device=CUDA, precision=BF16, heads=3, width=64, dropout=False):
    return varlen.choose_attention(asked, device, precision, heads=heads, width=width, dropout=dropout)


@pytest.mark.parametrize(
    "options, capability, sentence",
    [
        ({"device": torch.device("cpu")}, None, "runs on NVIDIA GPUs only"),
        ({}, (7, 0), "needs compute capability 8.0 or newer, and this is 7.0"),
        ({"precision": Precision("fp32", "test")}, (9, 0), "this step is in fp32"),
        ({"dropout": True}, (9, 0), "knows no dropout"),
        ({"width": 36}, (9, 0), "these have 36"),
    ],
)
def test_where_it_cannot_be_had_the_reason_is_told(options, capability, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    function, reason = choice(**options)
    assert function is None and sentence in reason
    with pytest.raises(ValueError, match=f"model.attention is varlen, but .*{sentence}.* Choose auto or per_size"):
        choice("varlen", **options)
    assert choice("per_size", **options) == (None, "as set")


def test_an_older_pytorch_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(__import__("sys").modules, "torch.nn.attention.varlen", None)
    function, reason = choice()
    assert function is None and "has no torch.nn.attention.varlen" in reason


def trial(function):
    return varlen.trial(function, torch.device("cpu"), torch.bfloat16, 2, 16)


def test_what_does_not_run_or_gives_something_else_is_not_taken():
    assert trial(varlen.one_by_one) == ""

    def refusing(*arguments):
        raise RuntimeError("no kernel image\nmore")

    assert "does not run here: no kernel image" in trial(refusing)
    assert "gives results here" in trial(lambda *arguments: 1.05 * varlen.one_by_one(*arguments))

    def without_gradient_of_keys(query, key, *others):
        return varlen.one_by_one(query, key.detach() + 0 * key, *others)

    assert "gives gradients here" in trial(without_gradient_of_keys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: varlen_attn has no kernel for CPUs")
def test_varlen_attn_of_this_gpu():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    function, reason = choice("varlen")
    assert function is not None, reason
    encoder, separate, sizes = twins("small")
    for each in (encoder, separate):
        each.to(CUDA)
    encoder.packed.varlen = function
    crops = [crop.to(CUDA) for crop in make_crops(sizes)]
    with torch.autocast("cuda", torch.bfloat16):
        ours, expected = encoder(crops).float(), separate(crops).float()
    assert (ours - expected).norm() < 0.02 * expected.norm()
