"""k-NN on other data sets than the networks were trained on (MaSSL, table 1), read by torchvision in their official layouts."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import field_validator
from torchvision import datasets

from massl_fast.data.sources import FolderSource, Source
from massl_fast.evaluation.base import Figure, Protocol, Result, Settings, described
from massl_fast.evaluation.knn import DEFAULT_KS, HEADLINE_K, checked_ks, clipped_ks, knn_accuracy
from massl_fast.evaluation.layouts.lists import inside
from massl_fast.evaluation.subject import Subject

IMAGE_SIZE = 224
# name: (torchvision's class, further arguments, split that votes, split that is classified). Flowers: train alone, without val.
SETS: dict[str, tuple[Callable[..., Any], dict[str, Any], str, str]] = {
    "pets": (datasets.OxfordIIITPet, {}, "trainval", "test"),
    "flowers": (datasets.Flowers102, {}, "train", "test"),
    "aircraft": (datasets.FGVCAircraft, {"annotation_level": "variant"}, "trainval", "test"),
    "cars": (datasets.StanfordCars, {}, "train", "test"),
    "country": (datasets.Country211, {}, "train", "test"),
    "food": (datasets.Food101, {}, "train", "test"),
    "stl": (datasets.STL10, {}, "train", "test"),
    "gtsrb": (datasets.GTSRB, {}, "train", "test"),
}
# MaSSL, table 1: mean over the eight sets at k = 10, 20, 100, 200; ViT-B/16.
PUBLISHED = {"DINO": "62.0 62.0 60.8 60.2", "iBOT": "60.8 60.7 59.5 58.8", "MaSSL": "63.3 63.4 62.4 61.8"}


class TransferSettings(Settings):
    data: str
    """Folder that holds the sets as torchvision lays them out: oxford-iiit-pet, flowers-102, food-101, stl10_binary and so on."""
    sets: tuple[str, ...] = tuple(SETS)
    """Which of them; absent ones are left out and named."""
    k: tuple[int, ...] = DEFAULT_KS
    """Numbers of neighbours."""

    @field_validator("sets")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in SETS]
        if unknown or not names:
            raise ValueError(f"--sets are {', '.join(names) or 'none'}; they can be {', '.join(SETS)}.")
        return names

    @field_validator("k")
    @classmethod
    def _positive(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        return checked_ks(ks)


class Transfer(Protocol):
    """Transfer: weighted k-NN accuracy on other data sets, and the mean over them for each k.

    Columns of single sets are at k = 20, or at the first k where 20 is not among them.
    """

    name = "transfer"
    title = "k-NN accuracy on other sets, %"
    Settings = TransferSettings
    settings: TransferSettings

    def figures(self) -> list[Figure]:
        shown = HEADLINE_K if HEADLINE_K in self.settings.k else self.settings.k[0]
        means = [Figure(f"mean_k{k}_percent", f"mean, k = {k}") for k in self.settings.k]
        return means + [Figure(f"{name}_k{shown}_percent", name) for name in self.settings.sets]

    def prepare(self, subject: Subject) -> list[str]:
        subject.features_name()
        found, absent = self._sources(subject)
        notes = [f"This set is absent and left out: {reason}" for reason in absent]
        for name, (train, _) in found.items():
            notes += [f"{name}: {sentence}" for sentence in clipped_ks(self.settings.k, len(train))]
        return notes

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        found, _ = self._sources(subject)
        recipe, side = subject.features_name(), subject.size_or(IMAGE_SIZE)
        results: dict[str, dict[str, float]] = {}
        data, unreadable = {}, []
        for name, sources in found.items():
            images = [subject.labelled(source, image_size=side) for source in sources]
            train, test = (subject.features(part, recipe) for part in images)
            for part in (train, test):
                unreadable += next(iter(part.values())).unreadable
            for network in train:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the notes have said it
                    percents = knn_accuracy(train[network], test[network], ks=settings.k, device=subject.device)
                results.setdefault(network, {}).update({f"{name}_k{k}_percent": value for k, value in percents.items()})
            data |= {f"{name}, {role}": described(settings.data, part) for role, part in zip(("train", "test"), images)}
        for row in results.values():
            row |= {f"mean_k{k}_percent": float(np.mean([row[f"{name}_k{k}_percent"] for name in found])) for k in settings.k}
        departures = [] if len(found) == len(SETS) else [f"The mean is over {len(found)} sets; MaSSL's is over {len(SETS)}."]
        if side != IMAGE_SIZE:
            departures.append(f"Images are {side} px instead of {IMAGE_SIZE}.")
        own = not departures and settings.k == DEFAULT_KS
        return Result(
            results=results,
            data=data,
            features=recipe,
            image_size=side,
            about=f"{', '.join(found)} of {settings.data}.",
            departures=departures,
            notes=notes,
            unreadable=tuple(unreadable),
            published=[dict(who=f"{who} ViT-B/16", value=value, source="MaSSL, table 1") for who, value in PUBLISHED.items()]
            if own
            else [],
        )

    def _sources(self, subject: Subject) -> tuple[dict[str, tuple[Source, Source]], list[str]]:
        """({set: (its images that vote, those that are classified)}, sentences on sets that are absent). Opened once."""
        key = ("transfer", self.settings.data, self.settings.sets)
        if key not in subject.opened:
            found, absent = {}, []
            for name in self.settings.sets:
                kind, arguments, *splits = SETS[name]
                try:
                    found[name] = tuple(open_set(kind, self.settings.data, split, **arguments) for split in splits)
                except (RuntimeError, OSError) as error:
                    absent.append(f"{name} ({str(error).splitlines()[0]}).")
            if not found:
                raise ValueError(
                    f"{self.settings.data} holds none of the sets {', '.join(self.settings.sets)} as torchvision lays them out."
                )
            subject.opened[key] = found, absent
        return subject.opened[key]


class ArrayImages(Source):
    """Images that a set keeps in one array; read as PNG."""

    def __init__(self, path: str, pixels: np.ndarray, labels: Sequence[int], classes: Sequence[str]) -> None:
        super().__init__(path, [f"{i}.png" for i in range(len(pixels))], labels, classes)
        self._pixels = pixels  # uint8 [n, 3, H, W]

    def read(self, i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self._pixels[i].transpose(1, 2, 0)).save(buffer, "png", compress_level=1)
        return buffer.getvalue()


def open_set(kind: Callable[..., Any], root: str, split: str, **arguments: Any) -> Source:
    """One split of a set of torchvision as a source; its images stay where they are, and nothing is downloaded.

    Raises RuntimeError or OSError where the set is absent, ValueError for a name that leads out of the folder.
    """
    dataset = kind(root, split=split, download=False, **arguments)
    pairs = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    if isinstance(dataset, datasets.STL10):
        return ArrayImages(root, dataset.data, dataset.labels.tolist(), dataset.classes)
    if pairs is not None:
        paths, labels = zip(*pairs)
    else:
        paths = getattr(dataset, "_image_files", None) or dataset._images
        labels = dataset._labels
    labels = [int(label) for label in labels]
    classes = getattr(dataset, "classes", None) or [str(number) for number in range(max(labels) + 1)]
    names = [inside(Path(root), os.path.relpath(path, root), f"{kind.__name__} of {root}") for path in paths]
    return FolderSource(root, names, labels, classes)
