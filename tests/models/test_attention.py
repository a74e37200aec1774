import pytest
import timm
import torch

from massl_fast.models.attention import class_token_attention, similarity_to_mean

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)


def seen_by_dropout(network, images):
    """The weights that the network's own unfused attention hands to its dropout: [N, heads, tokens, tokens]."""
    attention = network.blocks[-1].attn
    attention.fused_attn = False
    seen = []
    hook = attention.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    network.forward_features(images)
    hook.remove()
    attention.fused_attn = True
    return seen[0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"reg_tokens": 4}, {"qk_norm": True}, {"dynamic_img_size": True}, {"no_embed_class": True, "reg_tokens": 1}],
    ids=str,
)
def test_equals_the_weights_of_unfused_attention(changes):
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", **SMALL, **changes).eval()
    with torch.no_grad():
        network.blocks[-1].attn.qkv.weight.mul_(30)  # far from uniform
    height, width = (40, 24) if "dynamic_img_size" in changes else (32, 32)
    images = torch.randn(2, 3, height, width)
    maps = class_token_attention(network, images)
    assert maps.shape == (2, 3, height // 8, width // 8) and maps.std() > 0.01
    with torch.no_grad():
        expected = seen_by_dropout(network, images)[:, :, 0, network.num_prefix_tokens :]
    torch.testing.assert_close(maps.flatten(2), expected)


def test_leaves_no_hook_behind():
    network = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    class_token_attention(network, torch.randn(1, 3, 32, 32))
    with pytest.raises(AssertionError):
        class_token_attention(network, torch.randn(1, 3, 33, 32))
    assert not network.blocks[-1].attn.qkv._forward_hooks


@pytest.mark.parametrize(
    ("architecture", "arguments", "sentence"),
    [
        ("resnet18", {}, "ResNet does not end in a transformer block"),
        ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}, "pools its patches and has no"),
        ("eva02_tiny_patch14_224", {"num_classes": 0, "depth": 1, "embed_dim": 48, "num_heads": 3}, "RoPE|keeps its queries"),
        ("beit_base_patch16_224", {"num_classes": 0, "depth": 1, "embed_dim": 48, "num_heads": 3}, "keeps its queries and keys to itself"),
    ],
)
def test_networks_without_such_maps_say_why(architecture, arguments, sentence):
    network = timm.create_model(architecture, **arguments).eval()
    with pytest.raises(ValueError, match=sentence):
        class_token_attention(network, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("architecture", "arguments", "grid"),
    [("resnet10t", {"num_classes": 0}, (4, 3)), ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}, (4, 4))],
)
def test_similarities_are_cosines_with_the_mean_of_the_places(architecture, arguments, grid):
    network = timm.create_model(architecture, **arguments).eval()
    size = (128, 96) if architecture.startswith("resnet") else (32, 32)
    images = torch.randn(2, 3, *size)
    maps = similarity_to_mean(network, images)
    assert maps.shape == (2, 1, *grid)
    with torch.no_grad():
        features = network.forward_features(images)
    places = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
    unit = torch.nn.functional.normalize
    expected = unit(places, dim=-1) @ unit(places.mean(1), dim=-1)[..., None]
    torch.testing.assert_close(maps.flatten(1), expected[..., 0], rtol=1e-5, atol=1e-5)


def test_a_map_of_few_places_and_a_network_without_one_say_why():
    with pytest.raises(ValueError, match="1 × 1 places for images of 32 pixels"):
        similarity_to_mean(timm.create_model("resnet10t", num_classes=0).eval(), torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no features per place"):
        similarity_to_mean(torch.nn.Flatten(), torch.randn(1, 3, 32, 32))
