from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from small_encoders import with_head

GOLDEN = Path(__file__).parents[2] / "../shared/golden/trajectory.npz"
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def build(arch="vit_tiny_patch16_224", image_size=32, model_args=None, **kwargs):
    return build_backbone(arch, image_size=image_size, model_args={**SMALL, **(model_args or {})}, **kwargs)


@pytest.mark.parametrize(
    ("arch", "sizes", "kwargs", "sentence"),
    [
        ("vit_smal_patch16_224", (32,), {}, "no architecture named 'vit_smal_patch16_224'. Closest names: vit_small_patch"),
        ("hf-hub:timm/vit_small_patch16_224", (32,), {}, "no architecture named"),
        (
            "vit_tiny_patch16_224",
            (100,),
            {"model_args": {"depth": 1}},
            "crop of 100 px is not divisible by the patch.* 16 px; take 96 or 112",
        ),
        (
            "vit_tiny_patch16_224",
            (32, 24),
            {"model_args": {"depth": 1}},
            "crop of 24 px is not divisible by the patch.* 16 px; take 16 or 32",
        ),
        ("vit_tiny_r_s16_p8_224", (48, 36), {"model_args": {"depth": 1, "patch_size": 2}}, "36 px is not divisible.* 8 px"),
        ("vit_tiny_patch16_224", (32,), {"model_args": {"deph": 3}}, "takes no argument 'deph'"),
        ("vit_tiny_patch16_224", (32,), {"model_args": {"num_heads": 5}}, "cannot build .*divisible by num_heads"),
        ("vit_tiny_patch16_224", (32,), {"model_args": {"pretrained": True}}, "may not hold 'pretrained'"),
        ("vit_tiny_patch16_224", (32, 16), {"model_args": {"depth": 1, "global_pool": ""}}, "instead of one pooled feature"),
        ("levit_128s", (224, 96), {}, "built for crops of 224 px, cannot take crops of 96 px"),
        ("regnetx_002", (32,), {"drop_path": 0.1, "model_args": {"drop_path": 0.1}}, "takes no argument 'drop_path'"),
        ("vgg11", (32,), {"drop_path": 0.1}, "has no drop path"),
    ],
)
def test_what_a_user_can_mend_gets_a_sentence(arch, sizes, kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_backbone(arch, image_size=sizes[0], other_sizes=sizes[1:], **kwargs)


@pytest.mark.parametrize(
    ("arch", "model_args", "size"),
    [
        ("vit_tiny_patch16_224", SMALL, 32),
        ("vit_tiny_r_s16_p8_224", {**SMALL, "patch_size": 2}, 48),
        ("resnet10t", {}, 64),
        ("test_convnext", {}, 64),
    ],
)
def test_timm_args_rebuild_the_backbone(arch, model_args, size):
    backbone = build_backbone(arch, image_size=size, other_sizes=[size // 2], drop_path=0.1, model_args=model_args).eval()
    assert backbone.timm_args["architecture"] == arch
    assert backbone.timm_args["image_size"] == size
    again = timm.create_model(arch, num_classes=0, **backbone.timm_args["model_args"]).eval()
    again.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, size // 2, size // 2)
    assert backbone(images).shape == (2, backbone.feature_dim)
    assert torch.equal(backbone(images), again(images))


def test_building_leaves_the_mode_and_the_weights_alone():
    torch.manual_seed(0)
    backbone = build_backbone("resnet10t", image_size=32)
    assert backbone.training
    assert all(parameter.device.type == "cpu" for parameter in backbone.parameters())
    assert backbone.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("crops_pass", ["packed", "separate"])
def test_embeddings_come_in_the_order_of_the_crops(crops_pass):
    torch.manual_seed(0)
    backbone = build(other_sizes=[16])
    encoder = with_head(backbone, crops_pass=crops_pass)
    assert encoder.pass_name == crops_pass
    crops = [torch.randn(n, 3, side, side) for n, side in [(2, 16), (3, 32), (1, 16), (2, 32)]]
    embeddings = encoder(crops)
    expected = torch.cat([encoder.head(encoder.features(crop)) for crop in crops])
    assert embeddings.shape == (8, 8)
    assert torch.allclose(embeddings, expected, atol=1e-6)


def test_a_convolutional_network_goes_separately_and_says_so():
    backbone = build_backbone("test_convnext", image_size=32)
    head = ProjectionHead(backbone.feature_dim, hidden_dim=16, out_dim=8)
    encoder = Encoder(backbone, head)
    assert encoder.pass_name == "separate"
    assert encoder.pass_reason == "ConvNeXt is not timm's VisionTransformer"
    assert encoder([torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64)]).shape == (4, 8)
    with pytest.raises(ValueError, match=r"packed, which this network does not allow: ConvNeXt"):
        Encoder(backbone, head, crops_pass="packed")
    with pytest.raises(ValueError, match="auto, packed or separate"):
        Encoder(backbone, head, crops_pass="fast")


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden trajectory is not beside this checkout")
def test_names_are_those_of_the_published_code():
    stored = np.load(GOLDEN)
    expected = {key.removeprefix("init/"): stored[key].shape for key in stored.files if key.startswith("init/")}
    args = {name: int(stored[name]) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    backbone = build_backbone("vit_tiny_patch16_224", image_size=int(stored["image_size"]), model_args=args)
    head = ProjectionHead(backbone.feature_dim, hidden_dim=int(stored["head_hidden"]), out_dim=int(stored["head_out"]))
    encoder = Encoder(backbone, head)
    assert {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()} == expected
