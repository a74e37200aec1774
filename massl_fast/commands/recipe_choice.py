"""A recipe for people who name only their images: chosen by number and size of the images and by the machine, with the reason said.

What it gives is a place to start from, not a published setting: a run that learns something soon. Settings on the command line lie on top.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from massl_fast.config import Config, chosen_objective, load_config, parse_overrides, recipe_names
from massl_fast.data.decode import EncodedImage, UnreadableImage
from massl_fast.data.loaders import open_data
from massl_fast.data.sources import Source

LOOKED_AT = 32
"""Images whose sizes are read, spread evenly over the set."""
TINY = 64
"""Images whose shorter side has at most so many pixels are for networks with small patches."""
MANY = 5000
"""From here on a GPU trains a transformer for epochs; fewer images get a convolutional network and a fixed number of steps."""
FEWEST = 8
FEWEST_STEPS = 16
"""Per epoch, on a GPU."""
GIB_PER_IMAGE = 0.2
"""Of a GPU's memory, for a ViT-S/16 with 2 × 224 and 10 × 96 pixels: half as much again as `profile memory --estimate` says."""
STEPS = 700
LARGEST_BATCH = 64
PHOTO_CROPS = ("--crops.global_size", "64", "--crops.local_size", "32")
"""Pixels of what a CPU, or a network for few images, sees of photos."""


@dataclass(frozen=True)
class Choice:
    """A recipe, settings that fit it to the images, and the sentences that say so."""

    recipe: str
    settings: list[str]
    """As on a command line; below those of the user."""
    why: str


def config_without_recipe(settings: Sequence[str]) -> Config:
    """The settings of a run whose command line names images and no recipe. The choice and its reason are the first of ``config.notes``.

    Raises ValueError where no images are named, where they cannot be opened or are too few, and for mistakes in ``settings``.
    """
    given = {".".join(path): value for path, value in parse_overrides(settings)}
    if not given.get("data.train"):
        raise ValueError(
            f"--recipe and --data.train are missing. Name images (--data.train my_photos), and the command chooses a recipe for them; or "
            f"name one of {', '.join(recipe_names())}, or the path of a YAML file."
        )
    if given["data.train"] == "demo":  # its images fit its recipe
        config = load_config("demo", settings)
        config.notes.insert(0, _sentence("demo", "these are its images"))
        return config
    source = open_data(str(given["data.train"]), "data.train", "train")
    gpu = given.get("train.device", "auto") != "cpu" and torch.cuda.is_available()
    gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else 0.0
    steps, epochs = given.get("train.steps"), given.get("train.epochs")
    own_steps = steps if isinstance(steps, int) and steps > 0 else STEPS
    choice = choose(len(source), shorter_side(source), gpu_gib, chosen_objective("", settings), own_steps)
    if isinstance(epochs, int | float) and epochs > 0 and not steps:  # the length that the user names, whatever the recipe's is
        choice.settings.extend(["--train.steps", "0", "--optimizer.warmup_epochs", f"{epochs / 10:g}"])
    folder = [] if given.get("run.folder") else ["--run.folder", f"runs/{_name_of(str(given['data.train']))}"]
    config = load_config(choice.recipe, [*choice.settings, *folder, *settings])
    config.notes.insert(0, choice.why)
    if source.classes and not given.get("evaluation.train"):
        config.notes.insert(
            1,
            f"Training ignores the {len(source.classes)} classes of these images. To see k-NN accuracy rise, name labelled "
            f"images that it does not train on: --evaluation.train {given['data.train']} --evaluation.test HELD_OUT.",
        )
    return config


def choose(images: int, side: int, gpu_gib: float, objective: str, steps: int = STEPS) -> Choice:
    """The recipe for ``images`` images whose shorter side has ``side`` pixels (their median), on a GPU with ``gpu_gib`` GiB of memory, or,
    where that is 0, on a CPU. ``steps`` is the length of a run on a CPU or on few images.

    Raises ValueError where there are too few images to compare with each other.
    """
    if images < FEWEST:
        raise ValueError(
            f"{images} image{'s are' if images != 1 else ' is'} too few to learn from without a recipe: the objectives compare images with "
            f"each other. {FEWEST} are the least, thousands are better."
        )
    tiny = side <= TINY
    words = "many" if images >= MANY else "few", "tiny" if tiny else "large"
    of_them = f"the {images} images are {words[0]} and {words[1]} ({side} pixels at the shorter side)"
    if gpu_gib and images >= MANY:
        recipe = _recipe_of(objective, "cifar10" if tiny else "in1k")
        batch = load_config(recipe).train.global_batch
        settings, fitted = [], []
        if images < FEWEST_STEPS * batch:
            batch = 2 ** int(math.log2(images / FEWEST_STEPS))
            settings += ["--train.global_batch", str(batch)]
            fitted.append(f"batches of {batch} images make at least {FEWEST_STEPS} steps per epoch")
        at_once = 2 ** int(math.log2(gpu_gib / GIB_PER_IMAGE))
        if not tiny and batch > at_once:
            settings += ["--train.micro_batch", str(at_once)]
            fitted.append(f"micro-batches of {at_once} are for the {gpu_gib:.0f} GiB of the GPU")
        return Choice(recipe, settings, _sentence(recipe, f"{of_them}, and there is a GPU", " and ".join(fitted)))
    recipe = "demo" if objective == "massl" else _recipe_of(objective, "cifar10")
    batch = min(LARGEST_BATCH, 2 ** int(math.log2(images / 2)))
    settings = ["--train.steps", str(steps), "--train.global_batch", str(batch), "--evaluation.train", "", "--evaluation.test", ""]
    settings += [] if tiny else PHOTO_CROPS
    # Warming up takes a tenth of the run, whatever an epoch is.
    settings += ["--optimizer.warmup_epochs", f"{steps / 10 / (images // batch):.4g}"]
    if objective == "massl":
        memory = min(4096, max(8 * batch, 2 ** int(math.log2(images))))
        settings += ["--objective.memory_size", str(memory), "--objective.block_size", str(memory // 4)]
    fitted = f"{steps} steps of {batch} images in {'32' if tiny else '64'}-pixel crops are a first look, not a full training"
    if objective == "massl" and tiny and images >= MANY:
        fitted += "; --recipe cifar10_cpu takes hours instead of minutes and reaches further"
    return Choice(recipe, settings, _sentence(recipe, of_them if gpu_gib else f"{of_them}, and there is no GPU", fitted))


def shorter_side(source: Source) -> int:
    """Median of the shorter sides of some images, pixels. Raises ValueError where none of them can be read."""
    sides = []
    for position in torch.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).long().tolist():
        try:
            image = EncodedImage(source.read(position), source.name(position))
        except (OSError, UnreadableImage):
            continue
        sides.append(min(image.width, image.height))
    if not sides:
        raise ValueError(
            f"None of {min(LOOKED_AT, len(source))} images of {source.path} can be read. massl-fast data check {source.path} says what is "
            f"wrong with them."
        )
    return sorted(sides)[len(sides) // 2]


def _recipe_of(objective: str, kind: str) -> str:
    """The shipped recipe of an objective for tiny images (cifar10) or for photos (in1k); MaSSL's for objectives of plugins."""
    names = recipe_names()
    if kind == "in1k":
        found = [name for name in names if name.startswith(f"{objective}_") and not name.endswith("cifar10")]
        return found[0] if found else "vit_small_in1k"
    return f"{objective}_cifar10" if f"{objective}_cifar10" in names else "cifar10"


def _sentence(recipe: str, why: str, fitted: str = "") -> str:
    fitted = f" {fitted[0].upper()}{fitted[1:]}." if fitted else ""
    return f"No recipe is named. This run takes {recipe}, because {why}.{fitted} --recipe NAME takes another."


def _name_of(data: str) -> str:
    """A name for the run's folder, from the path of its images."""
    parts: list[Any] = [part for part in Path(data.split("{")[0]).parts if part not in ("/", ".", "..")]
    name = parts[-1].rstrip("-_.") if parts else "run"
    if name in ("train", "images", "data") and len(parts) > 1:
        name = f"{parts[-2]}-{name}"
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
