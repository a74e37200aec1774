import copy

import pytest
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

from massl_fast.models import packed
from massl_fast.models.backbone import Encoder, build_backbone
from small_encoders import small_encoder, with_head

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
# name → architecture, arguments, global and local crop
VARIANTS = {
    "plain": ("vit_tiny_patch16_224", SMALL, 64, 32),
    "small": ("vit_small_patch16_224", {"depth": 1}, 32, 16),
    "registers_layer_scale": ("vit_small_patch14_reg4_dinov2", SMALL, 56, 28),
    "layer_scale": ("vit_small_patch14_dinov2", SMALL, 56, 28),
    "packed_swiglu": ("vit_giant_patch14_dinov2", SMALL, 56, 28),
    "query_key_norm": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True, "reg_tokens": 2}, 64, 32),
    "average_pool": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "class_token": False}, 64, 32),
    "average_pool_with_class_token": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "fc_norm": False}, 64, 32),
    "attention_pool": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "map", "class_token": False}, 64, 32),
    "norms_everywhere": (
        "vit_tiny_patch16_224",
        {**SMALL, "pre_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "embed_norm_layer": "layernorm"},
        64,
        32,
    ),
    "no_position": ("vit_tiny_patch16_224", {**SMALL, "pos_embed": "none", "qkv_bias": False, "proj_bias": False}, 64, 32),
    "convolutional_stem": ("vit_tiny_r_s16_p8_224", {**SMALL, "patch_size": 2}, 48, 32),
}


def twins(variant, dtype=torch.float32, drop_path=0.0):
    """The same random network twice, packed and separate; nothing in it is zero, one or small."""
    arch, args, large, small = VARIANTS[variant]
    torch.manual_seed(0)
    backbone = build_backbone(arch, image_size=large, other_sizes=[small], model_args=args, drop_path=drop_path)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder = with_head(backbone, 32, 16).to(dtype)
    twin = copy.deepcopy(encoder)
    separate = Encoder(twin.backbone, twin.head, crops_pass="separate")
    assert encoder.pass_name == "packed", encoder.pass_reason
    return encoder, separate, (large, small)


def make_crops(sizes, dtype=torch.float32):
    large, small = sizes
    crops = [torch.randn(3, 3, large, large, dtype=dtype) for _ in range(2)]
    crops += [torch.randn(3, 3, small, small, dtype=dtype) for _ in range(3)]
    return [crop.contiguous(memory_format=torch.channels_last) for crop in crops]


def loss_of(embeddings):
    """A loss with a different gradient for each number."""
    return (embeddings * torch.sin(torch.arange(embeddings.numel(), dtype=embeddings.dtype)).view_as(embeddings)).sum()


def assert_same(encoder, twin, crops, tolerance):
    values, expected = encoder(crops), twin(crops)
    error = (values - expected).norm() / expected.norm()
    assert error < tolerance, f"values differ by {error:.1e}"
    loss_of(values).backward()
    loss_of(expected).backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    scale = max(gradient.norm() for gradient in gradients.values() if gradient is not None)
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            error = (parameter.grad - gradients[name]).norm()
            # Some gradients are zero but for rounding (a shift of all keys): those are measured against the largest.
            assert error < tolerance * max(gradients[name].norm(), 1e-2 * scale), f"gradient of {name}: {error:.1e}"


def resample_in_own_dtype(posemb, new_size, old_size, num_prefix_tokens, **_):
    """timm's resampling without its detour through float32."""
    if tuple(new_size) == tuple(old_size):
        return posemb
    prefix, grid = posemb[:, :num_prefix_tokens], posemb[:, num_prefix_tokens:]
    grid = grid.reshape(1, *old_size, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_size, mode="bicubic", antialias=True)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_separate_passes_in_float32(variant):
    encoder, separate, sizes = twins(variant)
    assert_same(encoder, separate, make_crops(sizes), 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_separate_passes_in_float64(variant, monkeypatch):
    monkeypatch.setattr(timm_vit, "resample_abs_pos_embed", resample_in_own_dtype)
    encoder, separate, sizes = twins(variant, torch.float64)
    assert_same(encoder, separate, make_crops(sizes, torch.float64), 1e-10)


def test_error_under_autocast_is_that_of_separate_passes():
    encoder, separate, sizes = twins("registers_layer_scale")
    crops = make_crops(sizes)
    exact = separate(crops)
    with torch.autocast("cpu", torch.bfloat16):
        error = (encoder(crops) - exact).norm()
        separate_error = (separate(crops) - exact).norm()
    assert separate_error > 1e-4 * exact.norm()
    assert error < 1.5 * separate_error


sides = st.sampled_from([8, 16, 24, 40])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=5), st.booleans())
def test_any_mixture_of_crops(crops, channels_last):
    torch.manual_seed(0)
    encoder = small_encoder(image_size=24, model_args={**SMALL, "patch_size": 8})
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = [torch.randn(n, 3, height, width).contiguous(memory_format=memory_format) for n, height, width in crops]
    images = [image[:, :, :, :] if channels_last else image.flip(0) for image in images]
    expected = torch.cat([encoder.head(encoder.backbone(image)) for image in images])
    assert torch.allclose(encoder(images), expected, atol=2e-6)


def test_gradient_of_the_images():
    encoder, separate, sizes = twins("plain")
    crops = [crop.requires_grad_() for crop in make_crops(sizes)]
    twin_crops = [crop.detach().clone().requires_grad_() for crop in crops]
    assert_same(encoder, separate, crops, 1e-5)
    loss_of(separate(twin_crops)).backward()
    for crop, twin in zip(crops, twin_crops):
        assert torch.allclose(2 * twin.grad, crop.grad, rtol=1e-3, atol=1e-6)  # both passes of assert_same reached it


def test_a_crop_between_patches_is_named():
    encoder, _, _ = twins("plain")
    with pytest.raises(ValueError, match="crop of 40×40 px is not divisible by the patch, 16×16 px"):
        encoder([torch.randn(1, 3, 40, 40)])


@pytest.mark.parametrize(("old", "new"), [((14, 14), (6, 6)), ((4, 4), (7, 5)), ((3, 5), (2, 9)), ((3, 3), (2, 1))])
def test_resampling_matrix_is_timms_resampling(old, new):
    position = torch.randn(1, 1 + old[0] * old[1], 8)
    expected = timm_vit.resample_abs_pos_embed(position, new_size=new, old_size=old, num_prefix_tokens=1)
    matrix = packed.resampling_matrix(old, new, position.device, position.dtype)
    assert torch.allclose(matrix @ position[:, 1:], expected[:, 1:], atol=1e-6)


def test_positions_follow_the_weights_and_survive_an_evaluation():
    encoder, separate, sizes = twins("plain")
    crops = make_crops(sizes)
    with torch.inference_mode():
        encoder(crops)
    with torch.no_grad():
        for model in (encoder, separate):
            model.backbone.pos_embed.add_(1)
    assert_same(encoder, separate, crops, 1e-5)


class Scaled(nn.Module):
    """In the place of a drop path: known scales, one a crop, batch after batch."""

    def __init__(self, scales):
        super().__init__()
        self.scales = iter(scales)

    def forward(self, branch):
        return branch * next(self.scales)[:, None, None]


@pytest.mark.parametrize("variant", ["plain", "layer_scale", "average_pool", "convolutional_stem"])
def test_drop_path_drops_whole_crops(variant, monkeypatch):
    encoder, separate, sizes = twins(variant, drop_path=0.5)
    crops = make_crops(sizes)
    drawn = torch.rand(4, 15).round() / 0.5
    monkeypatch.setattr(torch, "bernoulli", lambda keep: drawn * keep[:, :1])
    for index, block in enumerate(separate.backbone.blocks):
        block.drop_path1 = Scaled(drawn[2 * index].split([6, 9]))
        block.drop_path2 = Scaled(drawn[2 * index + 1].split([6, 9]))
    assert_same(encoder, separate, crops, 1e-5)


def test_drop_path_statistics_are_timms():
    encoder, _, _ = twins("plain", drop_path=0.4)
    torch.manual_seed(0)
    scales = encoder.packed._drop_path_scales(((3000, 5), (2000, 2)))
    assert scales.shape == (4, 19000, 1)
    large, small = scales[:, :15000].view(4, 3000, 5), scales[:, 15000:].view(4, 2000, 2)
    assert (large == large[:, :, :1]).all() and (small == small[:, :, :1]).all()
    per_crop = torch.cat([large[:, :, 0], small[:, :, 0]], dim=1)
    rates = [0.0, 0.0, 0.4, 0.4]  # timm: linear from 0 to the rate, the same for both branches of a block
    for scale, rate in zip(per_crop, rates):
        assert abs((scale == 0).float().mean().item() - rate) < 0.035  # five standard deviations of 5000 draws
        assert torch.allclose(scale[scale > 0], torch.tensor(1 / (1 - rate)))
    assert abs(torch.corrcoef(per_crop[2:])[0, 1].item()) < 0.07
    crops = make_crops((64, 32))
    assert not torch.equal(encoder(crops), encoder(crops))
    encoder.eval()
    assert torch.equal(encoder(crops), encoder(crops))


def test_nothing_is_added_to_the_state():
    encoder, separate, _ = twins("plain", drop_path=0.4)
    assert list(encoder.state_dict()) == list(separate.state_dict())


def test_activation_checkpointing_changes_nothing():
    encoder, _, sizes = twins("plain", drop_path=0.4)
    twin = copy.deepcopy(encoder)
    encoder.backbone.set_grad_checkpointing(True)
    crops = make_crops(sizes)
    for model in (encoder, twin):
        torch.manual_seed(1)
        loss_of(model(crops)).backward()
    for parameter, expected in zip(encoder.parameters(), twin.parameters()):
        assert torch.equal(parameter.grad, expected.grad)


@pytest.mark.parametrize("whole", [False, True])
def test_compiles_in_one_graph_and_only_once(whole):
    torch._dynamo.reset()
    counters.clear()
    encoder, _, sizes = twins("registers_layer_scale", drop_path=0.4)
    twin = copy.deepcopy(encoder)
    if whole:
        encoder.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    else:
        encoder.compile_blocks(fullgraph=True, backend="aot_eager")
    graphs = []
    for step in range(3):
        crops = make_crops(sizes)
        for model in (encoder, twin):
            torch.manual_seed(step)
            model.zero_grad()
            loss_of(model(crops)).backward()
        for parameter, expected in zip(encoder.parameters(), twin.parameters()):
            assert torch.allclose(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    # By block: one graph for all blocks but the last, which serves the class tokens alone.
    assert graphs == [1 if whole else 2] * 3
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arch", "model_args", "reason"),
    [
        ("deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled is not timm's VisionTransformer"),
        ("vit_base_patch16_xp_224", {}, r"blocks\.0 is a ParallelScalingBlock"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "it drops patches"),
        ("vit_tiny_patch16_224", {"dynamic_img_size": False}, "one image size"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, r"blocks\.0\.attn is a DiffAttention"),
    ],
)
def test_other_networks_fall_back_with_a_reason(arch, model_args, reason):
    backbone = build_backbone(arch, image_size=32, model_args={**SMALL, **model_args})
    supported, why = packed.supports(backbone)
    assert not supported
    encoder = with_head(backbone)
    assert encoder.pass_name == "separate" and encoder.pass_reason == why
    with pytest.raises(ValueError, match=reason):
        Encoder(backbone, encoder.head, crops_pass="packed")


@pytest.mark.parametrize("shapes", [((2, 5), (3, 2)), ((4, 3),)])
def test_gradients_of_split_heads_are_autograds(shapes):
    heads, width, rows = 2, 4, sum(crops * length for crops, length in shapes)
    found = []
    for split in (packed.split_heads, packed._SplitHeads.apply):
        qkv = torch.randn(rows, 3 * heads * width, generator=torch.Generator().manual_seed(0), requires_grad=True)
        pieces = split(qkv, shapes, heads, width)
        assert all(piece.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for piece in pieces)
        sum(
            (piece * torch.cos(torch.arange(piece.numel()) * (1 + number)).view_as(piece)).sum() for number, piece in enumerate(pieces)
        ).backward()
        found.append(qkv.grad)
    assert torch.equal(*found) and found[0].abs().min() > 0
