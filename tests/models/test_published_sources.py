"""Every checkpoint of the field: files laid out as each project's own script saves them, read through every door.

The networks are those of ``official_networks`` (and torchvision's), which share no code with timm; features have to agree to 1e-6.
"""

import argparse
import json
import os
import pathlib
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from official_networks import Swin, Transformer
from PIL import Image
from torch import nn

from massl_fast.cli import main
from massl_fast.models.backbone import build_backbone
from massl_fast.models.published import load_backbone, start_from

TINY = {"arch": "vit_tiny_patch16_224", "model_args": {"depth": 2}}
SMALL = {"arch": "vit_small_patch16_224", "model_args": {"depth": 2}}


@dataclass(frozen=True)
class Layout:
    """How one project's script saves one network."""

    source: str
    """Repository, commit and file that saves it."""
    network: Any
    """Makes the network."""
    save: Any
    """(teacher, student) → what the script gives to torch.save."""
    options: dict
    """What the user says of the network: arch and model_args."""
    assumed: str = ""
    """A part of the first note; empty where nothing is assumed or inferred."""
    notes: tuple[str, ...] = ()
    """Parts of other notes."""
    single: bool = False
    """The file holds the teacher alone."""
    size: int = 64


def below(prefix, network):
    return OrderedDict((prefix + name, tensor) for name, tensor in network.state_dict().items())


def head(prefix, width, out=8, **layers):
    """DINO's projection head: three layers and one with weight norm."""
    names = {"mlp.0.weight": (16, width), "mlp.0.bias": (16,), "mlp.2.weight": (4, 16), "mlp.2.bias": (4,)}
    names |= {"last_layer.weight_g": (out, 1), "last_layer.weight_v": (out, 4), **layers}
    return {prefix + name: torch.randn(shape) for name, shape in names.items()}


def optimizer(parameters=2):
    """As the scripts leave it: rates taken from a NumPy schedule, weight decay too."""
    schedule = np.linspace(5e-4, 1e-6, 10)
    state = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)} for i in range(parameters)}
    groups = [{"lr": schedule[4], "weight_decay": np.float64(0.04), "betas": (0.9, 0.999), "params": list(range(parameters))}]
    return {"state": state, "param_groups": groups}


def dino_kind(arch, *, slurm=False, wrapped_teacher=False, extra=(), **more):
    """DINO, iBOT, MaSSL and CARP: student inside DDP, teacher inside it where it has batch norms."""

    def save(teacher, student):
        outer = "module." if wrapped_teacher else ""
        width = 8
        where = pathlib.PosixPath("/checkpoint/user/experiments/7") if slurm else "."
        return {
            "student": below("module.backbone.", student) | head("module.head.", width, **dict(extra)),
            "teacher": below(f"{outer}backbone.", teacher) | head(f"{outer}head.", width, **dict(extra)),
            "optimizer": optimizer(),
            "epoch": 101,
            "args": argparse.Namespace(arch=arch, patch_size=16, out_dim=65536, lr=5e-4, output_dir=where, global_crops_scale=(0.4, 1.0)),
            "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
            **more,
        }

    return save


def moco(arch, projector):
    """MoCo-v3: both encoders in one state dict, their projection heads in the place of the classifier."""

    def save(teacher, student):
        tensors = OrderedDict()
        for name, network in (("base_encoder", student), ("momentum_encoder", teacher)):
            tensors |= below(f"module.{name}.", network)
            for layer in (0, 3, 6):
                tensors[f"module.{name}.{projector}.{layer}.weight"] = torch.randn(4, 4)
            tensors[f"module.{name}.{projector}.1.running_mean"] = torch.zeros(4)
            tensors[f"module.{name}.{projector}.1.num_batches_tracked"] = torch.tensor(7)
        tensors["module.predictor.0.weight"] = torch.randn(4, 4)
        return {"epoch": 300, "arch": arch, "state_dict": tensors, "optimizer": optimizer(), "scaler": {"scale": 65536.0}}

    return save


def solo(*, momentum=True, head="projector", encoder="backbone", **more):
    """solo-learn: a Lightning checkpoint."""

    def save(teacher, student):
        tensors = below(f"{encoder}.", student if momentum else teacher) | {"classifier.weight": torch.randn(10, 8)}
        tensors[f"{head}.0.weight"] = torch.randn(4, 8)
        if momentum:
            tensors |= below(f"momentum_{encoder}.", teacher) | {f"momentum_{head}.0.weight": torch.randn(4, 8)}
            tensors |= {"predictor.0.weight": torch.randn(4, 4), "queue": torch.randn(2, 4, 16), "queue_ptr": torch.zeros(1)}
        return {
            "epoch": 99,
            "global_step": 1000,
            "pytorch-lightning_version": "2.1.2",
            "state_dict": tensors,
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"Checkpointer": {"monitor": None, "best_model_score": torch.tensor(0.5), "dirpath": "trained_models"}},
            "optimizer_states": [optimizer()],
            "lr_schedulers": [{"last_epoch": 99, "base_lrs": [np.float64(0.3)]}],
            **more,
        }

    return save


def mae(teacher, _):
    tensors = below("", teacher) | {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.randn(1, 17, 8)}
    tensors |= {f"decoder_{name}": torch.randn(8, 8) for name in ("embed.weight", "blocks.0.norm1.weight", "norm.bias", "pred.weight")}
    args = argparse.Namespace(model="mae_vit_base_patch16", output_dir=pathlib.PosixPath("/checkpoint/7"), lr=np.float64(1.5e-4), gpu=0)
    return {"model": tensors, "optimizer": optimizer(), "epoch": 799, "scaler": {"scale": 65536.0}, "args": args}


def dinov2(teacher, _):
    heads = head("dino_head.", 8) | head("ibot_head.", 8)
    return {"teacher": below("backbone.", teacher) | heads}


V2 = dict(patch=14, scale="ls1", mask="mask_token")
LAYOUTS = {
    "DINO": Layout(
        "facebookresearch/dino 7c446df, main_dino.py",
        lambda: Transformer(384, 6),
        dino_kind("vit_small", dino_loss={"center": torch.zeros(1, 8)}),
        SMALL,
    ),
    "DINO by Slurm": Layout(
        "facebookresearch/dino 7c446df, main_dino.py by run_with_submitit.py",
        lambda: Transformer(192, 3),
        dino_kind("deit_tiny", slurm=True),
        TINY,
    ),
    "DINO backbone": Layout(
        "facebookresearch/dino 7c446df, the released *_pretrain.pth",
        lambda: Transformer(192, 3),
        lambda teacher, _: below("", teacher),
        TINY,
        "is taken with timm's 3 attention heads",
        single=True,
    ),
    "iBOT": Layout(
        "bytedance/ibot da316d8, main_ibot.py",
        lambda: Transformer(192, 3, mask="masked_embed"),
        dino_kind(
            "vit_tiny", extra={"last_layer2.weight_g": (8, 1)}.items(), ibot_loss={"center": torch.zeros(1, 8), "center2": torch.zeros(8)}
        ),
        TINY,
        notes=("masked_embed is not used",),
    ),
    "iBOT with layer scale": Layout(
        "bytedance/ibot da316d8, models/vision_transformer.py with init_values",
        lambda: Transformer(192, 3, scale="gamma_1"),
        dino_kind("vit_tiny"),
        TINY,
    ),
    "iBOT backbone": Layout(
        "bytedance/ibot da316d8, extract_backbone_weights.py",
        lambda: Transformer(192, 3),
        lambda teacher, _: {"state_dict": below("", teacher)},
        TINY,
        "is taken with timm's 3 attention heads",
        single=True,
    ),
    "iBOT Swin": Layout(
        "bytedance/ibot da316d8, main_ibot.py with --arch swin_tiny, models/swin_transformer.py",
        Swin,
        dino_kind("swin_tiny"),
        {"arch": "swin_tiny_patch4_window7_224", "model_args": {"embed_dim": 24, "depths": [2, 2], "num_heads": [1, 2]}},
        size=224,
    ),
    "MaSSL": Layout("sthalles/MaSSL 073af6c, main_massl.py", lambda: Transformer(192, 3), dino_kind("vit_tiny"), TINY),
    "MaSSL with mean pooling": Layout(
        "sthalles/MaSSL 073af6c, main_massl.py with --use_mean_pooling",
        lambda: Transformer(192, 3, mean_pooling=True),
        dino_kind("vit_tiny"),
        TINY,
    ),
    "CARP": Layout(
        "sthalles/CARP c9b068b, main_carp.py",
        lambda: without_classifier(torchvision.models.resnet18()),
        dino_kind("resnet18", wrapped_teacher=True),
        {"arch": "resnet18"},
    ),
    "MoCo-v3": Layout(
        "facebookresearch/moco-v3 c349e6e, main_moco.py",
        lambda: Transformer(384, 12, positions="moco"),
        moco("vit_small", "head"),
        SMALL,
        "is built with 12 attention heads, not timm's 6: the position embeddings are the fixed ones of MoCo-v3",
        ("momentum_encoder", "predictor is left aside"),
    ),
    "MoCo-v3 converted": Layout(
        "facebookresearch/moco-v3 c349e6e, convert_to_deit.py",
        lambda: Transformer(384, 12, positions="moco"),
        lambda teacher, _: {"model": below("", teacher)},
        SMALL,
        "is built with 12 attention heads, not timm's 6",
        single=True,
    ),
    "MoCo-v3 ResNet": Layout(
        "facebookresearch/moco-v3 c349e6e, main_moco.py",
        lambda: without_classifier(torchvision.models.resnet18()),
        moco("resnet18", "fc"),
        {"arch": "resnet18"},
        notes=("predictor is left aside",),
    ),
    "solo-learn MoCo-v3": Layout(
        "vturrisi/solo-learn c980e9e (methods), 1ee0bf9 (vit_mocov3.py)",
        lambda: Transformer(192, 12, positions="moco"),
        solo(),
        TINY,
        "is built with 12 attention heads, not timm's 3",
        ("momentum_backbone", "classifier, predictor, "),
    ),
    "solo-learn DINO": Layout(
        "vturrisi/solo-learn c980e9e (methods), 7af3e44 (vit.py)", lambda: Transformer(192, 3), solo(head="head"), TINY
    ),
    "solo-learn BYOL": Layout(
        "vturrisi/solo-learn c980e9e",
        lambda: without_classifier(torchvision.models.resnet18()),
        solo(hyper_parameters={"lr": np.float64(0.3)}),
        {"arch": "resnet18"},
    ),
    "solo-learn of old": Layout(
        "vturrisi/solo-learn 008f64f (encoder, as methods/base.py called it); the momentum_encoder of its time by its naming rule",
        lambda: without_classifier(torchvision.models.resnet18()),
        solo(encoder="encoder"),
        {"arch": "resnet18"},
    ),
    "solo-learn SimCLR": Layout(
        "vturrisi/solo-learn c980e9e",
        lambda: Transformer(192, 3),
        solo(momentum=False),
        TINY,
        single=True,
        notes=("classifier is left aside",),
    ),
    "solo-learn MAE": Layout(
        "vturrisi/solo-learn 15824b4 (vit_mae.py)",
        lambda: Transformer(192, 12, positions="mae"),
        solo(momentum=False, head="decoder"),
        TINY,
        "is built with 12 attention heads, not timm's 3: the position embeddings are the fixed ones of MAE",
        single=True,
    ),
    "MAE pre-training": Layout(
        "facebookresearch/mae, main_pretrain.py, util/misc.py (be47fef)",
        lambda: Transformer(768, 12, positions="mae", depth=1),
        mae,
        {"arch": "vit_base_patch16_224", "model_args": {"depth": 1}},
        notes=("the decoder (decoder_*), mask_token is not used",),
        single=True,
    ),
    "DINOv2 training": Layout(
        "facebookresearch/dinov2 b8931f7, dinov2/train/train.py (teacher_checkpoint.pth), four block chunks",
        lambda: Transformer(384, 6, depth=4, chunks=4, **V2),
        dinov2,
        {"arch": "vit_small_patch14_dinov2", "model_args": {"depth": 4}},
        notes=("mask_token is not used",),
        size=56,
    ),
    "DINOv2 with registers": Layout(
        "facebookresearch/dinov2 b8931f7, four block chunks and registers",
        lambda: Transformer(384, 6, depth=4, chunks=4, registers=4, **V2),
        dinov2,
        {"arch": "vit_small_patch14_reg4_dinov2", "model_args": {"depth": 4}},
        size=56,
    ),
    "DINOv2 with registers, named without": Layout(
        "facebookresearch/dinov2 b8931f7, four block chunks and registers",
        lambda: Transformer(384, 6, depth=4, chunks=2, registers=2, **V2),
        dinov2,
        {"arch": "vit_small_patch14_dinov2", "model_args": {"depth": 4}},
        size=56,
    ),
    "DINOv2 backbone": Layout(
        "facebookresearch/dinov2 b8931f7, the released *_pretrain.pth",
        lambda: Transformer(384, 6, **V2),
        lambda teacher, _: below("", teacher),
        {"arch": "vit_small_patch14_dinov2", "model_args": {"depth": 2}},
        single=True,
        size=56,
    ),
}
TEACHER_ONLY = [name for name, layout in LAYOUTS.items() if layout.single or layout.save is dinov2]


def without_classifier(network):
    network.fc = nn.Identity()
    return network


@pytest.fixture(params=list(LAYOUTS))
def case(request, tmp_path):
    """(layout, its file, teacher, student), the two in evaluation mode."""
    layout = LAYOUTS[request.param]
    torch.manual_seed(0)
    teacher, student = layout.network(), layout.network()
    for network in (teacher, student):
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save(layout.save(teacher, student), tmp_path / "file.pth")
    return layout, tmp_path / "file.pth", teacher.eval(), student.eval()


def agree(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


@torch.no_grad()
def test_features_are_those_of_the_official_code(case, request):
    layout, path, teacher, student = case
    images = torch.rand(2, 3, layout.size, layout.size)
    backbone, info = load_backbone(path, **layout.options)
    agree(backbone(images), teacher(images))
    assert info["image_size"] == (layout.size if "resnet" not in layout.options["arch"] else info["image_size"])
    assert layout.assumed in " ".join(info["assumed"]) and bool(layout.assumed) == bool(info["assumed"])
    assert info["notes"][: len(info["assumed"])] == info["assumed"]
    for note in layout.notes:
        assert any(note in said for said in info["notes"]), (note, info["notes"])
    # The student where there is one, and a sentence where there is none.
    if layout.save is dinov2:
        with pytest.raises(ValueError, match="holds no student, but teacher"):
            load_backbone(path, which="student", **layout.options)
    else:
        found, info = load_backbone(path, which="student", **layout.options)
        agree(found(images), (teacher if layout.single else student)(images))
        assert any("holds one network only; it stands for the student" in note for note in info["notes"]) == layout.single


STARTED = ("DINO", "iBOT Swin", "MaSSL with mean pooling", "CARP", "MoCo-v3", "MAE pre-training", "DINOv2 with registers")


def written(name, folder):
    """(layout, its file, teacher)."""
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    teacher, student = layout.network().eval(), layout.network().eval()
    torch.save(layout.save(teacher, student), folder / "file.pth")
    return layout, folder / "file.pth", teacher


@pytest.mark.parametrize("name", STARTED)
@torch.no_grad()
def test_a_run_starts_from_it(name, tmp_path):
    layout, path, teacher = written(name, tmp_path)
    args = dict(layout.options.get("model_args", {}))
    args |= {"MoCo-v3": {"num_heads": 12}, "MaSSL with mean pooling": {"global_pool": "avg"}}.get(name, {})
    backbone = build_backbone(layout.options["arch"], image_size=layout.size, model_args=args).eval()
    notes = start_from(backbone, path)
    assert any("Start from the backbone of the teacher" in note for note in notes)
    images = torch.rand(2, 3, layout.size, layout.size)
    found, expected = backbone(images), teacher(images)
    # timm's own Swin adds another number in its norms, which a run keeps.
    assert (found - expected).abs().max() <= (1e-3 if name == "iBOT Swin" else 1e-6) * expected.abs().max().clamp(min=1)


EXPORTED = ("MoCo-v3", "solo-learn MoCo-v3", "MaSSL with mean pooling", "iBOT Swin", "DINOv2 with registers, named without")


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_an_exported_folder_has_its_features_and_its_head(name, tmp_path, capsys):
    layout, path, teacher = written(name, tmp_path)
    args = [f"{key}={json.dumps(value)}" for key, value in layout.options["model_args"].items()]
    command = ["export", "--checkpoint", path, "--to", tmp_path / "out", "--arch", layout.options["arch"], "--model-args", *args]
    assert main([str(part) for part in command]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{layout.options['arch']} is built with" if layout.assumed else str(tmp_path))
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(2, 3, layout.size, layout.size)
    found, expected = network(images), teacher(images)
    tolerance = 1e-6
    if name == "iBOT Swin":
        tolerance = 1e-3
        assert "The norms of this network add 1e-06 to the variance, and timm, which has no argument for it, another number" in said
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)
    size = (tmp_path / "out/head/head.safetensors").stat().st_size
    assert size < 20_000, "the projection head alone, not the other network"


class Burglar:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_malicious_variants_are_refused(case, tmp_path):
    layout, path, teacher, student = case
    content = layout.save(teacher, student)
    attacks = {
        "posix.system": Burglar(tmp_path / "opened"),
        r"a NumPy type that is no number \(O8\)": np.array([1, "two"], dtype=object),
    }
    for culprit, attack in attacks.items():
        torch.save({**content, "more": attack}, path)
        with pytest.raises(ValueError, match=f"holds {culprit}, which is not read"):
            load_backbone(path, **layout.options)
    torch.save({**content, "more": torch.ones(251, 3)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "huge.pth", "w") as new:
        for record in old.namelist():
            data = old.read(record)
            new.writestr(record, data.replace(b"K\xfbK\x03", b"J\xff\xff\xff\x7fK\x03") if record.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match=r"holds a tensor of the declared shape \(2147483647, 3\)"):
        load_backbone(tmp_path / "huge.pth", **layout.options)
    assert not (tmp_path / "opened").exists()


def test_head_counts_that_the_file_tells_are_demanded_of_a_run(tmp_path):
    layout = LAYOUTS["MoCo-v3"]
    torch.save(layout.save(layout.network(), layout.network()), tmp_path / "file.pth")
    backbone = build_backbone(SMALL["arch"], image_size=64, model_args=SMALL["model_args"])
    with pytest.raises(
        ValueError, match=r"network of 12 attention heads .*the one set here has 6\. Set --model\.model_args\.num_heads 12\."
    ):
        start_from(backbone, tmp_path / "file.pth")


@pytest.mark.parametrize(
    "tensors",
    [
        {"cls_token": torch.tensor(1.0), "pos_embed": torch.zeros(1, 5, 192)},
        {"cls_token": torch.zeros(1, 1, 192), "reg_token": torch.tensor(3.0), "pos_embed": torch.zeros(2, 3)},
        {"cls_token": torch.zeros(1, 1, 192), "register_tokens": torch.zeros(1, 10**6, 1), "pos_embed": torch.zeros(1, 10**6 + 1, 1)},
        {"momentum_encoder.": torch.zeros(1), "base_encoder.cls_token": torch.zeros(0)},
    ],
)
def test_tensors_of_unexpected_shapes_end_in_a_sentence(tmp_path, tensors):
    torch.save({"state_dict": {"blocks.0.attn.qkv.weight": torch.zeros(576, 192), **tensors}}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth is of another architecture than vit_tiny_patch16_224 as set here"):
        load_backbone(tmp_path / "file.pth", **TINY)


def test_windows_that_do_not_divide_the_maps_are_told(tmp_path):
    layout, path, _ = written("iBOT Swin", tmp_path)
    for size, told in ((224, False), (112, False), (96, True)):
        _, info = load_backbone(path, image_size=size, **layout.options)
        assert any("windows of Swin do not divide" in note for note in info["notes"]) == told
    backbone = build_backbone(layout.options["arch"], image_size=224, model_args=layout.options["model_args"])
    assert "The run keeps timm's 1e-5 in its norms" in start_from(backbone, path)[0]


def test_the_user_may_overrule_and_the_first_note_says_so(tmp_path):
    torch.save(below("", Transformer(192, 12, positions="moco")), tmp_path / "file.pth")
    backbone, info = load_backbone(tmp_path / "file.pth", arch=TINY["arch"], model_args={"depth": 2, "num_heads": 3})
    assert backbone.blocks[0].attn.num_heads == 3
    assert "is built with 3 attention heads, as --model-args says. The file's own are 12" in info["notes"][0]
    torch.save(below("", Transformer(192, 4)), tmp_path / "file.pth")
    backbone, info = load_backbone(tmp_path / "file.pth", arch=TINY["arch"], model_args={"depth": 2, "num_heads": 4})
    assert backbone.blocks[0].attn.num_heads == 4 and info["assumed"] == []


@pytest.fixture
def dino(tmp_path):
    torch.manual_seed(0)
    teacher = Transformer(192, 3, grid=6).eval()
    torch.save(below("", teacher), tmp_path / "file.pth")
    return teacher, tmp_path / "file.pth"


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 96), (160, 112)])
@torch.no_grad()
def test_position_embeddings_as_dinos_code_resamples_them(dino, height, width):
    teacher, path = dino
    images = torch.rand(1, 3, height, width)
    ours, _ = load_backbone(path, position_embedding="dino", **TINY)
    timms, _ = load_backbone(path, **TINY)
    agree(ours(images), teacher(images))
    layer = ours.get_intermediate_layers(images, n=1, norm=True, return_prefix_tokens=True)[0]
    agree(layer[1][:, 0], teacher(images))
    if (height, width) != (96, 96):
        assert (timms(images) - teacher(images)).abs().max() > 1e-4, "the two ways differ"
    assert ours.state_dict().keys() == timms.state_dict().keys()


def test_a_resampled_result_says_so(dino):
    _, path = dino
    for way, sentence in (("timm", "as timm does; --position-embedding dino"), ("dino", "as DINO's code does")):
        _, info = load_backbone(path, image_size=64, position_embedding=way, **TINY)
        assert f"Position embeddings are resampled from 6×6 to 4×4 patches, {sentence}" in info["notes"][-1] and info["image_size"] == 64
    _, info = load_backbone(path, image_size=96, **TINY)
    assert not any("resampled from" in note for note in info["notes"])
    with pytest.raises(
        ValueError, match=r"Images of 100 px are not divisible by the patch of vit_tiny_patch16_224, 16 px\. Take 96 or 112\."
    ):
        load_backbone(path, image_size=100, **TINY)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(ValueError, match="--position-embedding dino is for vision transformers"):
        load_backbone(path, arch="resnet18", position_embedding="dino")


def test_the_command_begins_with_what_is_assumed(dino, tmp_path, capsys):
    _, path = dino
    for c in range(2):
        (tmp_path / f"data/{c}").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.random.default_rng(i).integers(120 * c, 120 * c + 80, (32, 32, 3), dtype=np.uint8)).save(
                tmp_path / f"data/{c}/{i}.png"
            )
    command = ["eval", "knn", "--checkpoint", path, "--train", tmp_path / "data", "--test", tmp_path / "data", "--k", 1, "--device", "cpu"]
    command += ["--arch", TINY["arch"], "--model-args", "depth=2", "--no-baselines"]
    assert main([*map(str, command), "--image-size", "64", "--position-embedding", "dino"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("vit_tiny_patch16_224 is taken with timm's 3 attention heads: ")
    assert said.count("is taken with timm's 3") == 1 and "resampled from 6×6 to 4×4 patches, as DINO's code does" in said
    assert main([*map(str, command), "--image-size", "100"]) == 2
    assert "Images of 100 px are not divisible" in capsys.readouterr().err
    assert main([*map(str, command), "--model-args", "depth"]) == 2
    assert "--model-args takes KEY=VALUE" in capsys.readouterr().err
