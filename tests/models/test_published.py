import argparse
from pathlib import Path

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from safetensors.torch import save_file

from massl_fast.models.backbone import build_backbone
from massl_fast.models.checkpoint_files import write_files
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.published import load_backbone, start_from
from small_encoders import small_encoder

ARCH = "vit_tiny_patch16_224"
SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2}


def make_pair(arch=ARCH, image_size=48, model_args=SMALL):
    """A student and a teacher that differ."""
    torch.manual_seed(0)

    def encoder():
        return small_encoder(arch, image_size=image_size, model_args=model_args)

    pair = StudentTeacher(encoder(), encoder())
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    return pair


def write_checkpoint(folder: Path, pair: StudentTeacher, **changes) -> Path:
    folder.mkdir(parents=True)
    tensors = {
        f"{name}/{key}": tensor.clone()
        for name, network in (("student", pair.student), ("teacher", pair.teacher))
        for key, tensor in network.state_dict().items()
    }
    tensors["objective/memory"] = torch.zeros(16, 8)
    state = {"step": 7, "timm_args": pair.student.timm_args, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    write_files(folder, tensors, {**state, **changes})
    return folder


def same_weights(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_own_checkpoints_from_every_door(tmp_path):
    pair = make_pair()
    step = write_checkpoint(tmp_path / "run/checkpoints/step_00000007", pair)
    (tmp_path / "run/checkpoints/last").write_text("step_00000007\n")
    (tmp_path / "run/checkpoints/best").write_text("step_00000007\n")
    for path in (step, tmp_path / "run", tmp_path / "run/checkpoints", tmp_path / "run/checkpoints/best"):
        backbone, info = load_backbone(path)
        assert same_weights(backbone, pair.teacher.backbone) and not backbone.training
    assert info == {
        "architecture": ARCH,
        "image_size": 48,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "path": str(step),
        "notes": [],
        "assumed": [],
    }
    assert backbone.timm_args == pair.student.timm_args
    assert same_weights(load_backbone(step, which="student")[0], pair.student.backbone)
    with pytest.raises(ValueError, match=f"holds a {ARCH}, not a resnet18"):
        load_backbone(step, arch="resnet18")
    with pytest.raises(ValueError, match="a teacher and a student, no 'best'"):
        load_backbone(step, which="best")


def test_a_convolutional_network_comes_back_with_its_statistics(tmp_path):
    pair = make_pair("resnet10t", 64, {})
    pair.student([torch.randn(4, 3, 64, 64)])
    write_checkpoint(tmp_path / "step", pair)
    assert same_weights(load_backbone(tmp_path / "step", which="student")[0], pair.student.backbone)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"timm_args": None}, "does not say architecture, model_args and image_size"),
        ({"timm_args": {"architecture": ARCH, "model_args": {}, "image_size": "48"}}, "does not say architecture"),
        ({"timm_args": {"architecture": "hf-hub:timm/vit", "model_args": {}, "image_size": 48}}, "no architecture named"),
        ({"timm_args": {"architecture": ARCH, "model_args": {"pretrained": True}, "image_size": 48}}, "may not hold 'pretrained'"),
        (
            {"timm_args": {"architecture": ARCH, "model_args": {"checkpoint_path": "/etc/x"}, "image_size": 48}},
            "may not hold 'checkpoint_path'",
        ),
        (
            {"timm_args": {"architecture": ARCH, "model_args": {**SMALL, "depth": 2}, "image_size": 48}},
            r"another architecture than vit_tiny.*it lacks blocks\.1\.attn\.proj\.bias, .* and 7 more",
        ),
    ],
)
def test_checkpoints_of_strangers_are_data(tmp_path, changes, sentence):
    write_checkpoint(tmp_path / "step", make_pair(), **changes)
    with pytest.raises(ValueError, match=sentence):
        load_backbone(tmp_path / "step")


def test_a_pointer_does_not_lead_out_of_its_folder(tmp_path):
    write_checkpoint(tmp_path / "elsewhere", make_pair())
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last").write_text("../../elsewhere\n")
    with pytest.raises(ValueError, match="names elsewhere, which is not there"):
        load_backbone(tmp_path / "run")


def published(pair):
    """As the published code saves them: the student inside a wrapper for distributed training, the teacher not."""
    return {
        "student": {f"module.{name}": tensor for name, tensor in pair.student.state_dict().items()},
        "teacher": pair.teacher.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny", patch_size=16, data_path="/data"),
    }


@pytest.fixture
def tiny_vit(monkeypatch):
    """vit_tiny_patch16_224 at a tenth of its size: published files name no model_args."""
    make = timm_vit._create_vision_transformer
    monkeypatch.setattr(timm_vit, "_create_vision_transformer", lambda name, **kwargs: make(name, **{**kwargs, **SMALL}))


def test_published_checkpoints(tmp_path, tiny_vit):
    pair = make_pair(image_size=96, model_args={})
    torch.save(published(pair), tmp_path / "checkpoint.pth")
    for which, network in (("teacher", pair.teacher), ("student", pair.student)):
        backbone, info = load_backbone(tmp_path / "checkpoint.pth", arch=ARCH, which=which)
        assert same_weights(backbone, network.backbone)
    assert info["image_size"] == 96  # that of the position embeddings, not timm's 224
    assert info["mean"] == (0.485, 0.456, 0.406)
    assert "does not tell how many its network has" in info["notes"][0] and info["assumed"] == info["notes"][:1]
    assert "does not say how images are normalised" in info["notes"][1]
    with pytest.raises(ValueError, match=r"does not say its architecture\. Its arguments call it vit_tiny\. Name it .* --arch"):
        load_backbone(tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=r"another architecture than vit_tiny_patch8_224.*shapes differ: patch_embed|no architecture"):
        load_backbone(tmp_path / "checkpoint.pth", arch="vit_tiny_patch8_224")


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "safetensors", "half"])
def test_single_networks(tmp_path, tiny_vit, wrap):
    backbone = make_pair(image_size=224, model_args={}).student.backbone
    tensors = {**backbone.state_dict(), "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10), "mask_token": torch.zeros(1)}
    file = tmp_path / ("model.safetensors" if wrap == "safetensors" else "model.pth")
    if wrap == "safetensors":
        save_file(tensors, file)
    elif wrap == "half":
        torch.save({name: tensor.half() for name, tensor in tensors.items()}, file)
    else:
        torch.save(tensors if wrap == "bare" else {wrap: tensors, "epoch": 1}, file)
    loaded, info = load_backbone(file, arch=ARCH)
    if wrap == "half":
        assert loaded.cls_token.dtype == torch.float32
        assert torch.equal(loaded.cls_token, backbone.cls_token.half().float())
    else:
        assert same_weights(loaded, backbone)
    assert f"{file} holds one network only; it stands for the teacher." in info["notes"]
    assert f"Of {file}, head.bias, head.weight, mask_token is not used." in info["notes"]


def test_start_with_resampled_position_embeddings(tmp_path):
    pair = make_pair(image_size=64)
    torch.save(published(pair), tmp_path / "checkpoint.pth")
    backbone = build_backbone(ARCH, image_size=48, model_args=SMALL, drop_path=0.2)
    notes = start_from(backbone, tmp_path / "checkpoint.pth")
    assert notes[0].startswith("The run's 2 attention heads are taken")
    assert notes[1].startswith("Start from the backbone of the teacher")
    assert notes[-1] == "Position embeddings were resampled from 4×4 to 3×3 patches, as timm does."
    theirs = pair.teacher.backbone
    expected = timm_vit.resample_abs_pos_embed(theirs.pos_embed, new_size=(3, 3), old_size=(4, 4), num_prefix_tokens=1)
    assert torch.allclose(backbone.pos_embed, expected, atol=1e-6)
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)


def test_what_does_not_fit_is_named(tmp_path):
    pair = make_pair()
    tensors = pair.teacher.backbone.state_dict()
    del tensors["norm.weight"]
    tensors["norm.bias"] = torch.zeros(31)
    tensors["register_tokens"] = torch.zeros(1, 4, 32)
    torch.save({"teacher": tensors}, tmp_path / "checkpoint.pth")
    backbone = build_backbone(ARCH, image_size=48, model_args=SMALL)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=r"it lacks norm\.weight; it has besides reg_token; shapes differ: norm\.bias \(31,\) for \(32,\)"):
        start_from(backbone, tmp_path / "checkpoint.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    with pytest.raises(ValueError, match="holds no student, but teacher"):
        start_from(backbone, tmp_path / "checkpoint.pth", which="student")


def test_unreadable_files_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint"):
        load_backbone(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_backbone(tmp_path)
    for name, content in (("text.pth", b"hello"), ("empty.pth", b""), ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} (cannot be read|holds more than)"):
            load_backbone(tmp_path / name, arch=ARCH)
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a dictionary"):
        load_backbone(tmp_path / "list.pth", arch=ARCH)
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="holds no network that is known here, but epoch"):
        load_backbone(tmp_path / "numbers.pth", arch=ARCH)
    step = write_checkpoint(tmp_path / "step", make_pair())
    (step / "state.json").write_text("{")
    with pytest.raises(ValueError, match="step is damaged"):
        load_backbone(step)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("[]")
    with pytest.raises(ValueError, match="it holds a list where settings should be"):
        load_backbone(tmp_path / "damaged")
