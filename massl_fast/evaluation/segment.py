"""Segmentation on frozen patches, without a detection library.

CAPI's protocol is the default: a logistic regression and k-NN on cached patch features; patches are labelled by the most frequent label of
their pixels, and masks are compared at the network's size. MMC's is the long one: a linear layer trained on crops (``segment_crops``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from massl_fast.evaluation import segment_crops
from massl_fast.evaluation.base import Figure, Protocol, Result, Settings
from massl_fast.evaluation.cluster import scaling
from massl_fast.evaluation.heads import fit_logistic
from massl_fast.evaluation.images import SizedImages, Square, files_below, in_order
from massl_fast.evaluation.layouts.scenes import IGNORED, Scene, SceneSet, read_scenes
from massl_fast.evaluation.metrics.segmentation import confusion_matrix, scores_of_confusion
from massl_fast.evaluation.patch_knn import METRICS, most_frequent, patch_knn
from massl_fast.evaluation.pictures import Picture, at_height, painted, row_of, spread
from massl_fast.evaluation.selection import held_out
from massl_fast.evaluation.subject import Subject, backbone_of
from massl_fast.evaluation.tokens import demand_finite, patch_side, tokens_of

IMAGE_SIZE = 224
COSTS = tuple(10.0**power for power in range(-5, 3))
KS = (1, 3, 10, 30)
VALIDATION = 0.1
OF_CAPI, OF_MMC = {"heads", "costs", "k", "iterations"}, {"steps", "crops", "rate"}
# MMC, table of linear segmentation, ViT-B/16: mIoU of the validation images; and the images of each set, training and validation.
PUBLISHED = {
    "ADE20K": ((20_210, 2_000), {"DINO": 32.6, "iBOT": 34.7, "MMC": 37.0}),
    "Cityscapes": ((2_975, 500), {"DINO": 59.1, "iBOT": 60.7, "MMC": 62.6}),
    "VOC2012, augmented": ((10_582, 1_449), {"DINO": 73.5, "iBOT": 75.6, "MMC": 77.7}),
}


class SegmentSettings(Settings):
    data: str
    """Folder of VOC2012, ADE20K or Cityscapes; train and val are taken."""
    train_like: Literal["capi", "mmc"] = "capi"
    """capi: heads on cached patches, minutes; mmc: a linear layer trained on random crops, for days on a CPU."""
    heads: tuple[Literal["logistic", "knn"], ...] = ("logistic", "knn")
    """What is fitted to the patches."""
    costs: tuple[float, ...] = COSTS
    """C of the logistic regressions: C · sum of losses + ‖W‖² / 2."""
    k: tuple[int, ...] = KS
    """Numbers of neighbours, each by cosine and by Euclidean distance."""
    iterations: int = Field(200, ge=1)
    """Most iterations of a logistic regression."""
    max_train_images: int = Field(0, ge=0)
    """Use only this many training images, the first ones; 0: all."""
    steps: int = Field(segment_crops.STEPS, ge=1)
    """Of --train-like mmc: steps of the optimizer."""
    crops: int = Field(segment_crops.CROPS, ge=1)
    """Of --train-like mmc: crops per step, of all ranks together."""
    rate: float = Field(segment_crops.RATE, gt=0)
    """Of --train-like mmc: AdamW's largest learning rate."""

    @model_validator(mode="after")
    def _of_one_way(self) -> SegmentSettings:
        strangers = OF_CAPI if self.train_like == "mmc" else OF_MMC
        wrong = sorted(self.model_fields_set & strangers)
        if wrong:
            other = "capi" if self.train_like == "mmc" else "mmc"
            names = " and ".join(name.replace("_", "-") for name in wrong)
            raise ValueError(f"The settings {names} of segment belong to train-like {other}, and train-like is {self.train_like}.")
        return self


@dataclass(frozen=True)
class Patches:
    """All patches of a split under every network."""

    features: dict[str, Tensor]
    """[images, P, C] float32."""
    pixels: np.ndarray
    """uint8 [images, P, pixels of a patch]: labels."""
    grid: tuple[int, int]
    positions: list[int]

    def part(self, rows: np.ndarray) -> Patches:
        features = {name: values[torch.from_numpy(rows)] for name, values in self.features.items()}
        return Patches(features, self.pixels[rows], self.grid, [self.positions[row] for row in rows])


class Segment(Protocol):
    """Segmentation on frozen patches: logistic regressions and k-NN on standardised patch features, mIoU on the validation images.

    Chosen: the penalty, or k and distance, that is best on held-out training images. Best: that which is best on the validation images
    themselves, as published tables choose. With --train-like mmc: one linear layer after the last step, at the images' own size.
    """

    name = "segment"
    title = "Segmentation on frozen patches, mIoU %"
    Settings = SegmentSettings
    settings: SegmentSettings
    recipes = ("patches",)

    def figures(self) -> list[Figure]:
        if self.settings.train_like == "mmc":
            return [Figure("linear_miou_percent", "linear"), Figure("linear_pixel_accuracy_percent", "pixels")]
        titles = {"logistic": "logistic", "knn": "k-NN"}
        pairs = [(head, how) for head in self.settings.heads for how in ("chosen", "best")]
        figures = [Figure(f"{head}_{how}_miou_percent", f"{titles[head]}, {how}") for head, how in pairs]
        return figures + [Figure(f"{head}_chosen_pixel_accuracy_percent", f"{titles[head]}, pixels") for head in self.settings.heads]

    def prepare(self, subject: Subject) -> list[str]:
        patch_side(subject)
        if not self.settings.heads or any(cost <= 0 for cost in self.settings.costs) or any(k < 1 for k in self.settings.k):
            raise ValueError("There must be a head at least, and C and k must be positive.")
        if self.settings.train_like == "mmc":
            for network in subject.networks.values():
                segment_crops.blocks_of(network)
        scenes = self._scenes
        if len(scenes.splits["train"]) < 2:
            raise ValueError(f"{self.settings.data} has {len(scenes.splits['train'])} training images; two are needed to hold one out.")
        return []

    @functools.cached_property
    def _scenes(self) -> SceneSet:
        return read_scenes(Path(self.settings.data), augmented=self.settings.train_like == "mmc")

    def run(self, subject: Subject) -> Result:
        return self._like_mmc(subject) if self.settings.train_like == "mmc" else self._like_capi(subject)

    def _like_mmc(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        scenes, patch = self._scenes, patch_side(subject)
        side = max(1, subject.size_or(segment_crops.SIDE) // patch) * patch
        train, val = scenes.splits["train"][: settings.max_train_images or None], scenes.splits["val"]
        sizes = dict(side=side, patch=patch)
        found = segment_crops.trained(
            subject, train, scenes.num_classes, **sizes, steps=settings.steps, crops=settings.crops, rate=settings.rate
        )
        matrices, accuracy, unreadable = segment_crops.confusions(subject, found.layers, val, scenes.num_classes, **sizes)
        results, more = {}, {}
        for name, matrix in matrices.items():
            scores = scores_of_confusion(matrix)
            keys = {
                "miou": "miou",
                "miou_present": "miou_present",
                "pixel_accuracy": "pixel_accuracy",
                "class_accuracy": "mean_class_accuracy",
            }
            results[name] = {f"linear_{key}_percent": 100 * float(scores[score]) for key, score in keys.items()}
            more[name] = [None if np.isnan(value) else 100 * float(value) for value in scores["iou"]]
        departures = []
        if settings.steps != segment_crops.STEPS:
            warm_up = segment_crops.warm_up_steps(settings.steps)
            departures.append(f"Trained for {settings.steps:,} steps, {warm_up:,} of warm-up, instead of {segment_crops.STEPS:,}.")
        if settings.crops != segment_crops.CROPS:
            departures.append(f"A step sees {settings.crops} crops instead of {segment_crops.CROPS}.")
        if settings.rate != segment_crops.RATE:
            departures.append(f"The learning rate is {settings.rate:g} instead of {segment_crops.RATE:g}.")
        if side != segment_crops.SIDE:
            departures.append(f"Crops are {side} px instead of {segment_crops.SIDE}.")
        if scenes.kind == "VOC2012":
            departures.append(
                "Training images are those of VOC's list train; published is the augmented one (trainaug, SegmentationClassAug)."
            )
        if settings.max_train_images:
            departures.append(f"Only the first {len(train)} training images take part.")
        depths = {len(backbone_of(network).blocks) for network in subject.networks.values()}
        if depths != {12}:
            departures.append(
                "Tokens are those of the blocks at one half, two thirds, five sixths and all of the depth, as 6, 8, 10 and 12 of 12."
            )
        counts, rows = PUBLISHED.get(scenes.kind, ((0, 0), {}))
        own = not departures and (len(train), len(val)) == counts
        departures.append(
            "What MMC leaves open is as in mmsegmentation: scales of 0.5 to 2, crops of which no class fills over three quarters, tokens "
            "after the final norm, a loss that counts void pixels as 0, windows every two thirds of a crop in validation."
        )
        names = [train[number].name for number in found.unreadable] + [val[number].name for number in unreadable]
        return Result(
            results=results,
            data={"train": {"path": settings.data, "images": len(train)}, "val": {"path": settings.data, "images": len(accuracy)}},
            features="patches of four blocks",
            image_size=side,
            about=f"{scenes.kind}, {scenes.num_classes} classes: {len(train)} training and {len(accuracy)} validation images of "
            f"{settings.data}. mIoU is over classes in truth or prediction, at the images' own size.",
            departures=departures,
            notes=notes,
            unreadable=tuple(names),
            published=[dict(who=f"{who} ViT-B/16", value=value, source=f"MMC, {scenes.kind}") for who, value in rows.items()]
            if own
            else [],
            more={"iou_percent": more, "losses": found.losses[:: max(1, len(found.losses) // 100)]},
            pictures=self._pictures_like_mmc(subject, found.layers, val, accuracy, **sizes) if subject.pictures else [],
        )

    def _pictures_like_mmc(
        self, subject: Subject, layers: dict, val: list[Scene], accuracy: dict[int, float], **sizes: int
    ) -> list[Picture]:
        network, pictures = next(iter(subject.networks)), []
        for rank, number in spread(accuracy):
            image, labels = segment_crops.read_scene(val[number])
            guess = segment_crops.predicted(subject, {network: layers[network]}, image, **sizes)[network].numpy()
            caption = f"{rank} image, {val[number].name}: {100 * accuracy[number]:.1f} % of its pixels; image, truth, prediction"
            shown = [painted(image, of) for of in (np.array(labels) % IGNORED, guess)]
            pictures.append(Picture(f"segment_{rank}", caption, row_of([at_height(image), *map(at_height, shown)])))
        return pictures

    def _like_capi(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        scenes = self._scenes
        side = subject.size_or(IMAGE_SIZE) // patch_side(subject) * patch_side(subject)
        lists = {"train": scenes.splits["train"][: settings.max_train_images or None], "val": scenes.splits["val"]}
        unreadable: list[str] = []
        found = {split: self._patches(subject, items, side, unreadable) for split, items in lists.items()}
        train, test = found["train"], found["val"]
        out = held_out(len(train.pixels), VALIDATION, subject.seed).numpy()
        kept = np.setdiff1d(np.arange(len(train.pixels)), out)
        results, more, drawn = {}, {}, {}
        for name in train.features:
            results[name], more[name] = {}, {}
            for head in settings.heads:
                predict = self._logistic if head == "logistic" else self._knn
                validation = predict(subject, name, train.part(kept), train.part(out), scenes.num_classes, [])
                tested = predict(subject, name, train, test, scenes.num_classes, notes)
                valued = {key: _scores(labels, train.pixels[out], scenes.num_classes)["miou"] for key, labels in validation.items()}
                scores = {key: _scores(labels, test.pixels, scenes.num_classes) for key, labels in tested.items()}
                chosen, best = max(valued, key=valued.get), max(scores, key=lambda key: scores[key]["miou"])
                for how, key in (("chosen", chosen), ("best", best)):
                    results[name][f"{head}_{how}_miou_percent"] = 100 * scores[key]["miou"]
                results[name][f"{head}_chosen_miou_present_percent"] = 100 * scores[chosen]["miou_present"]
                results[name][f"{head}_chosen_pixel_accuracy_percent"] = 100 * scores[chosen]["pixel_accuracy"]
                more[name][head] = {
                    "chosen": chosen,
                    "best": best,
                    "miou_percent": {key: 100 * of["miou"] for key, of in scores.items()},
                    "iou_percent": [None if np.isnan(value) else 100 * float(value) for value in scores[chosen]["iou"]],
                }
                drawn.setdefault(name, tested[chosen])
        departures = [
            f"Images are squeezed to {side} × {side} px; CAPI's are {IMAGE_SIZE} px.",
            "The bias of the logistic regressions is penalised like their weights; scikit-learn's is not.",
        ]
        if settings.max_train_images:
            departures.append(f"Only the first {len(lists['train'])} training images take part.")
        network = next(iter(subject.networks))
        return Result(
            results=results,
            data={split: {"path": settings.data, "images": len(part.pixels)} for split, part in found.items()},
            features="patches",
            image_size=side,
            about=f"{scenes.kind}, {scenes.num_classes} classes: {train.pixels.shape[0]} training and {test.pixels.shape[0]} validation "
            f"images of "
            f"{settings.data}. mIoU is over classes in truth or prediction.",
            departures=departures,
            notes=list(dict.fromkeys(notes)),
            unreadable=tuple(unreadable),
            more={"heads": more},
            pictures=_pictures(scenes, test, drawn[network], side) if subject.pictures else [],
        )

    def _patches(self, subject: Subject, items: list[Scene], side: int, unreadable: list[str]) -> Patches:
        root = Path(self.settings.data)
        source = files_below(root, [item.image.relative_to(root).as_posix() for item in items])
        images = SizedImages(source, Square(side), shard=subject.shard)
        rows, grid = [], (0, 0)
        for position, tokens in tokens_of(subject, images):
            labels = items[position].labels()
            labels = np.array(Image.fromarray(labels).resize((side, side), Image.Resampling.NEAREST))
            grid = tuple(next(iter(tokens.values())).shape[:2])
            parts = labels.reshape(grid[0], side // grid[0], grid[1], side // grid[1]).swapaxes(1, 2).reshape(grid[0] * grid[1], -1)
            rows.append((position, (parts, {name: values.flatten(0, 1).cpu() for name, values in tokens.items()})))
        ordered = in_order(rows, subject.shard)
        unreadable.extend(images.names_of_unreadable())
        if not ordered:
            raise ValueError(f"No image of {self.settings.data} can be read.")
        names = ordered[0][1][1]
        features = {name: torch.stack([row[1][name] for _, row in ordered]) for name in names}
        demand_finite(features)
        grid = (round(np.sqrt(len(ordered[0][1][0]))),) * 2
        return Patches(features, np.stack([row[0] for _, row in ordered]), grid, [position for position, _ in ordered])

    def _logistic(
        self, subject: Subject, name: str, train: Patches, test: Patches, classes: int, notes: list[str]
    ) -> dict[str, np.ndarray]:
        """{C: labels [images, P, 1] of the test patches}."""
        rows, labels = train.features[name].flatten(0, 1), most_frequent(train.pixels.reshape(-1, train.pixels.shape[-1]))
        judged = labels != IGNORED
        mean, scale = scaling(rows)

        def scaled(values: Tensor) -> Tensor:
            values = ((values.double() - mean) / scale).float()
            return torch.cat([values, torch.ones(len(values), 1)], 1).to(subject.device)

        truth = torch.from_numpy(labels[judged].astype(np.int64)).to(subject.device)
        fit = fit_logistic(
            [scaled(rows[torch.from_numpy(judged)])],
            [truth],
            [1 / (cost * len(truth)) for cost in self.settings.costs],
            classes=classes,
            most_iterations=self.settings.iterations,
        )
        if not fit.converged.all():
            stopped = int((~fit.converged).sum())
            notes.append(f"{stopped} of {len(self.settings.costs)} logistic regressions ended at {self.settings.iterations} iterations.")
        asked = scaled(test.features[name].flatten(0, 1))
        shape = (*test.pixels.shape[:2], 1)
        return {
            f"C = {cost:g}": (asked @ weight.T).argmax(1).cpu().numpy().astype(np.uint8).reshape(shape)
            for cost, weight in zip(self.settings.costs, fit.weight[0])
        }

    def _knn(self, subject: Subject, name: str, train: Patches, test: Patches, classes: int, notes: list[str]) -> dict[str, np.ndarray]:
        """{k and distance: labels [images, P, pixels] of the test patches}."""
        rows = train.features[name].flatten(0, 1)
        mean, scale = scaling(rows)
        keys, queries = (
            ((values.double() - mean) / scale).float().to(subject.device) for values in (rows, test.features[name].flatten(0, 1))
        )
        pixels, found = train.pixels.reshape(len(rows), -1), {}
        for metric in METRICS:
            for k, labels in patch_knn(keys, pixels, queries, self.settings.k, metric=metric).items():
                found[f"k = {k}, {metric}"] = labels.reshape(test.pixels.shape)
        return found


def _scores(labels: np.ndarray, truth: np.ndarray, classes: int) -> dict:
    """Scores of labels [images, P, pixels or 1]; a k-NN's vote for void is wrong wherever the truth is judged."""
    labels = np.broadcast_to(labels, truth.shape)
    judged = truth != IGNORED
    confusion = confusion_matrix(truth[judged], np.where(labels == IGNORED, classes, labels)[judged], classes + 1, ignore=None)
    scores = scores_of_confusion(confusion)
    iou = scores["iou"][:classes]
    return scores | {"iou": iou, "miou": float(np.nanmean(iou)) if not np.isnan(iou).all() else 0.0}


def _as_image(labels: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
    """Labels of patches [P, pixels or 1] as an image [side, side]."""
    rows, columns = side // grid[0], side // grid[1]
    labels = np.broadcast_to(labels, (len(labels), rows * columns))
    return labels.reshape(*grid, rows, columns).swapaxes(1, 2).reshape(side, side)


def _pictures(scenes: SceneSet, test: Patches, labels: np.ndarray, side: int) -> list[Picture]:
    """Image, truth and prediction of the chosen first head."""
    accuracy = {}
    for row in range(len(test.pixels)):
        judged = test.pixels[row] != IGNORED
        accuracy[row] = float((np.broadcast_to(labels[row], judged.shape) == test.pixels[row])[judged].mean()) if judged.any() else np.nan
    pictures = []
    for rank, row in spread(accuracy):
        item = scenes.splits["val"][test.positions[row]]
        image = Image.open(item.image).convert("RGB").resize((side, side))
        shown = [painted(image, _as_image(of[row] % IGNORED, test.grid, side)) for of in (test.pixels, labels)]
        caption = f"{rank} image, {item.name}: {100 * accuracy[row]:.1f} % of its pixels; image, truth, prediction"
        pictures.append(Picture(f"segment_{rank}", caption, row_of([at_height(image), *shown])))
    return pictures
