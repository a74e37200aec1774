"""Recomputing instead of keeping: the same gradients to the last bit, less memory, no matrix product twice."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from small_encoders import with_head

SMALL = {"depth": 3, "embed_dim": 32, "num_heads": 2}
VARIANTS = {
    "plain": ("vit_tiny_patch16_224", SMALL),
    "layer_scale": ("vit_small_patch14_reg4_dinov2", SMALL),
    "swiglu": ("vit_giant_patch14_dinov2", SMALL),
    "average_pool": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "class_token": False}),
    "norms_everywhere": ("vit_tiny_patch16_224", {**SMALL, "scale_attn_norm": True, "scale_mlp_norm": True, "qk_norm": True}),
    "dropout": ("vit_tiny_patch16_224", {**SMALL, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}),
}


def encoders(variant: str, *recompute: str) -> list[Encoder]:
    arch, arguments = VARIANTS[variant]
    torch.manual_seed(0)
    backbone = build_backbone(arch, image_size=56, other_sizes=[28], drop_path=0.3, model_args={**arguments, "patch_size": 14})
    head = ProjectionHead(backbone.feature_dim, hidden_dim=16, out_dim=8)
    with torch.no_grad():
        for parameter in [*backbone.parameters(), *head.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))  # nothing starts at zero or near it
    return [Encoder(copy.deepcopy(backbone), copy.deepcopy(head), recompute=choice) for choice in recompute]


def crops() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 3, side, side, generator=generator) for side in (56, 56, 28, 28)]


class Products(TorchDispatchMode):
    """Counts matrix products and attentions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu")
        return func(*args, **kwargs or {})


def backward(encoder: Encoder, autocast: bool = False) -> None:
    encoder.zero_grad()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        embeddings = encoder(crops())
    (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()


def count_products(encoder: Encoder) -> int:
    with Products() as products:
        backward(encoder)
    return products.count


def kept_bytes(encoder: Encoder) -> int:
    """What a forward pass allocates and does not free."""
    images = crops()
    encoder(images)  # position embeddings are resampled once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        embeddings = encoder(images)
    del embeddings
    return sum(event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_a_pass_that_keeps_everything(variant, autocast):
    plain, pointwise, blocks = encoders(variant, "nothing", "pointwise", "blocks")
    for encoder in (plain, pointwise, blocks):
        backward(encoder, autocast)
    assert plain.backbone.blocks[0].mlp.fc1.weight.grad.norm().item() > 0.01
    for name, parameter in plain.named_parameters():
        for encoder in (pointwise, blocks):
            assert torch.equal(encoder.get_parameter(name).grad, parameter.grad), name


def test_pointwise_repeats_no_product_and_keeps_less():
    plain, pointwise = encoders("plain", "nothing", "pointwise")
    assert count_products(pointwise) == count_products(plain) > 0
    assert 0 < kept_bytes(pointwise) < 0.8 * kept_bytes(plain)


def test_compiled_blocks_keep_less_as_well():
    torch._dynamo.reset()
    eager, plain, pointwise = encoders("plain", "nothing", "nothing", "pointwise")
    for encoder in (plain, pointwise):
        encoder.compile_blocks(fullgraph=True, backend="aot_eager_decomp_partition")
    for encoder in (eager, plain, pointwise):
        backward(encoder)
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(pointwise.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert 0 < kept_bytes(pointwise) < 0.8 * kept_bytes(plain)
    torch._dynamo.reset()


def test_evaluation_recomputes_nothing():
    (encoder,) = encoders("plain", "pointwise")
    with torch.no_grad():
        expected = encoder.eval()(crops())
    assert torch.equal(encoder(crops()), expected)


def test_a_separate_pass_recomputes_blocks_or_says_why_not():
    backbone = build_backbone("vit_tiny_patch16_224", image_size=32, model_args=SMALL)
    assert with_head(backbone, crops_pass="separate", recompute="blocks").backbone.grad_checkpointing
    with pytest.raises(ValueError, match=r"model\.recompute is pointwise, which needs the packed pass"):
        with_head(backbone, crops_pass="separate", recompute="pointwise")
    with pytest.raises(ValueError, match="can be nothing, pointwise or blocks"):
        with_head(backbone, recompute="everything")
