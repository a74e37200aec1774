"""An evaluation from outside the package: one file, named by the user."""

import json
import textwrap

import pytest
import torch

from massl_fast.cli import main
from massl_fast.evaluation import base
from massl_fast.evaluation.base import Figure, Protocol, Result
from massl_fast.evaluation.registry import PROTOCOLS, register
from massl_fast.models.backbone import build_backbone
from massl_fast.run.checkpoint import CheckpointFolder
from small_images import write_images

ARGUMENTS = dict(patch_size=8, embed_dim=24, depth=1, num_heads=3)
TOY = """
    from pydantic import Field

    from massl_fast.evaluation.base import Figure, Protocol, Result, Settings, described
    from massl_fast.evaluation.registry import register


    class LengthSettings(Settings):
        data: str
        \"\"\"Images whose features are measured.\"\"\"
        power: int = Field(2, ge=1)
        \"\"\"Which norm.\"\"\"


    @register
    class Length(Protocol):
        \"\"\"Mean length of features.\"\"\"

        name, title, Settings = "toy_length", "Mean length", LengthSettings

        def figures(self):
            return [Figure("length", "length", unit="", higher_is_better=False)]

        def run(self, subject):
            images = subject.labelled(subject.source(self.settings.data, "data", "test"))
            recipe = subject.features_name()
            found = subject.features(images, recipe)
            lengths = {name: {"length": float(f.features.norm(self.settings.power, dim=1).mean())} for name, f in found.items()}
            return Result(lengths, {"data": described(self.settings.data, images)}, recipe, images.image_size)
"""


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "toy_lengths.py"
    path.write_text(textwrap.dedent(TOY))
    yield path
    PROTOCOLS.pop("toy_length", None)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    network = build_backbone("vit_tiny_patch16_224", image_size=16, model_args=ARGUMENTS)
    tensors = {f"teacher/backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    timm_args = dict(architecture="vit_tiny_patch16_224", model_args=ARGUMENTS, image_size=16)
    return CheckpointFolder(tmp_path / "c").save(1, tensors, {"timm_args": timm_args})


def test_an_evaluation_in_a_file_outside_the_package_is_a_command(plugin, checkpoint, tmp_path, capsys):
    images = write_images(tmp_path / "images", classes=2, per_class=3)
    command = ["eval", "toy_length", "--plugin", str(plugin), "--checkpoint", str(checkpoint), "--data", str(images)]
    assert main([*command, "--power", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"] == "toy_length" and found["settings"] == {"data": str(images), "power": 1} and found["features"] == "cls"
    assert list(found["results"]) == ["teacher", "untrained", "raw pixels"] and found["results"]["teacher"]["length"] > 0
    assert main([*command, "--no-baselines"]) == 0
    out = capsys.readouterr().out
    assert f"Mean length: {found['architecture']} at 16 px" in out and "teacher" in out and "untrained" not in out
    assert main([*command, "--power", "0"]) == 2
    assert "--power is 0: input should be greater than or equal to 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*command[:4], "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "Images whose features" not in shown and "images whose features are measured" in shown
    assert "--power" in shown and "(default: 2)" in shown


def test_an_evaluation_that_nobody_has_is_a_sentence_with_the_choices(capsys):
    assert main(["eval", "kn"]) == 2
    assert "massl-fast eval kn: The evaluation is 'kn'. Did you mean knn?" in capsys.readouterr().err


def test_a_name_is_given_once():
    class Second(Protocol):
        name, title, Settings = "knn", "Second", base.Settings

        def figures(self):
            return [Figure("a", "a")]

        def run(self, subject):
            return Result({}, {}, "cls", 8)

    with pytest.raises(ValueError, match="The evaluation knn is taken already"):
        register(Second)


def test_the_overview_names_every_evaluation(capsys):
    assert main(["eval"]) == 0
    out = capsys.readouterr().out
    assert all(f"massl-fast eval {name} " in out for name in PROTOCOLS)
