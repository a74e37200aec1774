"""Named features against the tokens of the network, taken apart by hooks."""

import pytest
import timm
import torch

from massl_fast.models.recipes import default_recipe, features_of

SMALL = dict(patch_size=8, embed_dim=24, depth=5, num_heads=3, dynamic_img_size=True)


def vit(**changes):
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **(SMALL | changes)).eval()


@torch.no_grad()
def tokens_of(network, images):
    """The tokens after each block, [CLS] first, each through the network's final norm."""
    kept = []
    hooks = [block.register_forward_hook(lambda _, __, out: kept.append(network.norm(out))) for block in network.blocks]
    network(images)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (40, 32)])
@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_recipes_are_the_tokens_they_name(shape, registers):
    network = vit(reg_tokens=registers)
    images = torch.randn(3, 3, *shape)
    blocks = tokens_of(network, images)
    cls, patches = blocks[-1][:, 0], blocks[-1][:, 1 + registers :]
    gem = patches.clamp(min=1e-6).double().pow(4).mean(1).pow(0.25).float()
    expected = {
        "cls": cls,
        "cls4": torch.cat([block[:, 0] for block in blocks[-4:]], 1),
        "mean": patches.mean(1),
        "cls+mean": torch.cat([cls, patches.mean(1)], 1),
        "cls+gem4": torch.cat([cls, gem], 1),
        "patches": patches,
        "pooled": network(images),
    }
    assert patches.shape[1] == shape[0] * shape[1] // 64
    for recipe, features in expected.items():
        torch.testing.assert_close(features_of(network, images, recipe), features, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_class_token_is_the_pooled_output_bit_for_bit():
    network, images = vit(), torch.randn(2, 3, 16, 16)
    assert default_recipe(network) == "cls" and torch.equal(features_of(network, images, "cls"), network(images))


def test_a_rotary_network_gives_its_tokens():
    network = timm.create_model("vit_base_patch16_rope_reg1_gap_256", num_classes=0, img_size=32, patch_size=16, depth=2)
    assert default_recipe(network) == "pooled"
    with pytest.raises(ValueError, match="need a class token"):
        features_of(network, torch.zeros(1, 3, 32, 32), "cls")


@pytest.mark.parametrize(
    ("network", "recipe", "message"),
    [
        (lambda: timm.create_model("resnet18", num_classes=0), "cls", "made of a transformer's tokens, and ResNet has none"),
        (lambda: vit(depth=2), "cls4", "need 4 blocks, and this VisionTransformer has 2"),
        (lambda: vit(global_pool="avg"), "patches", "norm after pooling"),
        (lambda: vit(global_pool="avg", class_token=False, fc_norm=False), "cls+mean", "need a class token"),
        (vit, "cls5", "no features named 'cls5'. Choose one of cls, cls4"),
    ],
)
def test_features_that_a_network_lacks_are_a_sentence(network, recipe, message):
    with pytest.raises(ValueError, match=message):
        features_of(network(), torch.zeros(1, 3, 16, 16), recipe)
