"""Linear probe, logistic regression and few-shot heads on real folders, from the command line to the figures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from massl_fast.cli import main
from massl_fast.data.sources import open_source
from massl_fast.evaluation.features import AugmentedImages
from massl_fast.evaluation.fewshot import drawn, held_for_choice
from massl_fast.evaluation.layouts.subsets import positions_of_list
from massl_fast.evaluation.linear import PUBLISHED_RATES, linear_recipe
from massl_fast.evaluation.logistic import shot_groups, stratified_share
from massl_fast.evaluation.selection import held_out, validation_of
from massl_fast.models.backbone import build_backbone
from massl_fast.run.checkpoint import CheckpointFolder

ARGUMENTS = dict(patch_size=8, embed_dim=24, depth=4, num_heads=3)
COLOURS = {"blue one": (20, 20, 200), "grün": (20, 200, 20), "red": (200, 20, 20)}


def write_colours(folder, per_class, classes=tuple(COLOURS), seed=0):
    """Noisy squares of one colour per class: easy for any network."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            noise = np.random.default_rng(seed + 1000 * c + i).integers(-15, 15, (16, 16, 3))
            Image.fromarray((np.array(COLOURS[name]) + noise).astype(np.uint8)).save(folder / name / f"{name[0]}_{i}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    return write_colours(folder / "train", 10), write_colours(folder / "test", 4, seed=500)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    network = build_backbone("vit_tiny_patch16_224", image_size=16, model_args=ARGUMENTS)
    tensors = {f"teacher/backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    timm_args = dict(architecture="vit_tiny_patch16_224", model_args=ARGUMENTS, image_size=16)
    return CheckpointFolder(tmp_path_factory.mktemp("c")).save(1, tensors, {"timm_args": timm_args})


def evaluate(name, data, checkpoint, *options):
    return main(["eval", name, "--checkpoint", str(checkpoint), "--train", str(data[0]), "--test", str(data[1]), *options])


def found(capsys, name, data, checkpoint, *options):
    assert evaluate(name, data, checkpoint, "--json", *options) == 0
    return json.loads(capsys.readouterr().out)


LINEAR = ("--epochs", "6", "--views", "2", "--head-batch", "8", "--rates", "0.01", "1", "10")


def test_a_linear_probe_learns_what_is_there_and_says_how_it_was_chosen(data, checkpoint, capsys, tmp_path):
    options = (*LINEAR, "--cache", str(tmp_path / "kept"))
    result = found(capsys, "linear", data, checkpoint, *options)
    assert result["features"] == "cls4" and list(result["results"]) == ["teacher", "untrained", "raw pixels"]
    teacher = result["results"]["teacher"]
    assert teacher["best_percent"] == 100 and len(teacher["by_head"]) == 3 and teacher["chosen"]["rate"] in (0.01, 1, 10)
    assert teacher["best_percent"] >= teacher["chosen_percent"] > 40
    assert result["published"] == [] and len(result["departures"]) == 5
    assert any("2 random crops" in sentence for sentence in result["departures"])
    again = found(capsys, "linear", data, checkpoint, *options)
    assert again["results"] == result["results"]  # from the disk now
    plain = found(capsys, "linear", data, checkpoint, *LINEAR)
    assert plain["results"] == result["results"]  # without a disk


def test_fresh_views_are_one_per_epoch_and_zero_are_centre_crops(data, checkpoint, capsys, tmp_path):
    options = ("--epochs", "3", "--head-batch", "8", "--rates", "1", "--no-baselines", "--validation", "0", "--cache", str(tmp_path / "k"))
    fresh = found(capsys, "linear", data, checkpoint, "--views", "fresh", *options)
    assert not any("crop" in sentence for sentence in fresh["departures"])
    assert len(list((tmp_path / "k").iterdir())) == 3 + 1  # three views and the test images
    assert "chosen_percent" not in fresh["results"]["teacher"]
    centre = found(capsys, "linear", data, checkpoint, "--views", "0", *options)
    assert any("centre crops" in sentence for sentence in centre["departures"])


def test_a_validation_set_of_its_own(data, checkpoint, capsys):
    result = found(capsys, "linear", data, checkpoint, *LINEAR, "--no-baselines", "--validation", str(data[1]))
    teacher = result["results"]["teacher"]
    last = {head["rate"]: head["percent"] for head in teacher["by_head"]}
    assert teacher["chosen_percent"] == max(last.values())  # the validation set is the test set here


def test_diverged_heads_are_named_and_lose(data, checkpoint, capsys):
    result = found(capsys, "linear", data, checkpoint, *LINEAR[:-4], "--rates", "1", "1e40", "--no-baselines")
    teacher = result["results"]["teacher"]
    assert teacher["lost"] == [1e40] and teacher["by_head"][1]["percent"] is None and teacher["chosen"]["rate"] == 1
    assert "1 of 2 heads on teacher diverged and are out: rates 1e+40." in result["notes"]


def test_logistic_regression_reports_both_choices_and_every_penalty(data, checkpoint, capsys):
    result = found(capsys, "logistic", data, checkpoint, "--lambdas", "1e-5", "1e-3", "1")
    teacher = result["results"]["teacher"]
    assert teacher["best_percent"] == 100 and [row["lambda"] for row in teacher["by_lambda"]] == [1e-5, 1e-3, 1]
    assert teacher["few_percent"] is not None and teacher["many_percent"] is None
    assert evaluate("logistic", data, checkpoint, "--lambdas", "1e-3") == 0
    out = capsys.readouterr().out
    assert "best on test, as" in out and "chosen on held-out" in out and "1 penalties" in out


def test_few_shots_are_means_over_draws(data, checkpoint, capsys):
    options = ("--per-class", "1", "3", "--draws", "3", "--epochs", "5", "--no-baselines")
    result = found(capsys, "fewshot", data, checkpoint, *options)
    teacher = result["results"]["teacher"]
    for head in ("knn_n1", "logistic_n3_best", "linear_n3_best"):
        assert 0 <= teacher[f"{head}_percent"] <= 100 and teacher[f"{head}_deviation"] >= 0
    assert len(teacher["by_draw"]["knn_n1"]) == 3 and "logistic_n1_chosen_percent" in teacher
    assert teacher["knn_n1_percent"] == pytest.approx(np.mean(teacher["by_draw"]["knn_n1"]))
    assert found(capsys, "fewshot", data, checkpoint, *options)["results"] == result["results"]


def test_draws_are_of_every_class_and_of_the_seed_alone():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 30)
    held = held_for_choice(labels, 4, seed=0)
    assert [int(held[labels == c].sum()) for c in range(3)] == [1, 0, 3]
    rows = drawn(labels, 4, 0, 1, ~held)
    assert torch.bincount(labels[rows]).tolist() == [4, 2, 4] and not held[rows].any()
    assert torch.equal(rows, drawn(labels, 4, 0, 1, ~held)) and not torch.equal(rows, drawn(labels, 4, 0, 2, ~held))


def test_a_share_takes_at_least_one_image_of_every_class():
    labels = torch.tensor([0] * 20 + [1])
    for seed in range(3):
        rows = stratified_share(labels, 0.1, seed)
        assert torch.bincount(labels[rows]).tolist() == [2, 1]


def test_shots_are_counted_as_for_long_tails():
    train = torch.tensor([0] * 101 + [1] * 100 + [2] * 20 + [3] * 19)
    truth = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3])
    right = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0]).bool()
    found = shot_groups(train, truth, right)
    assert found["many_percent"] == 50 and found["medium_percent"] == 50 and found["few_percent"] == pytest.approx(200 / 3)
    assert found["per_class_percent"] == pytest.approx(100 * (0.5 + 1 + 0 + 2 / 3) / 4)


class TestLists:
    def test_simclr_and_long_tail_lists_find_their_images(self, data, tmp_path):
        source = open_source(data[0])
        (tmp_path / "1percent.txt").write_text("b_0.png\nr_3.png\n\nr_9.png\n")
        positions, notes = positions_of_list(source, tmp_path / "1percent.txt")
        assert [source.name(int(i)) for i in positions] == ["blue one/b_0.png", "red/r_3.png", "red/r_9.png"] and notes == []
        (tmp_path / "lt.txt").write_text("train/blue one/b_1.png 0\ntrain/grün/g_2.png 17\ntrain/red/gone.png 2\n")
        positions, notes = positions_of_list(source, tmp_path / "lt.txt")
        assert [source.name(int(i)) for i in positions] == ["blue one/b_1.png", "grün/g_2.png"]
        assert notes == [f"1 of the 3 images that {tmp_path / 'lt.txt'} lists are not in {data[0]}: train/red/gone.png."]

    def test_mistakes_are_sentences(self, data, tmp_path):
        source = open_source(data[0])
        (tmp_path / "none.txt").write_text("n01_1.JPEG\n")
        with pytest.raises(ValueError, match="None of the 1 images"):
            positions_of_list(source, tmp_path / "none.txt")
        with pytest.raises(ValueError, match="cannot be read as a list"):
            positions_of_list(source, tmp_path / "gone.txt")

    def test_the_command_takes_them(self, data, checkpoint, tmp_path, capsys):
        names = [f"{name[0]}_{i}.png" for name in COLOURS for i in range(4)]
        (tmp_path / "some.txt").write_text("\n".join(names))
        options = ("--subset", str(tmp_path / "some.txt"), "--no-baselines", "--lambdas", "1e-3")
        result = found(capsys, "logistic", data, checkpoint, *options)
        assert result["data"]["train"]["images"] == 12 and result["data"]["train"]["classes"] == 3
        result = found(capsys, "logistic", data, checkpoint, "--fraction", "0.2", "--no-baselines")
        assert result["data"]["train"]["images"] == 6


class TestTraps:
    def test_labels_in_another_order_are_matched_by_name(self, checkpoint, tmp_path, capsys):
        train = write_colours(tmp_path / "train", 6)
        test = write_colours(tmp_path / "test", 3, classes=("red", "grün"), seed=9)  # "red" is class 1 here and class 2 there
        for name in ("linear", "logistic"):
            options = LINEAR if name == "linear" else ()
            result = found(capsys, name, (train, test), checkpoint, "--no-baselines", *options)
            assert result["results"]["teacher"]["best_percent"] == 100

    @pytest.mark.parametrize("name", ["linear", "logistic", "fewshot"])
    def test_a_test_class_without_training_images_is_a_sentence(self, name, checkpoint, tmp_path, capsys):
        train = write_colours(tmp_path / "train", 4, classes=("red", "grün"))
        test = write_colours(tmp_path / "test", 2)
        assert evaluate(name, (train, test), checkpoint, *(LINEAR if name == "linear" else ())) == 2
        assert "The test images have classes that no training image has: blue one." in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["linear", "logistic", "fewshot"])
    def test_unreadable_images_in_the_midst_are_named(self, name, checkpoint, tmp_path, capsys):
        train, test = write_colours(tmp_path / "train", 5), write_colours(tmp_path / "test", 3)
        (train / "grün" / "g_2.png").write_bytes(b"no image")
        (test / "red" / "r_0.png").write_bytes(b"")
        options = {"linear": LINEAR, "logistic": ("--lambdas", "1e-3"), "fewshot": ("--draws", "1", "--epochs", "2", "--heads", "linear")}
        result = found(capsys, name, (train, test), checkpoint, "--no-baselines", *options[name])
        assert result["unreadable"] == ["grün/g_2.png", "red/r_0.png"]

    def test_classes_of_one_image_survive_a_share(self, checkpoint, tmp_path, capsys):
        train, test = write_colours(tmp_path / "train", 1), write_colours(tmp_path / "test", 2, seed=7)
        result = found(capsys, "logistic", (train, test), checkpoint, "--fraction", "0.1", "--validation", "0", "--no-baselines")
        assert result["data"]["train"]["images"] == 3

    def test_nothing_left_to_train_on_is_a_sentence(self):
        with pytest.raises(ValueError, match="would be left"):
            held_out(1, 0.1, 0)
        with pytest.raises(ValueError, match="must be at least 0 and below 1"):
            validation_of("1.5")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--views", "many"), "Views are 'many'"),
            (("--rates", "0"), "must be one or more positive numbers"),
            (("--epochs", "0"), "--epochs is 0"),
            (("--features", "patches"), "needs one vector per image"),
            (("--batch-size", "0"), "--batch-size is 0; it must be at least 1"),
        ],
    )
    def test_mistakes_are_sentences(self, options, message, data, checkpoint, capsys):
        assert evaluate("linear", data, checkpoint, *options) == 2
        assert message in capsys.readouterr().err


def test_augmented_views_depend_on_seed_view_and_image_alone(data):
    source = open_source(data[0])
    first, second = (AugmentedImages(source, 8, view=1, seed=3) for _ in range(2))
    part = AugmentedImages(source, 8, view=1, seed=3, positions=[4, 2])
    assert torch.equal(first[4][0], second[4][0]) and torch.equal(first[4][0], part[0][0]) and torch.equal(first[2][0], part[1][0])
    other, seed = AugmentedImages(source, 8, view=2, seed=3), AugmentedImages(source, 8, view=1, seed=4)
    assert not torch.equal(first[4][0], other[4][0]) and not torch.equal(first[4][0], seed[4][0])
    assert first[4][0].shape == (3, 8, 8) and first[4][0].dtype == torch.uint8


def test_the_published_sweep_and_features():
    assert len(PUBLISHED_RATES) == 45 and min(PUBLISHED_RATES) == 1e-4 and max(PUBLISHED_RATES) == 9
    small = build_backbone("vit_tiny_patch16_224", image_size=16, model_args=ARGUMENTS)
    wide = build_backbone("vit_tiny_patch16_224", image_size=16, model_args=ARGUMENTS | dict(embed_dim=768, num_heads=12))
    shallow = build_backbone("vit_tiny_patch16_224", image_size=16, model_args=ARGUMENTS | dict(depth=1))
    convolutional = build_backbone("resnet18", image_size=32)
    assert [linear_recipe(net) for net in (small, wide, shallow, convolutional)] == ["cls4", "cls+mean", "cls", "pooled"]
