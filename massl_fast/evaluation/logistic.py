"""Multinomial logistic regression on frozen features: whole sets, 1 % and 10 % of them, long tails.

Published (iBOT, DINO, MaSSL): unit class-token features of centre crops, no intercept, no augmentation. Their solver's λ is stated in
several ways (dino#121); here the objective itself is: mean cross entropy + λ/2 · ‖W‖². MaSSL prints λ = 2e-6, where its solver stops before
convergence; regressions here are solved to a gradient of 1e-5.

Lists: SimCLR's `1percent.txt` and `10percent.txt`, ImageNet-LT's `ImageNet_LT_train.txt` and `…_test.txt` (`layouts.subsets`). For long
tails the accuracy of classes with many (> 100), a medium number (20 to 100) and few (< 20) training images is given, too (Liu et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from massl_fast.evaluation.base import Figure, Protocol, Result, Settings, described
from massl_fast.evaluation.features import Features, LabelledImages, truth_of
from massl_fast.evaluation.heads import LogisticFit, fit_logistic
from massl_fast.evaluation.layouts.subsets import positions_of_list
from massl_fast.evaluation.selection import BEST, CHOSEN, held_out, validation_of
from massl_fast.evaluation.subject import Subject

LAMBDAS = (1e-7, 5e-7, 2e-6, 1e-5, 5e-5, 2e-4, 1e-3, 5e-3, 2e-2, 1e-1)
MANY, FEW = 100, 20


class LogisticSettings(Settings):
    train: str
    """Labelled images that the regressions are fitted to."""
    test: str
    """Labelled images that are classified."""
    lambdas: tuple[float, ...] = LAMBDAS
    """Penalties λ of mean loss + λ/2 · ‖W‖²."""
    loss: Literal["multinomial", "one_vs_rest"] = "multinomial"
    """Softmax over the classes, or one regression per class."""
    subset: str = ""
    """File that lists the training images to use: SimCLR's 1percent.txt and 10percent.txt, or ImageNet_LT_train.txt; empty: all."""
    test_subset: str = ""
    """File that lists the test images to use, such as ImageNet_LT_test.txt; empty: all."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of each class's training images to use, at least one image, drawn by --seed."""
    validation: str = "0.1"
    """What λ is chosen on besides the test images: a share of the training images, or DATA; 0: nothing."""
    tolerance: float = Field(1e-5, gt=0)
    """Largest entry of the gradient at which a regression is done."""
    iterations: int = Field(1000, ge=1)
    """Most iterations of a regression."""

    @field_validator("lambdas")
    @classmethod
    def _lambdas(cls, lambdas: tuple[float, ...]) -> tuple[float, ...]:
        return checked_lambdas(lambdas)


def checked_lambdas(lambdas: tuple[float, ...]) -> tuple[float, ...]:
    if not lambdas or not all(0 < penalty < float("inf") for penalty in lambdas):
        raise ValueError(f"Penalties λ are {list(lambdas)}; they must be one or more positive numbers.")
    return lambdas


def unit(features: Tensor, device: torch.device | str) -> Tensor:
    """Rows of length 1, float32."""
    return F.normalize(features.to(device).float(), dim=1)


def predictions(fit: LogisticFit, features: Tensor) -> Tensor:
    """Classes [S, L, n] on the CPU of unit rows [n, D]."""
    return torch.stack([torch.stack([(features @ weight.T).argmax(1) for weight in of_set]) for of_set in fit.weight]).cpu()


def stratified_share(labels: Tensor, share: float, seed: int) -> Tensor:
    """Positions, ascending, of round(share · n) images of every class, at least one of each; drawn by ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    kept = []
    for label in labels.unique().tolist():
        members = shuffled[labels[shuffled] == label]
        kept.append(members[: max(1, round(share * len(members)))])
    return torch.cat(kept).sort().values


def shot_groups(train: Tensor, truth: Tensor, right: Tensor) -> dict[str, float | None]:
    """Mean accuracy over classes, in percent, and over those with many, a medium number and few training images; None for no class.

    Args:
        train: labels of the training images [n].
        truth, right: labels of the test images [m], and whether each was classified correctly.
    """
    classes = truth.unique()
    counts = (train[:, None] == classes).sum(0)
    accuracy = torch.stack([right[truth == label].double().mean() for label in classes])
    groups = {
        "per_class": torch.ones_like(counts, dtype=torch.bool),
        "many": counts > MANY,
        "medium": (counts >= FEW) & (counts <= MANY),
        "few": counts < FEW,
    }
    return {f"{name}_percent": 100 * float(accuracy[mask].mean()) if mask.any() else None for name, mask in groups.items()}


class Logistic(Protocol):
    """Logistic regression on unit features, for all penalties at once; accuracy of the best on the test images (as published)
    and of the one chosen on held-out training images.
    """

    name = "logistic"
    title = "Logistic regression accuracy, %"
    Settings = LogisticSettings
    settings: LogisticSettings

    def figures(self) -> Sequence[Figure]:
        best = Figure("best_percent", BEST)
        figures = [Figure("chosen_percent", CHOSEN), best] if self.settings.validation != "0" else [best]
        if self.settings.subset:
            names = {"per_class": "mean of classes", "many": f"> {MANY} images", "medium": f"{FEW} to {MANY}", "few": f"< {FEW}"}
            figures += [Figure(f"{name}_percent", title) for name, title in names.items()]
        return figures

    def prepare(self, subject: Subject) -> list[str]:
        validation_of(self.settings.validation)
        train, test, notes = self._images(subject)
        return [*train.source.notes, *test.source.notes, *notes]

    def run(self, subject: Subject) -> Result:
        settings = self.settings
        train_images, test_images, _ = self._images(subject)
        notes, recipe = self.prepare(subject), subject.features_name()
        train, test = subject.features(train_images, recipe), subject.features(test_images, recipe)
        share, path = validation_of(settings.validation)
        other = subject.features(subject.labelled(subject.source(path, "validation", "train")), recipe) if path is not None else None
        results = {}
        for name in train:
            results[name], said = self._of_network(name, train[name], test[name], share, other and other[name], subject)
            notes += said
        data = {"train": described(settings.train, train_images), "test": described(settings.test, test_images)}
        return Result(
            results=results,
            data=data,
            features=recipe,
            image_size=train_images.image_size,
            about=f"{data['test']['images']} test images of {settings.test}; regressions on {data['train']['images']} images of "
            f"{settings.train}, {len(settings.lambdas)} penalties.",
            departures=[] if train_images.image_size == 224 else [f"Images have {train_images.image_size} pixels instead of 224."],
            notes=notes,
            unreadable=tuple(n for part in (train, test) for n in next(iter(part.values())).unreadable),
        )

    def _of_network(
        self, name: str, train: Features, test: Features, share: float, other: Features | None, subject: Subject
    ) -> tuple[dict[str, Any], list[str]]:
        settings, device = self.settings, subject.device
        truth = truth_of(train, test, "Logistic regression")
        rows, labels = unit(train.features, device), train.labels.to(device)
        sets, labels_of = [rows], [labels]
        judged: tuple[Tensor, Tensor] | None = None
        if other is not None:
            judged = unit(other.features, device), truth_of(train, other, "Logistic regression")
        elif share:
            held = held_out(len(labels), share, subject.seed)
            kept = torch.ones(len(labels), dtype=torch.bool)
            kept[held] = False
            sets, labels_of = [rows, rows[kept]], [labels, labels[kept]]
            judged = rows[held], train.labels[held]
        fit = fit_logistic(
            sets,
            labels_of,
            settings.lambdas,
            classes=len(train.classes),
            loss=settings.loss,
            tolerance=settings.tolerance,
            most_iterations=settings.iterations,
        )
        right = predictions(fit, unit(test.features, device))[0] == truth
        percents = 100 * right.double().mean(1)
        best = int(percents.argmax())
        found: dict[str, Any] = {"best_percent": float(percents[best]), "best_lambda": settings.lambdas[best]}
        found["by_lambda"] = [{"lambda": penalty, "percent": float(value)} for penalty, value in zip(settings.lambdas, percents)]
        reported = best
        if judged is not None:
            chosen = reported = int((predictions(fit, judged[0])[-1] == judged[1]).sum(1).argmax())
            found |= {"chosen_percent": float(percents[chosen]), "chosen_lambda": settings.lambdas[chosen]}
        found |= shot_groups(train.labels, truth, right[reported])
        left = [settings.lambdas[i] for i in (~fit.converged[0]).nonzero()[:, 0].tolist()]
        said = [
            f"Regressions on {name} with λ = {', '.join(map(str, left))} ended above the tolerance, with a gradient of up to "
            f"{float(fit.gradient[0].max()):.1e}."
        ]
        return found, said if left else []

    def _images(self, subject: Subject) -> tuple[LabelledImages, LabelledImages, list[str]]:
        settings, notes, chosen = self.settings, [], []
        for role, path, subset in (("train", settings.train, settings.subset), ("test", settings.test, settings.test_subset)):
            source = subject.source(path, role, role)
            positions = np.arange(len(source))
            if subset:
                positions, said = positions_of_list(source, Path(subset))
                notes += said
            images = subject.labelled(source, positions=positions)
            if role == "train" and settings.fraction < 1:
                share = stratified_share(images.labels, settings.fraction, subject.seed)
                images = subject.labelled(source, positions=positions[share.numpy()])
            chosen.append(images)
        return chosen[0], chosen[1], notes
