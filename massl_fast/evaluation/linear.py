"""Linear probe: how well frozen features are separated by a linear classifier.

Published (DINO `eval_linear.py`; iBOT `eval_linear_multi.py`, which MaSSL and CARP follow): features `cls4` for ViT-S, `cls+mean` for wider
ones, a fresh random resized crop and flip of every image in every epoch, 100 epochs of SGD with momentum 0.9, batch 1024, learning rates
base · batch / 256 with a cosine to 0 stepped once per epoch. iBOT trains 45 heads, rates {1 … 9} · 10^{-4 … 0}, and reports the best of
all heads and epochs *on the test images*.

Here an epoch takes one of V augmented views whose features are extracted once (`views`); with `fresh` there is a view for every epoch,
which is the published protocol. The table has the published selection and an honest one: the head that is best on held-out training images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from massl_fast.evaluation.base import Figure, Protocol, Result, Settings, described
from massl_fast.evaluation.features import AugmentedImages, Features, LabelledImages, fixed_subset, truth_of
from massl_fast.evaluation.heads import Heads, Sweep, correct_of_heads, train_heads
from massl_fast.evaluation.selection import BEST, CHOSEN, held_out, validation_of
from massl_fast.evaluation.subject import Subject
from massl_fast.models.recipes import default_recipe

PUBLISHED_RATES = tuple(digit * 10.0**power for power in range(-4, 1) for digit in range(1, 10))
PUBLISHED_EPOCHS, PUBLISHED_BATCH = 100, 1024
RATE_BATCH = 256
"""Learning rates are for a batch of this size."""
NARROW = 384
"""Transformers up to this width are probed on their last four class tokens."""
FRESH = "fresh"


class LinearSettings(Settings):
    train: str
    """Labelled images that the heads are trained on."""
    test: str
    """Labelled images that are classified."""
    epochs: int = Field(PUBLISHED_EPOCHS, ge=1)
    """Epochs of the heads."""
    views: str = "10"
    """Augmented views of every training image whose features are extracted, epochs take turns; fresh: one per epoch, as published;
    0: centre crops only."""
    rates: tuple[float, ...] = PUBLISHED_RATES
    """Learning rates, one head each, for a batch of 256."""
    decays: tuple[float, ...] = (0.0,)
    """Weight decays; every rate is tried with each."""
    optimizers: tuple[Literal["sgd", "lars"], ...] = ("sgd",)
    """sgd, lars or both; every rate is tried with each."""
    head_batch: int = Field(PUBLISHED_BATCH, ge=1)
    """Images in a step of the heads."""
    products: Literal["fp32", "bf16"] = "fp32"
    """Format of the heads' matrix products; weights are fp32."""
    validation: str = "0.1"
    """What heads are chosen on besides the test images: a share of the training images, or DATA; 0: nothing."""
    max_train_images: int = Field(0, ge=0)
    """Train on a fixed random subset of the training images; 0: all."""

    @field_validator("views")
    @classmethod
    def _views(cls, views: str) -> str:
        if views != FRESH and not views.isdecimal():
            raise ValueError(f"Views are {views!r}; they can be a number, or fresh.")
        return views

    @field_validator("rates")
    @classmethod
    def _rates(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not rates or not all(0 < rate < float("inf") for rate in rates):
            raise ValueError(f"Learning rates are {list(rates)}; they must be one or more positive numbers.")
        return rates

    @property
    def num_views(self) -> int:
        return self.epochs if self.views == FRESH else min(int(self.views), self.epochs)


def linear_recipe(backbone: nn.Module) -> str:
    """The published features: cls4 up to the width of ViT-S, cls+mean beyond; pooled for networks without a class token."""
    recipe = default_recipe(backbone)
    if recipe == "pooled":
        return recipe
    if backbone.embed_dim > NARROW:
        return "cls+mean"
    return "cls4" if len(backbone.blocks) >= 4 else "cls"


class Linear(Protocol):
    """Linear probe: one linear classifier per learning rate on frozen features, all trained at once; accuracy of the best
    on the test images (as published) and of the one chosen on held-out training images.
    """

    name = "linear"
    title = "Linear probe accuracy, %"
    Settings = LinearSettings
    settings: LinearSettings

    def figures(self) -> Sequence[Figure]:
        best = Figure("best_percent", BEST)
        return [Figure("chosen_percent", CHOSEN), best] if self.settings.validation != "0" else [best]

    def prepare(self, subject: Subject) -> list[str]:
        validation_of(self.settings.validation)
        train, test = self._images(subject)
        return [*train.source.notes, *test.source.notes]

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        recipe = subject.features_name(linear_recipe)
        train_images, test_images = self._images(subject)
        views = [subject.features(images, recipe) for images in self._views(subject, train_images)]
        test = subject.features(test_images, recipe)
        validation = self._validation(subject, train_images, recipe)
        results = {}
        for name in test:
            of_views = [view[name] for view in views]
            probe = _Probe(of_views, test[name], validation and validation(name, of_views[0]), settings, subject)
            results[name] = probe.found()
            if lost := results[name]["lost"]:
                notes.append(f"{len(lost)} of {len(probe.sweep)} heads on {name} diverged and are out: rates {', '.join(map(str, lost))}.")
        data = {"train": described(settings.train, train_images), "test": described(settings.test, test_images)}
        departures = self._departures(train_images.image_size)
        benchmark = (data["train"]["images"], data["test"]["images"], data["train"]["classes"]) == (1_281_167, 50_000, 1000)
        return Result(
            results=results,
            data=data,
            features=recipe,
            image_size=train_images.image_size,
            about=f"{len(_sweep(settings))} heads, {settings.epochs} epochs on {data['train']['images']} images of {settings.train}; "
            f"{data['test']['images']} test images of {settings.test}.",
            departures=departures,
            notes=notes,
            unreadable=tuple(n for part in (views[0], test) for n in next(iter(part.values())).unreadable),
            published=PUBLISHED if benchmark and not departures else [],
        )

    def _images(self, subject: Subject) -> tuple[LabelledImages, LabelledImages]:
        settings = self.settings
        train = subject.source(settings.train, "train", "train")
        positions = fixed_subset(len(train), settings.max_train_images)
        return subject.labelled(train, positions=positions), subject.labelled(subject.source(settings.test, "test", "test"))

    def _views(self, subject: Subject, centre: LabelledImages) -> list[LabelledImages]:
        if not self.settings.num_views:
            return [centre]
        arguments = dict(seed=subject.seed, positions=centre.positions.numpy(), shard=subject.shard)
        return [AugmentedImages(centre.source, centre.image_size, view=v, **arguments) for v in range(self.settings.num_views)]

    def _validation(self, subject: Subject, train: LabelledImages, recipe: str) -> Callable[[str, Features], _Validation] | None:
        """How to get what heads of a network are chosen on, from its name and training features."""
        share, path = validation_of(self.settings.validation)
        if path is not None:
            found = subject.features(subject.labelled(subject.source(path, "validation", "train")), recipe)
            return lambda name, of_train: _Validation(found[name].features, truth_of(of_train, found[name], "A linear probe"), None)
        if not share:
            return None
        centre = subject.features(train, recipe)
        held = held_out(len(centre[next(iter(centre))].labels), share, subject.seed)

        def of(name: str, of_train: Features) -> _Validation:
            return _Validation(centre[name].features[held], of_train.labels[held], held)

        return of

    def _departures(self, image_size: int) -> list[str]:
        settings, found = self.settings, []
        if image_size != 224:
            found.append(f"Images have {image_size} pixels instead of 224.")
        if settings.num_views == 0:
            found.append("Heads see centre crops instead of a fresh random crop of every image in every epoch.")
        elif settings.num_views < settings.epochs:
            found.append(f"Epochs take turns over {settings.num_views} random crops of every image instead of a fresh one each.")
        if settings.epochs != PUBLISHED_EPOCHS:
            found.append(f"Heads train for {settings.epochs} epochs instead of {PUBLISHED_EPOCHS}.")
        if settings.head_batch != PUBLISHED_BATCH:
            found.append(f"Batches have {settings.head_batch} images instead of {PUBLISHED_BATCH}.")
        if settings.rates != PUBLISHED_RATES:
            found.append(f"The sweep has {len(settings.rates)} learning rates instead of iBOT's 45.")
        if settings.max_train_images:
            found.append(f"Heads train on a subset of {settings.max_train_images} images.")
        if settings.products != "fp32":
            found.append(f"The heads' matrix products are computed in {settings.products}.")
        return found


PUBLISHED: list[dict[str, Any]] = [
    {"who": f"{who}, {size}", "value": value, "source": "MaSSL, table 3"}
    for size, row in (
        ("ViT-S/16, 800 epochs", {"DINO": 77.0, "iBOT": 77.9, "MaSSL": 77.8}),
        ("ViT-B/16, 400 epochs", {"DINO": 78.2, "iBOT": 79.5, "MaSSL": 79.6}),
    )
    for who, value in row.items()
]


@dataclass(frozen=True)
class _Validation:
    features: Tensor
    labels: Tensor
    positions: Tensor | None
    """Rows of the training features that these are, which a second training leaves out; None: none of them."""


def _sweep(settings: LinearSettings) -> list[dict[str, Any]]:
    """What each head is trained with."""
    return [
        {"rate": rate, "decay": decay, "optimizer": optimizer}
        for optimizer in settings.optimizers
        for decay in settings.decays
        for rate in settings.rates
    ]


class _Probe:
    """The sweep on the features of one network."""

    def __init__(
        self, views: list[Features], test: Features, validation: _Validation | None, settings: LinearSettings, subject: Subject
    ) -> None:
        self.views, self.test, self.validation, self.settings, self.subject = views, test, validation, settings, subject
        self.truth = truth_of(views[0], test, "A linear probe")
        self.described = _sweep(settings)
        scale = settings.head_batch / RATE_BATCH
        self.sweep = Sweep(
            tuple(scale * head["rate"] for head in self.described),
            tuple(head["decay"] for head in self.described),
            tuple(head["optimizer"] == "lars" for head in self.described),
        )

    def found(self) -> dict[str, Any]:
        table = torch.full((self.settings.epochs, len(self.sweep)), -1, dtype=torch.int64)

        def note(epoch: int, heads: Heads) -> None:
            table[epoch, heads.numbers] = correct_of_heads(heads, self.test.features, self.truth)

        heads = self._train(None, note)
        percents = 100 * table.double().clamp(min=0) / len(self.truth)
        best = int(percents.max(0).values.argmax())
        last = percents[-1]
        alive = torch.zeros(len(self.sweep), dtype=torch.bool)
        alive[heads.numbers] = True
        result = {
            "best_percent": float(percents[:, best].max()),
            "best": {**self.described[best], "epoch": int(percents[:, best].argmax()) + 1},
            "by_head": [{**head, "percent": float(last[i]) if alive[i] else None} for i, head in enumerate(self.described)],
            "lost": [self.described[number]["rate"] for number in heads.lost],
        }
        if self.validation is not None:
            chosen = self._chosen(heads, alive)
            result |= {"chosen_percent": float(last[chosen]) if chosen is not None else None}
            result |= {"chosen": self.described[chosen] if chosen is not None else None}
        return result

    def _chosen(self, heads: Heads, alive: Tensor) -> int | None:
        """The head that is best on held-out images after the last epoch of a training without them, of those that live in both."""
        validation = self.validation
        if validation.positions is not None:
            heads = self._train(validation.positions, None)
        if not len(heads):
            return None
        correct = torch.full((len(self.sweep),), -1, dtype=torch.int64)
        correct[heads.numbers] = correct_of_heads(heads, validation.features, validation.labels)
        correct[~alive] = -1
        return int(correct.argmax()) if int(correct.max()) >= 0 else None

    def _train(self, without: Tensor | None, after_epoch: Callable[[int, Heads], None] | None) -> Heads:
        settings, first = self.settings, self.views[0]
        kept = torch.ones(len(first.labels), dtype=torch.bool)
        if without is not None:
            kept[without] = False
        rows = kept.nonzero()[:, 0]
        heads, _ = train_heads(
            lambda epoch: self.views[epoch % len(self.views)].features if without is None else self._part(epoch, rows),
            first.labels[rows],
            self.sweep,
            classes=len(first.classes),
            epochs=settings.epochs,
            batch_size=settings.head_batch,
            seed=self.subject.seed,
            device=self.subject.device,
            products=torch.bfloat16 if settings.products == "bf16" else None,
            after_epoch=after_epoch,
        )
        return heads

    def _part(self, epoch: int, rows: Tensor) -> _Rows:
        return _Rows(self.views[epoch % len(self.views)].features, rows)


@dataclass(frozen=True)
class _Rows:
    """Some rows of features, picked when a batch of them is."""

    features: Tensor
    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.features.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    def __getitem__(self, positions: Tensor) -> Tensor:
        return self.features[self.rows[positions]]
