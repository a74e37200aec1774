"""Linear layers by oneDNN are PyTorch's to rounding, in all that they are part of, and the choice says why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_packed import make_crops, twins

from massl_fast.models import products
from massl_fast.models.products import OneDnnLinear, choose_products, linear, multiply_by_onednn_

CPU = torch.device("cpu")
HERE = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not HERE, reason="this PyTorch was built without oneDNN")


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def results(function, *tensors):
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@needs_onednn
@pytest.mark.parametrize("rows, width, outputs, bias", [(257, 96, 200, True), (64, 300, 301, False), (1, 2048, 2048, True)])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "a part of the weight"])
def test_values_and_gradients_err_no_more_than_twice_what_blas_errs(rows, width, outputs, bias, layout, monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 0)
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (torch.randn(shape, generator=generator) for shape in ((rows, width), (outputs, width), (outputs,)))
    if layout == "strided":
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    elif layout == "a part of the weight":
        weight = torch.cat([weight, weight])[outputs:]
    offset = offset if bias else None
    exact = results(F.linear, *(None if each is None else each.double() for each in (x, weight, offset)))
    for ours, theirs, truth in zip(results(linear, x, weight, offset), results(F.linear, x, weight, offset), exact):
        assert ours.shape == theirs.shape
        assert error(ours, truth) <= 2 * max(error(theirs, truth), 1e-7)


@needs_onednn
def test_an_encoder_is_the_same_to_rounding(monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 0)
    encoder, _, sizes = twins("plain")
    ours = copy.deepcopy(encoder)
    names = list(ours.state_dict())
    multiply_by_onednn_(ours)
    assert list(ours.state_dict()) == names and isinstance(ours.backbone.blocks[0].attn.qkv, OneDnnLinear)
    crops = make_crops(sizes)
    found, calls, product = [], [], products._product
    monkeypatch.setattr(products, "_product", lambda *tensors: calls.append(1) or product(*tensors))
    for each in (encoder, ours):
        values = each(crops)
        (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
        found.append(torch.cat([values.detach().flatten(), *(parameter.grad.flatten() for parameter in each.parameters())]))
    # A whole block (4 layers), the last block (5 products, queries apart from keys and values), the head; and their gradients.
    assert len(calls) >= 2 * (4 + 5 + 3) and error(found[1], found[0].double()) < 1e-5


@needs_onednn
def test_what_is_not_its_business_is_pytorchs(monkeypatch):
    monkeypatch.setattr(products, "_product", lambda *arguments: pytest.fail("oneDNN was called"))
    layer = OneDnnLinear(512, 512)
    layer(torch.randn(2, 512))  # too small
    layer(torch.randn(64, 3, 512))  # evaluations
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(64, 512))
    layer.double()(torch.randn(64, 512, dtype=torch.float64))


@pytest.mark.parametrize(
    "asked, device, precision, capability, vendor, taken, sentence",
    [
        ("auto", "cpu", "fp32", "AVX512", "AuthenticAMD", True, "the processor has AVX-512 and is made by AMD"),
        ("auto", "cpu", "fp32", "AVX512", "GenuineIntel", False, "MKL is made for Intel's processors"),
        ("auto", "cpu", "fp32", "AVX2", "AuthenticAMD", False, "the processor has no AVX-512"),
        ("auto", "cpu", "bf16", "AVX512", "AuthenticAMD", False, "steps in fp32 on a CPU"),
        ("auto", "cuda", "fp32", "AVX512", "AuthenticAMD", False, "steps in fp32 on a CPU"),
        ("blas", "cpu", "fp32", "AVX512", "AuthenticAMD", False, "as set"),
        ("onednn", "cpu", "fp32", "AVX2", "GenuineIntel", True, "as set"),
    ],
)
@needs_onednn
def test_which_library_and_why(asked, device, precision, capability, vendor, taken, sentence, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "processor_vendor", lambda: vendor)
    found, reason = choose_products(asked, torch.device(device), precision)
    assert found is taken and sentence in reason


def test_asking_for_what_cannot_be_is_a_sentence():
    with pytest.raises(ValueError, match=r"train.cpu_products is onednn, but .* Choose auto"):
        choose_products("onednn", CPU, "bf16")
