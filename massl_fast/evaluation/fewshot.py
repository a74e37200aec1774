"""n images per class: k-NN, logistic regression and linear heads on the same draws.

MaSSL (table 7) trains on 1, 2 and 4 images per class, 5 draws, and gives mean and deviation of a linear head. Its draws are not nested, nor
are these: each (n, draw) is drawn anew by (seed, n, draw). Penalties and learning rates are one choice for all draws of an n: the best mean
on the test images, as published, and the best mean on training images that no draw may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from massl_fast.evaluation.base import Figure, Protocol, Result, Settings, described
from massl_fast.evaluation.features import Features, LabelledImages, truth_of
from massl_fast.evaluation.heads import Sweep, correct_of_heads, fit_logistic, train_heads
from massl_fast.evaluation.knn import knn_accuracy
from massl_fast.evaluation.linear import RATE_BATCH
from massl_fast.evaluation.logistic import LAMBDAS, checked_lambdas, predictions, unit
from massl_fast.evaluation.selection import BEST, CHOSEN
from massl_fast.evaluation.subject import Subject

SWEPT = ("logistic", "linear")
RATES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
MOST_HELD = 10
"""Images per class that are held out at most."""


class FewShotSettings(Settings):
    train: str
    """Labelled images that draws are made from."""
    test: str
    """Labelled images that are classified."""
    per_class: tuple[int, ...] = (1, 2, 4)
    """Images per class of a draw."""
    draws: int = Field(5, ge=1)
    """Draws of each size."""
    heads: tuple[Literal["knn", "logistic", "linear"], ...] = ("knn", "logistic", "linear")
    """Classifiers to train."""
    k: int = Field(20, ge=1)
    """Neighbours of k-NN, at most the images of a draw."""
    lambdas: tuple[float, ...] = LAMBDAS
    """Penalties of logistic regression."""
    rates: tuple[float, ...] = RATES
    """Learning rates of linear heads, for a batch of 256."""
    epochs: int = Field(100, ge=1)
    """Epochs of linear heads."""
    head_batch: int = Field(1024, ge=1)
    """Images in a step of linear heads."""

    @field_validator("per_class")
    @classmethod
    def _counts(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if not counts or min(counts) < 1:
            raise ValueError(f"Images per class are {list(counts)}; they must be one or more positive numbers.")
        return counts

    @field_validator("lambdas", "rates")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        return checked_lambdas(values)


def drawn(labels: Tensor, count: int, seed: int, draw: int, allowed: Tensor) -> Tensor:
    """Positions, ascending, of ``count`` images of every class among those ``allowed`` [n] bool, all of a class that has fewer."""
    # Three numbers make one seed; a draw never depends on another.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + draw) * 1_000_003 + count)
    shuffled = torch.randperm(len(labels), generator=generator)
    shuffled = shuffled[allowed[shuffled]]
    kept = [shuffled[labels[shuffled] == label][:count] for label in labels.unique().tolist()]
    return torch.cat(kept).sort().values


def held_for_choice(labels: Tensor, most_drawn: int, seed: int) -> Tensor:
    """[n] bool: images kept from all draws to choose heads on, a tenth of a class, at most 10, and never so many that a draw lacks any."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = shuffled[labels[shuffled] == label]
        held[members[: max(0, min(MOST_HELD, -(-len(members) // 10), len(members) - most_drawn))]] = True
    return held


class FewShot(Protocol):
    """k-NN, logistic regression and linear heads on n training images per class: mean and deviation over draws."""

    name = "fewshot"
    title = "Accuracy with n images per class, mean of draws, %"
    Settings = FewShotSettings
    settings: FewShotSettings

    def figures(self) -> Sequence[Figure]:
        figures = []
        for head in self.settings.heads:
            for count in self.settings.per_class:
                if head in SWEPT:
                    figures.append(Figure(f"{head}_n{count}_chosen_percent", f"{head}, n = {count}, {CHOSEN}"))
                    figures.append(Figure(f"{head}_n{count}_best_percent", f"{head}, n = {count}, {BEST}"))
                else:
                    figures.append(Figure(f"{head}_n{count}_percent", f"{head}, n = {count}"))
        return figures

    def prepare(self, subject: Subject) -> list[str]:
        train, test = self._images(subject)
        counts = torch.bincount(train.labels)
        short = int(((counts > 0) & (counts < max(self.settings.per_class))).sum())
        notes = [*train.source.notes, *test.source.notes]
        if short:
            notes.append(f"{short} classes have fewer than {max(self.settings.per_class)} training images; draws take all they have.")
        return notes

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        images = self._images(subject)
        recipe = subject.features_name()
        train, test = (subject.features(part, recipe) for part in images)
        results = {name: self._of_network(train[name], test[name], subject) for name in train}
        data = {"train": described(settings.train, images[0]), "test": described(settings.test, images[1])}
        return Result(
            results=results,
            data=data,
            features=recipe,
            image_size=images[0].image_size,
            about=f"{settings.draws} draws from {data['train']['images']} images of {settings.train}, not nested; "
            f"{data['test']['images']} test images of {settings.test}.",
            departures=[] if images[0].image_size == 224 else [f"Images have {images[0].image_size} pixels instead of 224."],
            notes=notes,
            unreadable=tuple(n for part in (train, test) for n in next(iter(part.values())).unreadable),
        )

    def _images(self, subject: Subject) -> tuple[LabelledImages, LabelledImages]:
        return tuple(subject.labelled(subject.source(getattr(self.settings, role), role, role)) for role in ("train", "test"))

    def _of_network(self, train: Features, test: Features, subject: Subject) -> dict[str, Any]:
        settings = self.settings
        truth = truth_of(train, test, "A few-shot head")
        held = held_for_choice(train.labels, max(settings.per_class), subject.seed)
        choice = (train.features[held], train.labels[held])
        found: dict[str, Any] = {"by_draw": {}}
        for count in settings.per_class:
            draws = [drawn(train.labels, count, subject.seed, draw, ~held) for draw in range(settings.draws)]
            for head in settings.heads:
                key = f"{head}_n{count}"
                if head == "knn":
                    percents = torch.tensor([self._knn(train, test, rows, subject) for rows in draws], dtype=torch.float64)
                    found |= _mean_and_deviation(key, percents)
                    found["by_draw"][key] = percents.tolist()
                    continue
                on_test, on_choice = getattr(self, f"_{head}")(train, draws, [(test.features, truth), choice], subject)  # [draws, settings]
                swept = settings.lambdas if head == "logistic" else settings.rates
                best = int(on_test.mean(0).argmax())
                found |= _mean_and_deviation(f"{key}_best", on_test[:, best])
                found[f"{key}_best"] = swept[best]
                if held.any():
                    chosen = int(on_choice.mean(0).argmax())
                    found |= _mean_and_deviation(f"{key}_chosen", on_test[:, chosen])
                    found[f"{key}_chosen"] = swept[chosen]
                found["by_draw"][key] = on_test[:, best].tolist()
        return found

    def _knn(self, train: Features, test: Features, rows: Tensor, subject: Subject) -> float:
        part = Features(train.features[rows], train.labels[rows], train.indices[rows], train.classes)
        k = min(self.settings.k, len(rows))
        return knn_accuracy(part, test, ks=(k,), device=subject.device)[k]

    def _logistic(self, train: Features, draws: list[Tensor], judged: list[tuple[Tensor, Tensor]], subject: Subject) -> list[Tensor]:
        """Percents [draws, penalties] on each of the judged sets; all draws and penalties in one batch."""
        fit = fit_logistic(
            [unit(train.features[rows], subject.device) for rows in draws],
            [train.labels[rows].to(subject.device) for rows in draws],
            self.settings.lambdas,
            classes=len(train.classes),
        )
        return [
            100 * (predictions(fit, unit(features, subject.device)) == truth).double().mean(2) if len(truth) else torch.empty(0)
            for features, truth in judged
        ]

    def _linear(self, train: Features, draws: list[Tensor], judged: list[tuple[Tensor, Tensor]], subject: Subject) -> list[Tensor]:
        settings = self.settings
        sweep = Sweep(tuple(rate * settings.head_batch / RATE_BATCH for rate in settings.rates))
        percents = [torch.zeros(len(draws), len(sweep), dtype=torch.float64) for _ in judged]
        for draw, rows in enumerate(draws):
            features, labels = train.features[rows], train.labels[rows]
            heads, _ = train_heads(
                lambda epoch, features=features: features,
                labels,
                sweep,
                classes=len(train.classes),
                epochs=settings.epochs,
                batch_size=settings.head_batch,
                seed=subject.seed,
                device=subject.device,
            )
            for table, (some, truth) in zip(percents, judged):
                if len(heads) and len(truth):
                    table[draw, heads.numbers] = 100 * correct_of_heads(heads, some, truth).double() / len(truth)
        return percents


def _mean_and_deviation(key: str, percents: Tensor) -> dict[str, float]:
    """Mean, and deviation of the sample of draws (n - 1; 0 for one)."""
    deviation = float(percents.std()) if len(percents) > 1 else 0.0
    return {f"{key}_percent": float(percents.mean()), f"{key}_deviation": deviation}
