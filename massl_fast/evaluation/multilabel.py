"""Linear support vector machines on images with several labels: VOC07 as CARP and PCL report it, whole and with n images per class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from massl_fast.evaluation.base import Figure, Protocol, Result, Settings
from massl_fast.evaluation.extra import needs
from massl_fast.evaluation.features import resize_and_crop
from massl_fast.evaluation.images import SizedImages, files_below
from massl_fast.evaluation.layouts.voc import MultiLabel, read_multilabel
from massl_fast.evaluation.metrics.multilabel import average_precision_11_points, average_precision_area
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.svm import svm_decisions, unit_rows
from massl_fast.evaluation.tokens import vectors_of

IMAGE_SIZE = 224
BENCHMARK = (5011, 4952)
COLUMNS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    "map_as_published_percent": ("mAP as published", lambda *pair: average_precision_area(*pair, difficult="negative")),
    "map_area_percent": ("mAP area", average_precision_area),
    "map_11_point_percent": ("mAP 11 points", average_precision_11_points),
}


@dataclass(frozen=True)
class CentreCrop:
    """Shorter side to 256/224 of the side, bilinear as CARP's, then the centre."""

    side: int

    def __call__(self, image: Image.Image, position: int) -> Image.Image:
        return resize_and_crop(image, self.side, 256 / 224, Image.Resampling.BILINEAR)


class MultilabelSettings(Settings):
    data: str
    """Folder VOCdevkit/VOC2007, with JPEGImages and ImageSets/Main/CLASS_{trainval,test}.txt."""
    per_class: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Positives of each class that are drawn; every class trains on all that were drawn."""
    draws: int = Field(5, ge=1)
    """Draws that are averaged."""
    cost: float = Field(0.5, gt=0)
    """C of the support vector machines."""

    @field_validator("per_class")
    @classmethod
    def _positive(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if any(count < 1 for count in counts):
            raise ValueError(f"--per-class is {list(counts)}; the numbers of images must be positive.")
        return counts


class Multilabel(Protocol):
    """Several labels per image (VOC07): one linear support vector machine per class on frozen features, mean average precision.

    As published, difficult images are negatives and the average precision is the area of VOC2010. The columns area and 11 points ignore
    difficult images in the test, as the devkit does. Columns n = … train on n positives per class: mean over draws.
    """

    name = "multilabel"
    title = "Mean average precision, %"
    Settings = MultilabelSettings
    settings: MultilabelSettings

    def figures(self) -> list[Figure]:
        figures = [Figure(key, title) for key, (title, _) in COLUMNS.items()]
        return figures + [Figure(f"n{count}_percent", f"n = {count}") for count in self.settings.per_class]

    def prepare(self, subject: Subject) -> list[str]:
        needs("sklearn.svm", "the linear support vector machines of VOC07")
        subject.features_name()
        train, test = self._sets()
        kept = judged(train, test)
        left_out = [name for number, name in enumerate(train.classes) if number not in kept]
        if not kept:
            raise ValueError(f"No class of {self.settings.data} has a positive in both trainval and test.")
        return [f"Classes without a positive in trainval or test are left out: {', '.join(left_out)}."] if left_out else []

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        sets = self._sets()
        recipe, side = subject.features_name(), subject.size_or(IMAGE_SIZE)
        rows, unreadable, parts = [], [], []
        for part in sets:
            images = SizedImages(files_below(part.root, part.files), CentreCrop(side), shard=subject.shard)
            vectors, positions = vectors_of(subject, images, recipe)
            rows.append(vectors)
            parts.append(MultiLabel(part.root, tuple(part.files[i] for i in positions), part.labels[positions], part.classes))
            unreadable += images.names_of_unreadable()
        kept = judged(*parts)
        results, by_class = {}, {}
        for name in rows[0]:
            train, test = (unit_rows(part[name].numpy()) for part in rows)
            results[name], by_class[name] = self._scores(train, test, *parts, kept, subject.seed)
        departures = []
        if (len(sets[0].files), len(sets[1].files)) != BENCHMARK:
            departures.append(f"There are {len(sets[0].files)} training and {len(sets[1].files)} test images; VOC2007 has 5011 and 4952.")
        if side != IMAGE_SIZE:
            departures.append(f"Images are {side} px instead of {IMAGE_SIZE}.")
        if settings.cost != 0.5:
            departures.append(f"C is {settings.cost} instead of 0.5.")
        if settings.draws != 5:
            departures.append(f"There are {settings.draws} draws instead of 5.")
        departures.append("Draws are seeded one by one; CARP's code seeds once, so that a draw depends on all before it.")
        return Result(
            results=results,
            data={
                role: {"path": settings.data, "images": len(part.files), "classes": len(kept)}
                for role, part in zip(("train", "test"), parts)
            },
            features=recipe,
            image_size=side,
            about=f"{len(kept)} classes, {len(parts[0].files)} training and {len(parts[1].files)} test images of {settings.data}.",
            departures=departures,
            notes=notes,
            unreadable=tuple(unreadable),
            more={"average_precision_percent": by_class},
        )

    def _sets(self) -> tuple[MultiLabel, MultiLabel]:
        train, test = (read_multilabel(Path(self.settings.data), split) for split in ("trainval", "test"))
        if train.classes != test.classes:
            raise ValueError(
                f"trainval and test of {self.settings.data} have lists of different classes: {set(train.classes) ^ set(test.classes)}."
            )
        return train, test

    def _scores(
        self, train: np.ndarray, test: np.ndarray, truth: MultiLabel, asked: MultiLabel, kept: list[int], seed: int
    ) -> tuple[dict, dict]:
        """(figures, as published by class) of one network."""

        def decisions(chosen: np.ndarray) -> dict[int, np.ndarray]:
            return {
                c: svm_decisions(train[chosen], truth.labels[chosen, c], test, cost=self.settings.cost)
                for c in kept
                if _two_kinds(truth, chosen, c)
            }

        whole = decisions(np.arange(len(train)))
        by_class = {key: {c: measure(scores, asked.labels[:, c]) for c, scores in whole.items()} for key, (_, measure) in COLUMNS.items()}
        figures = {key: 100 * float(np.mean(list(values.values()))) for key, values in by_class.items()}
        measure = COLUMNS["map_as_published_percent"][1]
        for count in self.settings.per_class:
            draws = []
            for draw in range(self.settings.draws):
                chosen = drawn_positives(truth.labels[:, kept], count, seed, draw)
                draws.append(np.mean([measure(scores, asked.labels[:, c]) for c, scores in decisions(chosen).items()]))
            figures[f"n{count}_percent"], figures[f"n{count}_deviation_percent"] = 100 * float(np.mean(draws)), 100 * float(np.std(draws))
        return figures, {truth.classes[c]: 100 * value for c, value in by_class["map_as_published_percent"].items()}


def judged(train: MultiLabel, test: MultiLabel) -> list[int]:
    """Classes that have a positive and an image of another kind in both sets."""
    both = [((part.labels > 0).any(0) & (part.labels <= 0).any(0)) for part in (train, test)]
    return np.flatnonzero(both[0] & both[1]).tolist()


def drawn_positives(labels: np.ndarray, count: int, seed: int, draw: int) -> np.ndarray:
    """Positions of `count` positives of each class (all, where there are fewer), drawn by (seed, count, draw), with repeats.

    Args:
        labels [n, classes].
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + 1_009 * count + draw)
    chosen = []
    for column in labels.T:
        positives = np.flatnonzero(column > 0)
        order: Tensor = torch.randperm(len(positives), generator=generator)
        chosen.append(positives[order[:count].numpy()])
    return np.concatenate(chosen)


def _two_kinds(truth: MultiLabel, chosen: np.ndarray, column: int) -> bool:
    return len(np.unique(truth.labels[chosen, column] > 0)) == 2
