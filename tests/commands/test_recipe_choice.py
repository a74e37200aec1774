"""massl-fast train without a recipe: what is chosen for whom, that it is a run, and what is said."""

import itertools
from pathlib import Path

import pytest

from massl_fast.cli import main
from massl_fast.commands import recipe_choice
from massl_fast.commands.recipe_choice import FEWEST, MANY, choose, config_without_recipe, shorter_side
from massl_fast.config import load_config
from massl_fast.data.sources import open_source
from massl_fast.length import length_of
from small_images import write_images

OBJECTIVES = ("massl", "carp", "dino", "ibot", "mmc", "moco_v3")


@pytest.mark.parametrize(
    ("images", "side", "gpu_gib", "recipe", "words"),
    [
        (50, 600, 0, "demo", ["50 images", "few", "no GPU", "a first look"]),
        (100_000, 32, 0, "demo", ["100000 images", "many and tiny", "no GPU", "--recipe cifar10_cpu"]),
        (50, 600, 80, "demo", ["few"]),
        (100_000, 32, 80, "cifar10", ["tiny", "there is a GPU"]),
        (1_300_000, 300, 80, "vit_small_in1k", ["large", "there is a GPU"]),
        (1_300_000, 300, 8, "vit_small_in1k", ["Micro-batches of 32", "8 GiB"]),
        (MANY, 32, 80, "cifar10", ["at least 16 steps per epoch"]),
    ],
)
def test_number_and_size_of_images_and_the_machine_choose(images, side, gpu_gib, recipe, words):
    choice = choose(images, side, gpu_gib, "massl")
    assert choice.recipe == recipe and f"takes {recipe}, because" in choice.why
    assert not [word for word in words if word not in choice.why], choice.why


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_choice_is_a_run_with_steps_and_a_warm_up_inside_it(objective):
    for images, side, gpu_gib in itertools.product((FEWEST, 50, MANY, 100_000), (32, 600), (0, 12)):
        choice = choose(images, side, gpu_gib, objective)
        config = load_config(choice.recipe, [*choice.settings, "--objective.name", objective])
        steps_per_epoch = images // config.train.global_batch
        length = length_of(config, steps_per_epoch, world_size=1)
        assert steps_per_epoch >= 2 and config.train.global_batch >= 4
        assert length.steps(config.optimizer.warmup_epochs) < length.total_steps
        assert config.objective.name == objective and not config.evaluation.train


def test_too_few_images_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="3 images are too few to learn from"):
        choose(3, 600, 0, "massl")


def test_images_choose_the_settings_and_the_command_line_lies_on_top(tmp_path):
    photos = write_images(tmp_path / "my_photos", classes=2, per_class=8)
    config = config_without_recipe(["--data.train", str(photos), "--train.steps", "3"])
    assert config.train.steps == 3 and config.train.global_batch == 8 and config.run.folder == "runs/my_photos"
    assert "takes demo, because the 16 images are few" in config.notes[0]
    assert "2 classes" in config.notes[1] and "--evaluation.train" in config.notes[1]
    assert config.optimizer.warmup_epochs * 2 < 3, "2 steps per epoch: the warm-up follows the length"
    assert config_without_recipe(["--data.train", str(photos), "--run.folder", "runs/x"]).run.folder == "runs/x"
    by_epochs = config_without_recipe(["--data.train", str(photos), "--train.epochs", "20"])
    assert by_epochs.train.steps == 0 and by_epochs.train.epochs == 20 and by_epochs.optimizer.warmup_epochs == 2


def test_the_demos_images_have_a_recipe_of_their_own():
    config = config_without_recipe(["--data.train", "demo"])
    assert config.evaluation.test == "demo" and config.run.folder == "runs/demo" and "demo, because these are its images" in config.notes[0]


def test_the_size_of_images_is_read_past_broken_ones(tmp_path):
    photos = write_images(tmp_path / "photos", classes=1, per_class=9)
    for path in sorted(photos.rglob("*.*"))[:4]:
        path.write_bytes(b"no image")
    assert shorter_side(open_source(photos)) > 0
    for path in photos.rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"None of 9 images of .* can be read"):
        shorter_side(open_source(photos))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("my_photos", "my_photos"),
        ("/a/imagenet/train", "imagenet-train"),
        ("c/train-{000..003}.tar", "c-train"),
        ("/", "run"),
        ("my pictures/", "my-pictures"),
    ],
)
def test_the_runs_folder_is_named_after_the_images(data, name):
    assert recipe_choice._name_of(data) == name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], ["--recipe and --data.train are missing", "my_photos"]),
        (["--data.train", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--data.train", ""], ["missing"]),
    ],
)
def test_mistakes_without_a_recipe_are_sentences(settings, words, capsys):
    assert main(["train", *settings]) == 2
    complaint = capsys.readouterr().err
    assert "Traceback" not in complaint and not [word for word in words if word not in complaint]


def test_photos_without_a_recipe_are_trained_on(tmp_path, capsys):
    photos = write_images(tmp_path / "my_photos", classes=2, per_class=8)
    few = ["--train.steps", "2", "--optimizer.warmup_epochs", "0", "--logging.tensorboard", "false", "--data.num_workers", "0"]
    small = ["--crops.global_size", "16", "--crops.local_size", "8", "--data.loader", "torchvision"]
    assert main(["train", "--data.train", str(photos), "--run.folder", str(tmp_path / "run"), *few, *small]) == 0
    told = capsys.readouterr()
    assert "because the 16 images are few" in told.err and Path(tmp_path, "run", "summary.json").is_file()
