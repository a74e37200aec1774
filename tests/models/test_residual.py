"""16-bit tokens between the blocks: within twice the error of PyTorch's autocast, fewer bytes, one graph."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead


def encoders(arch="vit_tiny_patch16_224", **arguments) -> tuple[Encoder, Encoder]:
    """The same random network with tokens of 32 and of 16 bits."""
    torch.manual_seed(0)
    arguments = {"patch_size": 8, "depth": 3, "embed_dim": 96, "num_heads": 3} | arguments
    backbone = build_backbone(arch, image_size=64, other_sizes=[32], model_args=arguments)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    head = ProjectionHead(96, hidden_dim=64, out_dim=32)
    return Encoder(backbone, head), Encoder(copy.deepcopy(backbone), copy.deepcopy(head), residual="bf16")


def crops(dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, side, side, generator=generator).to(dtype) for side in (64, 64, 32, 32, 32)]


def results(encoder: Encoder, autocast=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, and all gradients in a row."""
    encoder.zero_grad()
    dtype = next(encoder.parameters()).dtype
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        embeddings = encoder(crops(dtype))
    embeddings = embeddings.to(dtype)
    (embeddings * torch.linspace(-1, 1, embeddings.numel(), dtype=dtype).view_as(embeddings)).sum().backward()
    return embeddings.detach(), torch.cat([p.grad.flatten() for p in encoder.parameters()])


@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.1, "reg_tokens": 2, "qk_norm": True}], ids=["plain", "many parts"])
def test_errs_no_more_than_twice_what_autocast_errs(arguments):
    usual, narrow = encoders(depth=8, **arguments)
    exact = results(copy.deepcopy(usual).double(), autocast=None)
    for name, ours, theirs, truth in zip(("embeddings", "gradients"), results(narrow), results(usual), exact):
        error, allowed = ((found.double() - truth).norm().item() for found in (ours, theirs))
        assert not torch.equal(ours, theirs)
        assert error < 2 * allowed, f"{name}: {error / allowed:.2f} times the error of autocast"


def test_without_autocast_in_that_format_nothing_changes():
    usual, narrow = encoders()
    for ours, theirs in zip(results(narrow, autocast=None), results(usual, autocast=None)):
        assert torch.equal(ours, theirs)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert torch.equal(narrow(crops()), usual(crops()))


class WideBytes(TorchDispatchMode):
    """Bytes of results in float32 as large as all tokens together."""

    tokens = 4 * (2 * 65 + 3 * 17)
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.shape[:1] == (self.tokens,):
                self.total += tensor.numel() * 4
        return out


def test_blocks_make_no_wide_tokens():
    usual, narrow = encoders()
    found = []
    for encoder in (usual, narrow):
        with WideBytes() as counted:
            results(encoder)
        found.append(counted.total)
    # What is left: the tokens as they are embedded, and their gradient.
    assert found[1] <= 4 * WideBytes.tokens * 96 * 4 < found[0]


@pytest.mark.parametrize("recompute", ["pointwise", "blocks"])
def test_recomputed_gradients_are_the_same(recompute):
    _, narrow = encoders()
    again = Encoder(copy.deepcopy(narrow.backbone), copy.deepcopy(narrow.head), residual="bf16", recompute=recompute)
    for ours, theirs in zip(results(again), results(narrow)):
        assert torch.equal(ours, theirs)


def test_compiled_without_a_break():
    _, narrow = encoders()
    compiled = Encoder(copy.deepcopy(narrow.backbone), copy.deepcopy(narrow.head), residual="bf16")
    torch._dynamo.reset()
    compiled.compile_blocks(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled), results(narrow)):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()


def test_a_separate_pass_has_no_such_tokens():
    usual, _ = encoders()
    with pytest.raises(ValueError, match=r"model\.residual is bf16, which needs the packed pass"):
        Encoder(usual.backbone, usual.head, crops_pass="separate", residual="bf16")
    with pytest.raises(ValueError, match="fp32 or bf16"):
        Encoder(usual.backbone, usual.head, residual="fp8")
