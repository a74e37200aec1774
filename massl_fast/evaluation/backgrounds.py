"""How much a classifier leans on backgrounds: ImageNet-9 with its foregrounds and backgrounds exchanged (Xiao et al. 2020; iBOT, MaSSL)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from massl_fast.evaluation.base import Figure, Protocol, Result, Settings, described
from massl_fast.evaluation.heads import Sweep, correct_of_heads, train_heads
from massl_fast.evaluation.images import SizedImages, Square, files_below
from massl_fast.evaluation.layouts.imagenet9 import CLASSES, VARIANTS, imagenet_to_nine, read_variants
from massl_fast.evaluation.metrics.backgrounds import background_gap, mapped_accuracy
from massl_fast.evaluation.selection import held_out
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.tokens import vectors_of

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
    train: str
    """Labelled images that a linear head is trained on: the 1,000 classes of ImageNet, or classes called by the nine names."""
    epochs: int = Field(100, ge=1)
    """Epochs of the head, on centre crops."""
    batch: int = Field(1024, ge=1)
    """Images of a step of the head."""


class Backgrounds(Protocol):
    """Backgrounds: accuracy of a linear head on images whose background was kept, removed, or exchanged (ImageNet-9).

    The head's largest output counts among all of its classes; one that belongs to none of the nine is wrong. BG-gap is mixed_same less
    mixed_rand.
    """

    name = "backgrounds"
    title = "Accuracy with other backgrounds, %"
    Settings = BackgroundsSettings
    settings: BackgroundsSettings

    def figures(self) -> list[Figure]:
        figures = [Figure(f"{name}_percent", name.replace("_", " ")) for name in VARIANTS]
        return [*figures, Figure("background_gap_percent", "BG-gap", higher_is_better=False)]

    def prepare(self, subject: Subject) -> list[str]:
        subject.features_name()
        train = subject.source(self.settings.train, "train", "train")
        nine_of(train.classes, self.settings.train)
        missing = sorted(set(VARIANTS) - {variant.name for variant in read_variants(Path(self.settings.data))})
        notes = [f"{self.settings.data} lacks {', '.join(missing)}."] if missing else []
        return [*train.notes, *notes]

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        side, recipe = subject.size_or(IMAGE_SIZE), subject.features_name()
        images = subject.labelled(subject.source(settings.train, "train", "train"), image_size=side)
        train = subject.features(images, recipe)
        mapping = nine_of(images.source.classes, settings.train)
        variants = read_variants(Path(settings.data))
        unreadable = list(next(iter(train.values())).unreadable)
        vectors, targets = {}, {}
        for variant in variants:
            of = SizedImages(files_below(variant.root, variant.files), Square(side), shard=subject.shard)
            vectors[variant.name], positions = vectors_of(subject, of, recipe)
            targets[variant.name] = np.array(variant.labels)[positions]
            unreadable += of.names_of_unreadable()
        results, rates = {}, {}
        for name, part in train.items():
            if part.features.shape[1] != vectors[variants[0].name][name].shape[1]:
                notes.append(f"Images of {side} px are too small to compare raw pixels; they are left out.")
                continue
            weight, rates[name] = self._head(subject, part.features, part.labels, len(images.source.classes))
            accuracy = {variant: mapped_accuracy(_classes(of[name], weight), targets[variant], mapping) for variant, of in vectors.items()}
            results[name] = {f"{variant}_percent": 100 * value for variant, value in accuracy.items()}
            gap = background_gap(accuracy)
            results[name]["background_gap_percent"] = None if gap is None else 100 * gap
        departures = [
            "The head is trained on centre crops with a rate chosen on held-out training images; iBOT's is that of its linear probe."
        ]
        imagenet = len(mapping) == 1000
        if not imagenet:
            departures.append(f"The head has {len(mapping)} classes of {settings.train}; the published one has the 1,000 of ImageNet.")
        if any(len(variant.files) != BENCHMARK for variant in variants) or len(variants) != len(VARIANTS):
            departures.append(
                f"The variants have {max(len(v.files) for v in variants)} images at most; ImageNet-9 has {BENCHMARK} of each."
            )
        if side != IMAGE_SIZE:
            departures.append(f"Images are resized to {side} px.")
        chance = np.bincount(mapping[mapping >= 0], minlength=len(CLASSES)) / len(mapping)
        return Result(
            results=results,
            data={
                "train": described(settings.train, images),
                "test": {"path": settings.data, "images": {variant.name: len(variant.files) for variant in variants}},
            },
            features=recipe,
            image_size=side,
            about=f"A linear head on {len(images.labels)} images of {settings.train}, tested on {len(variants)} variants of "
            f"{settings.data}.",
            departures=departures,
            notes=notes,
            unreadable=tuple(unreadable),
            published=[dict(who=who, value=value, source="MaSSL, ImageNet-9") for who, value in PUBLISHED.items()]
            if len(departures) == 1
            else [],
            more={"learning_rates": rates, "chance_percent": dict(zip(CLASSES, (100 * chance).tolist()))},
        )

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
