import argparse
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from massl_fast.cli import main
from massl_fast.commands import eval as command
from massl_fast.data.loaders import open_data
from massl_fast.evaluation.features import extract_features
from massl_fast.evaluation.knn import knn_accuracy
from massl_fast.models.backbone import build_backbone
from massl_fast.run.checkpoint import CheckpointFolder

ARGUMENTS = dict(patch_size=8, embed_dim=24, depth=1, num_heads=3)


@pytest.fixture
def data(tmp_path):
    """(training folder, test folder): two classes told apart by brightness."""
    for role, count in (("train", 12), ("test", 4)):
        for c, name in enumerate(("dark", "light")):
            (tmp_path / role / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i + 100 * c).integers(120 * c, 120 * c + 80, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / role / name / f"{i}.png")
    return str(tmp_path / "train"), str(tmp_path / "test")


@pytest.fixture
def networks(monkeypatch):
    """Stands in for a checkpoint: a teacher and a student of one architecture."""
    made = {}

    def load_backbone(path, arch=None, which="teacher", image_size=None, **options):
        torch.manual_seed(len(made) + 10)
        made[which] = build_backbone(
            "vit_tiny_patch16_224", image_size=16, model_args=dict(patch_size=8, embed_dim=24, depth=1, num_heads=3)
        )
        known = dict(architecture=arch or "vit_tiny", image_size=image_size or 16, mean=(0.5,) * 3, std=(0.25,) * 3)
        return made[which], {**known, "notes": ["A note."]}

    monkeypatch.setattr(command, "load_backbone", load_backbone)
    return made


def evaluate(data, *options):
    return main(["eval", "knn", "--checkpoint", "some", "--train", data[0], "--test", data[1], "--device", "cpu", *options])


def test_json_holds_teacher_student_untrained_and_raw_pixels(data, networks, capsys):
    assert evaluate(data, "--k", "1", "5", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    percents = result["knn_percent"]
    assert list(percents) == ["teacher", "student", "untrained", "raw pixels"] and percents["raw pixels"]["5"] == 100
    assert result["train"] == {"data": data[0], "images": 24} and result["image_size"] == 16
    settings = dict(image_size=16, device="cpu", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    for name, network in networks.items():
        train, test = (extract_features(network, open_data(path, "", ""), **settings) for path in data)
        assert percents[name] == {str(k): value for k, value in knn_accuracy(train, test, ks=(1, 5)).items()}


def test_the_table_shows_every_k_and_the_notes(data, networks, capsys):
    assert evaluate(data, "--k", "1", "100", "--which", "student") == 0
    out = capsys.readouterr().out
    assert "k = 1 " in out and "k = 100" in out and "student" in out and "teacher" not in out and "raw pixels" in out
    assert "A note." in out and "k = 100 compares with all 24 training images" in out and f"8 test images of {data[1]}" in out


def test_unreadable_images_are_told(data, networks, capsys):
    with open(f"{data[1]}/light/0.png", "wb") as file:
        file.write(b"no image")
    assert evaluate(data, "--k", "1", "--which", "teacher") == 0
    assert "1 of these images could not be read and were left out: light/0.png" in capsys.readouterr().out


def test_untrained_is_the_same_network_with_other_weights_and_leaves_the_random_state(networks):
    network, _ = command.load_backbone(None)
    before = torch.get_rng_state()
    first, second = command.untrained(network), command.untrained(network)
    assert torch.equal(torch.get_rng_state(), before)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in first.state_dict().items()} == shapes
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)


def test_mistakes_are_sentences_with_exit_code_2(data, networks, capsys, tmp_path):
    assert evaluate(data, "--k", "0") == 2 and "positive numbers of neighbours" in capsys.readouterr().err
    assert evaluate((data[0], str(tmp_path / "gone"))) == 2 and "There is no folder or file" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert evaluate(data, "--device", "cuda") == 2 and "finds no GPU" in capsys.readouterr().err


def test_help_names_every_option():
    parser = argparse.ArgumentParser()
    command.Evaluation("knn", []).add_arguments(parser)
    text = parser.format_help()
    for option in ("--checkpoint", "--train", "--test", "--which", "--k", "--image-size", "--arch", "--json", "--temperature"):
        assert option in text


class TestCheckpoints:
    """Real ones, through load_backbone."""

    def write(self, folder, networks, **state):
        tensors = {f"{which}/backbone.{name}": tensor for which, net in networks.items() for name, tensor in net.state_dict().items()}
        timm_args = dict(architecture="vit_tiny_patch16_224", model_args=ARGUMENTS, image_size=16)
        return CheckpointFolder(folder).save(1, tensors, {"timm_args": timm_args, **state})

    def network(self, seed):
        torch.manual_seed(seed)
        return build_backbone("vit_tiny_patch16_224", image_size=16, model_args=ARGUMENTS)

    def test_teacher_and_student_of_a_run(self, tmp_path, data, capsys):
        path = self.write(tmp_path / "c", {"teacher": self.network(1), "student": self.network(2)})
        assert main(["eval", "knn", "--checkpoint", str(path), "--train", data[0], "--test", data[1], "--k", "3", "--json"]) == 0
        assert list(json.loads(capsys.readouterr().out)["knn_percent"]) == ["teacher", "student", "untrained", "raw pixels"]

    def test_one_network_is_shown_once(self, tmp_path, data):
        same = self.write(tmp_path / "c", {"teacher": self.network(1), "student": self.network(1)})
        networks, info = command.networks_of(same, "both")
        assert list(networks) == ["teacher"] and "shown once" in info["notes"][-1]

    def test_a_foreign_file_with_one_network_is_one_row_and_a_sentence(self, tmp_path, data, capsys):
        path = tmp_path / "weights.pth"
        torch.save({"model": timm.create_model("resnet18", num_classes=0).state_dict()}, path)
        options = ["--arch", "resnet18", "--image-size", "32", "--k", "3", "--which", "both"]
        assert main(["eval", "knn", "--checkpoint", str(path), "--train", data[0], "--test", data[1], *options]) == 0
        out = capsys.readouterr().out
        assert "k-NN accuracy, %: resnet18 at 32 px\n" in out and "│ teacher " in out and "│ student " not in out
        assert f"{path} holds one network only; it stands for the teacher." in out and "it is shown once." in out

    def test_any_network_of_timm_is_evaluated_by_its_name(self, data, capsys):
        arguments = ["eval", "knn", "--train", data[0], "--test", data[1], "--k", "3", "--image-size", "32", "--json", "--checkpoint"]
        assert main([*arguments, "timm:resnet10t"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (
            list(found["results"]) == ["teacher", "untrained", "raw pixels"] and found["features"] == "pooled" and found["image_size"] == 32
        )
        assert any("random weights here" in note for note in found["notes"])
        assert main([*arguments, "timm:resnet1o"]) == 2 and "timm has no architecture named 'resnet1o'" in capsys.readouterr().err

    def test_a_missing_student_is_noted(self, tmp_path):
        path = self.write(tmp_path / "c", {"teacher": self.network(1)})
        networks, info = command.networks_of(path, "both")
        assert list(networks) == ["teacher"] and "Without a student:" in info["notes"][-1]
        with pytest.raises(ValueError, match="holds no student"):
            command.networks_of(path, "student")

    def test_a_damaged_checkpoint_is_a_sentence(self, tmp_path, data, capsys):
        arguments = ["eval", "knn", "--train", data[0], "--test", data[1], "--checkpoint"]
        assert main([*arguments, str(tmp_path / "gone")]) == 2 and "There is no checkpoint" in capsys.readouterr().err
        path = self.write(tmp_path / "c", {"teacher": self.network(1)})
        (path / "state.safetensors").write_bytes(b"nothing")
        assert main([*arguments, str(path)]) == 2 and "is damaged (" in capsys.readouterr().err
