"""How much a classifier leans on backgrounds: ImageNet-9 with its foregrounds and backgrounds exchanged (Xiao et al. 2020; iBOT, MaSSL)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from massl_fast.data.decode import decode_rgb
from massl_fast.evaluation.base import Figure, Protocol, Result, Settings, described
from massl_fast.evaluation.heads import Sweep, correct_of_heads, train_heads
from massl_fast.evaluation.images import SizedImages, Square, files_below, in_order
from massl_fast.evaluation.layouts.imagenet9 import (
    CLASSES,
    VARIANTS,
    imagenet_to_nine,
    read_foreground,
    read_foregrounds,
    read_variants,
)
from massl_fast.evaluation.metrics.backgrounds import background_gap, mapped_accuracy
from massl_fast.evaluation.selection import held_out
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.tokens import evaluated, normalised, vectors_of
from massl_fast.models.published import read_linear_head

IMAGE_SIZE = 224
BENCHMARK = 4050
RATES = (0.001, 0.01, 0.1, 1.0)
# MaSSL, ImageNet-9: OF, MS, MR, MN, NF, OBB, OBT, clean.
PUBLISHED = {
    "iBOT ViT-B/16": "91.9 89.7 81.9 79.7 54.7 17.6 20.4 96.8",
    "MaSSL ViT-B/16": "91.0 90.2 83.0 80.4 53.4 15.8 23.7 97.6",
}


class BackgroundsSettings(Settings):
    data: str
    """Folder bg_challenge, with VARIANT/val/NN_class/."""
    train: str = ""
    """Labelled images that a linear head is trained on: the 1,000 classes of ImageNet, or classes called by the nine names."""
    head: str = ""
    """In place of train: file of a linear head, .safetensors or .pth, with the 1,000 classes of ImageNet or the nine in their order."""
    epochs: int = Field(100, ge=1)
    """Epochs of the head, on centre crops."""
    batch: int = Field(1024, ge=1)
    """Images of a step of the head."""
    challenge: bool = False
    """Put every foreground before every background of only_bg_t, too, and count those that none of them fools."""

    @model_validator(mode="after")
    def _one_head(self) -> BackgroundsSettings:
        if bool(self.train) == bool(self.head):
            raise ValueError("A linear head is needed: give the images to train it on as train, or the file of a trained one as head.")
        return self


class Backgrounds(Protocol):
    """Backgrounds: accuracy of a linear head on images whose background was kept, removed, or exchanged (ImageNet-9).

    The head's largest output counts among all of its classes; one that belongs to none of the nine is wrong. BG-gap is mixed_same less
    mixed_rand. The challenge counts foregrounds that are named before every background of only_bg_t.
    """

    name = "backgrounds"
    title = "Accuracy with other backgrounds, %"
    Settings = BackgroundsSettings
    settings: BackgroundsSettings

    def figures(self) -> list[Figure]:
        figures = [Figure(f"{name}_percent", name.replace("_", " ")) for name in VARIANTS]
        figures.append(Figure("background_gap_percent", "BG-gap", higher_is_better=False))
        return [*figures, Figure("challenge_percent", "challenge")] if self.settings.challenge else figures

    def prepare(self, subject: Subject) -> list[str]:
        subject.features_name()
        said = []
        if self.settings.train:
            train = subject.source(self.settings.train, "train", "train")
            nine_of(train.classes, self.settings.train)
            said = train.notes
        else:
            self._given_head()
        if self.settings.challenge:
            read_foregrounds(Path(self.settings.data))
        missing = sorted(set(VARIANTS) - {variant.name for variant in read_variants(Path(self.settings.data))})
        notes = [f"{self.settings.data} lacks {', '.join(missing)}."] if missing else []
        return [*said, *notes]

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        side, recipe = subject.size_or(IMAGE_SIZE), subject.features_name()
        variants = read_variants(Path(settings.data))
        unreadable: list[str] = []
        vectors, targets = {}, {}
        for variant in variants:
            of = SizedImages(files_below(variant.root, variant.files), Square(side), shard=subject.shard)
            vectors[variant.name], positions = vectors_of(subject, of, recipe)
            targets[variant.name] = np.array(variant.labels)[positions]
            unreadable += of.names_of_unreadable()
        heads, mapping, data, more = self._heads(subject, recipe, side, notes)
        unreadable[:0] = data.pop("unreadable", [])
        results = {}
        for name, weight in heads.items():
            if weight.shape[1] - 1 != vectors[variants[0].name][name].shape[1]:
                notes.append(f"The head is for {weight.shape[1] - 1} features, and those of {name} are others; they are left out.")
                continue
            accuracy = {variant: mapped_accuracy(_classes(of[name], weight), targets[variant], mapping) for variant, of in vectors.items()}
            results[name] = {f"{variant}_percent": 100 * value for variant, value in accuracy.items()}
            gap = background_gap(accuracy)
            results[name]["background_gap_percent"] = None if gap is None else 100 * gap
        if settings.challenge:
            for name, percent in self._challenge(subject, {name: heads[name] for name in results}, mapping, side, recipe).items():
                results[name]["challenge_percent"] = percent
        departures = []
        if settings.train:
            departures.append(
                "The head is trained on centre crops with a rate chosen on held-out training images; iBOT's is that of its linear probe."
            )
        if len(mapping) != 1000:
            departures.append(
                f"The head has {len(mapping)} classes of {settings.train or settings.head}; the published one has the 1,000 of ImageNet."
            )
        if any(len(variant.files) != BENCHMARK for variant in variants) or len(variants) != len(VARIANTS):
            departures.append(
                f"The variants have {max(len(v.files) for v in variants)} images at most; ImageNet-9 has {BENCHMARK} of each."
            )
        if side != IMAGE_SIZE:
            departures.append(f"Images are resized to {side} px.")
        chance = np.bincount(mapping[mapping >= 0], minlength=len(CLASSES)) / len(mapping)
        return Result(
            results=results,
            data={**data, "test": {"path": settings.data, "images": {variant.name: len(variant.files) for variant in variants}}},
            features=recipe,
            image_size=side,
            about=f"A linear head {f'on images of {settings.train}' if settings.train else f'from {settings.head}'}, tested on "
            f"{len(variants)} variants of {settings.data}.",
            departures=departures,
            notes=notes,
            unreadable=tuple(unreadable),
            published=[dict(who=who, value=value, source="MaSSL, ImageNet-9") for who, value in PUBLISHED.items()]
            if len(departures) == bool(settings.train)
            else [],
            more={**more, "chance_percent": dict(zip(CLASSES, (100 * chance).tolist()))},
        )

    def _heads(
        self, subject: Subject, recipe: str, side: int, notes: list[str]
    ) -> tuple[dict[str, Tensor], np.ndarray, dict[str, Any], dict[str, Any]]:
        """(weights and biases [C, D + 1] per network, class of ImageNet-9 of each output or -1, entries of ``data`` and of ``more``)."""
        if self.settings.head:
            weight, mapping = self._given_head()
            notes.append("The head is the teacher's; other networks and raw pixels have none, and are left out.")
            return {next(iter(subject.networks)): weight}, mapping, {}, {}
        images = subject.labelled(subject.source(self.settings.train, "train", "train"), image_size=side)
        train = subject.features(images, recipe)
        heads, rates = {}, {}
        for name, part in train.items():
            heads[name], rates[name] = self._head(subject, part.features, part.labels, len(images.source.classes))
        data = {"train": described(self.settings.train, images), "unreadable": list(next(iter(train.values())).unreadable)}
        return heads, nine_of(images.source.classes, self.settings.train), data, {"learning_rates": rates}

    def _given_head(self) -> tuple[Tensor, np.ndarray]:
        weight, bias = read_linear_head(Path(self.settings.head))
        if len(weight) not in (1000, len(CLASSES)):
            raise ValueError(
                f"The head in {self.settings.head} has {len(weight)} classes; it needs the 1,000 of ImageNet or the nine of ImageNet-9."
            )
        return torch.cat([weight, bias[:, None]], 1), imagenet_to_nine() if len(weight) == 1000 else np.arange(len(CLASSES))

    def _challenge(self, subject: Subject, heads: dict[str, Tensor], mapping: np.ndarray, side: int, recipe: str) -> dict[str, float]:
        """Percent of foregrounds that every network still names before each background of only_bg_t, whatever its class."""
        behind = next((variant for variant in read_variants(Path(self.settings.data)) if variant.name == "only_bg_t"), None)
        if behind is None:
            raise ValueError(f"The challenge needs the backgrounds of {self.settings.data}/only_bg_t, which is not there.")
        backgrounds = np.stack([np.asarray(decode_rgb((behind.root / name).read_bytes(), name)) for name in behind.files])
        functions = {name: function for name, function in subject.functions(recipe).items() if name in heads}
        foregrounds, rows = read_foregrounds(Path(self.settings.data)), []
        for position in range(len(foregrounds))[subject.shard[0] :: subject.shard[1]]:
            pixels, mask = read_foreground(foregrounds[position])
            if pixels.shape != backgrounds.shape[1:]:
                raise ValueError(f"{foregrounds[position].image} and the backgrounds of only_bg_t differ in size.")
            held = dict.fromkeys(functions, True)
            for first in range(0, len(backgrounds), subject.batch_size):
                together = np.where(mask[..., None], pixels, backgrounds[first : first + subject.batch_size])
                batch = torch.from_numpy(together).permute(0, 3, 1, 2)
                if batch.shape[-1] != side:
                    batch = F.interpolate(batch.float(), size=(side, side), mode="bicubic", antialias=True).clamp(0, 255)
                with evaluated(subject):
                    batch = normalised(subject, batch)
                    for name in [name for name, still in held.items() if still]:
                        found = mapping[_classes(functions[name](batch).float().cpu(), heads[name])]
                        held[name] = bool((found == foregrounds[position].label).all())
                if not any(held.values()):
                    break
            rows.append((position, held))
        ordered = in_order(rows, subject.shard)
        return {name: 100 * sum(held[name] for _, held in ordered) / len(ordered) for name in functions}

    def _head(self, subject: Subject, features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, float]:
        """(weights and biases [C, D + 1], learning rate) of the head whose rate is best on held-out images, trained on all."""
        settings = self.settings
        out = held_out(len(labels), 0.1, subject.seed)
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[out] = False
        rates = tuple(rate * settings.batch / 256 for rate in RATES)
        chosen = dict(classes=classes, epochs=settings.epochs, batch_size=settings.batch, seed=subject.seed, device=subject.device)
        heads, _ = train_heads(lambda epoch: features[kept], labels[kept], Sweep(rates), **chosen)
        if not len(heads):
            raise ValueError("Every learning rate diverged on these features; normalise them by choosing other --features.")
        best = int(heads.numbers[correct_of_heads(heads, features[out], labels[out]).argmax()])
        heads, _ = train_heads(lambda epoch: features, labels, Sweep((rates[best],)), **chosen)
        if not len(heads):
            raise ValueError("The head diverged on all training images though not on nine tenths of them; take another --seed.")
        return heads.weight[0, :, : features.shape[1] + 1].cpu(), RATES[best]


def _classes(features: Tensor, weight: Tensor) -> np.ndarray:
    return (features @ weight[:, :-1].T + weight[:, -1]).argmax(1).numpy()


def nine_of(classes: tuple[str, ...], path: str) -> np.ndarray:
    """Class of ImageNet-9 of each class of the head, or -1.

    Raises:
        ValueError: the classes are neither the 1,000 of ImageNet (folders n01440764 and so on) nor called by the nine names or numbers.
    """
    if len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return imagenet_to_nine()
    plain = [re.sub(r"[^a-z]", "", name) for name in CLASSES]
    mapping = []
    for name in classes:
        number = re.match(r"(\d{1,2})_", name)
        letters = re.sub(r"[^a-z]", "", name.lower())
        mapping.append(int(number[1]) if number and int(number[1]) < len(CLASSES) else plain.index(letters) if letters in plain else -1)
    if max(mapping) < 0:
        raise ValueError(
            f"The classes of {path} are neither the 1,000 of ImageNet nor any of {', '.join(CLASSES)}. Call folders by these names, "
            f"such as "
            f"02_wheeled vehicle."
        )
    return np.array(mapping)
