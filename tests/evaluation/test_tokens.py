import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from massl_fast.evaluation.images import LongerSide, SizedImages, Square, files_below
from massl_fast.evaluation.store import FeatureStore
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.tokens import cut_to_patches, demand_finite, patch_colours, patch_side, patch_tokens, tokens_of, vectors_of
from massl_fast.models.backbone import build_backbone

SMALL = dict(embed_dim=24, depth=2, num_heads=3)


def network(arch="vit_tiny_patch16_224", size=32, **arguments):
    torch.manual_seed(0)
    return build_backbone(arch, image_size=size, model_args={**SMALL, "patch_size": 8, **arguments}).eval()


def subject_of(*networks, **changes):
    named = {f"network {i}": net for i, net in enumerate(networks)}
    return Subject(named, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, device=torch.device("cpu"), **changes)


@pytest.mark.parametrize(
    "extra", [{}, {"reg_tokens": 4}, {"patch_size": 4}, {"class_token": False, "global_pool": "avg", "fc_norm": False}]
)
def test_tokens_are_those_after_the_final_norm_at_any_size(extra):
    net = network(**extra)
    patch = extra.get("patch_size", 8)
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        found = patch_tokens(net, images, patch)
        expected = net.forward_features(images)[:, net.num_prefix_tokens :]
    assert found.shape == (2, 40 // patch, 24 // patch, 24)
    torch.testing.assert_close(found.flatten(1, 2), expected)


def test_networks_without_patch_tokens_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="needs a vision transformer's patch tokens, which ResNet"):
        patch_side(subject_of(build_backbone("resnet10t", image_size=32)))
    assert patch_side(subject_of(network())) == 8
    with pytest.raises(ValueError, match="patches of 4 and 8 px"):
        patch_side(subject_of(network(), network(patch_size=4)))


def test_a_network_of_one_size_says_so(tmp_path):
    net = network(dynamic_img_size=False)
    with pytest.raises(ValueError, match=r"does not take images of 40 × 24 px .*--image-size"):
        patch_tokens(net, torch.randn(1, 3, 24, 40), 8)


def test_what_fills_no_patch_is_dropped_and_slivers_are_enlarged():
    images = torch.arange(3 * 21 * 30.0).view(1, 3, 21, 30)
    assert torch.equal(cut_to_patches(images, 8), images[..., :16, :24])
    assert cut_to_patches(torch.ones(1, 3, 3, 20), 8).shape == (1, 3, 8, 16)
    assert cut_to_patches(images, None) is images


def test_colours_are_mean_and_deviation_of_each_patch():
    pixels = torch.rand(2, 3, 16, 24)
    found = patch_colours(pixels, 8)
    part = pixels[1, :, 8:16, 16:24].flatten(1)
    torch.testing.assert_close(found[1, 1, 2], torch.cat([part.mean(1), part.std(1, unbiased=False)]))


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for name, shape in {"a.png": (33, 47), "b.png": (47, 33), "c.png": (33, 47)}.items():
        Image.fromarray(generator.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    return files_below(tmp_path, ["a.png", "broken.png", "b.png", "c.png"])


def test_vectors_are_by_position_whatever_the_batches(photos):
    net = network()
    subject = subject_of(net)
    vectors, positions = vectors_of(subject, SizedImages(photos, LongerSide(40)), "cls")
    assert positions == [0, 2, 3] and set(vectors) == {"network 0", "raw pixels"}
    one_by_one, _ = vectors_of(subject_of(net, batch_size=1), SizedImages(photos, LongerSide(40)), "cls")
    torch.testing.assert_close(vectors["network 0"], one_by_one["network 0"])


def test_scales_are_averaged_before_any_normalisation(photos):
    net = network()
    images = SizedImages(photos, LongerSide(40))
    found, _ = vectors_of(subject_of(net), images, "cls", scales=(1.0, 0.5))
    pixels = images[0][1][None].float() / 255 * 4 - 2
    half = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = sum(net(cut_to_patches(scaled, 8)) for scaled in (pixels, half)) / 2
    torch.testing.assert_close(found["network 0"][:1], expected)


def test_evaluation_leaves_mode_autocast_and_random_state_as_they_were(photos):
    net = network().train()
    state = torch.random.get_rng_state()
    walk = tokens_of(subject_of(net, precision="bf16"), SizedImages(photos, LongerSide(40)))
    next(walk)
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert len(list(walk)) == 2
    assert net.training and all(module.training for module in net.modules())
    assert torch.equal(state, torch.random.get_rng_state())


def test_overflowed_features_are_told_with_their_network():
    with pytest.raises(ValueError, match=r"of teacher are not finite for 1 of 2 images.*--precision fp32"):
        demand_finite({"teacher": torch.tensor([[1.0, torch.inf], [0, 0]])})


def test_tokens_that_overflow_in_half_precision_end_in_a_sentence(photos):
    net = network()
    with torch.no_grad():
        net.norm.weight.fill_(1e38)
        net.norm.bias.fill_(3e38)
    with pytest.raises(ValueError, match="not finite"):
        list(tokens_of(subject_of(net), SizedImages(photos, LongerSide(40))))


@pytest.mark.parametrize("side", [40, 44, 4])
def test_kept_tokens_are_those_of_a_stream_and_are_made_once(photos, tmp_path, monkeypatch, side):
    net = network()
    streamed = SizedImages(photos, Square(side), positions=[3, 1, 0])
    expected = sorted(tokens_of(subject_of(net), streamed), key=lambda row: row[0])
    subject = subject_of(net, store=FeatureStore(tmp_path / "kept", quiet=True))
    for _ in range(2):
        images = SizedImages(photos, Square(side), positions=[3, 1, 0])
        found = sorted(tokens_of(subject, images), key=lambda row: row[0])
        assert [position for position, _ in found] == [position for position, _ in expected] == [0, 3]
        assert images.names_of_unreadable() == streamed.names_of_unreadable() == ("broken.png",)
        for (_place, kept), (_same, fresh) in zip(found, expected):
            assert kept.keys() == fresh.keys() == {"network 0", "raw pixels"}
            for name, values in fresh.items():
                torch.testing.assert_close(kept[name], values, atol=1e-5, rtol=1e-5)
        monkeypatch.setattr("massl_fast.evaluation.tokens.patch_tokens", None)  # the second time nothing is computed


def test_tokens_of_too_large_a_set_are_not_kept_and_that_is_said(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("massl_fast.evaluation.tokens.MOST_KEPT", 1000)
    subject = subject_of(network(), store=FeatureStore(tmp_path / "kept", quiet=True))
    with pytest.warns(UserWarning, match="are not kept"):
        assert len(list(tokens_of(subject, SizedImages(photos, Square(40))))) == 3
    assert not (tmp_path / "kept").exists()
