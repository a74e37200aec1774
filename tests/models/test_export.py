import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf

from massl_fast.models import export
from massl_fast.models.backbone import build_backbone
from massl_fast.models.published import load_backbone
from small_encoders import small_encoder

SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2}


def write_checkpoint(folder, arch="vit_tiny_patch16_224", model_args=SMALL, size=48):
    torch.manual_seed(0)
    encoder = small_encoder(arch, image_size=size, model_args=model_args)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if any("running_mean" in name for name in encoder.state_dict()):
        encoder([torch.randn(4, 3, size, size)])  # running statistics of batch norms
    folder.mkdir(parents=True)
    save_file({f"teacher/{name}": tensor.clone() for name, tensor in encoder.state_dict().items()}, folder / "state.safetensors")
    state = {"format": 1, "step": 0, "timm_args": encoder.timm_args, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "state.json").write_text(json.dumps(state))
    return encoder.eval()


def run(*arguments):
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return export.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize(
    ("arch", "model_args", "size"),
    [
        ("vit_tiny_patch16_224", SMALL, 48),
        ("vit_tiny_r_s16_p8_224", {**SMALL, "patch_size": 2}, 48),
        ("vit_small_patch14_reg4_dinov2", SMALL, 56),
        ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg", "class_token": False}, 48),
        ("resnet10t", {}, 64),
    ],
)
def test_timm_loads_it_and_gives_the_same_features(tmp_path, capsys, arch, model_args, size):
    encoder = write_checkpoint(tmp_path / "step", arch, model_args, size)
    assert run("--checkpoint", tmp_path / "step", "--to", tmp_path / "out") == 0
    assert f"local-dir:{tmp_path / 'out'}" in capsys.readouterr().out
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    for side in (size, 2 * size):
        images = torch.randn(1, 3, side, side)
        assert torch.allclose(loaded(images), encoder.features(images), rtol=1e-6, atol=1e-6)
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data["input_size"]) == (3, size, size)
    assert tuple(data["mean"]) == (0.1, 0.2, 0.3) and tuple(data["std"]) == (0.4, 0.5, 0.6)

    classifier = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7, drop_path_rate=0.1)
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(classifier.state_dict()[name], tensor)
    assert classifier.eval()(images).shape == (1, 7)

    head = load_file(tmp_path / "out/head/head.safetensors")
    assert head.keys() == encoder.head.state_dict().keys()
    again, info = load_backbone(tmp_path / "out")
    assert torch.equal(again(images), encoder.features(images))
    assert (info["architecture"], info["image_size"], tuple(info["mean"])) == (arch, size, (0.1, 0.2, 0.3))
    assert again.timm_args == encoder.timm_args


@pytest.mark.parametrize(
    ("arch", "size", "pool", "grid"),
    [
        ("vit_tiny_patch16_224", 224, "token", None),
        ("resnet10t", 176, "avg", (6, 6)),
        ("resnet10t", 64, "avg", None),
        ("swin_tiny_patch4_window7_224", 224, "avg", (7, 7)),
    ],
)
def test_the_config_names_pooling_as_timms_own_push_does(tmp_path, arch, size, pool, grid):
    backbone = build_backbone(arch, image_size=size)
    ours = export.timm_config(backbone, {"architecture": arch, "image_size": size, "mean": (0.5,), "std": (0.5,)})
    save_config_for_hf(backbone, str(tmp_path / "config.json"), data_config={"input_size": (3, size, size)})
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert ours["global_pool"] == theirs["global_pool"] == pool
    found, expected = (config["pretrained_cfg"]["pool_size"] for config in (ours, theirs))
    assert (found and tuple(found)) == (expected and tuple(expected)) == grid


def test_nothing_is_overwritten(tmp_path):
    write_checkpoint(tmp_path / "step")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="exists already"):
        run("--checkpoint", tmp_path / "step", "--to", tmp_path / "out")
    assert (tmp_path / "out/thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    assert run("--checkpoint", tmp_path / "step", "--to", tmp_path / "empty") == 0


def test_complete_or_absent(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "step")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not be written"):
        run("--checkpoint", tmp_path / "step", "--to", tmp_path / "file/out")
    with pytest.raises(ValueError, match="There is no checkpoint"):
        run("--checkpoint", tmp_path / "absent", "--to", tmp_path / "out")

    create = timm.create_model

    def other_features(name, **kwargs):
        model = create(name, **kwargs)
        if name.startswith("local-dir:"):
            with torch.no_grad():
                model.norm.bias.add_(1)
        return model

    monkeypatch.setattr(export.timm, "create_model", other_features)
    with pytest.raises(ValueError, match="features differ from ours; nothing was written"):
        run("--checkpoint", tmp_path / "step", "--to", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "step"]
