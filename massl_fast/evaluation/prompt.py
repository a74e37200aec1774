"""A patch as the prompt for its object: zero-shot segmentation by similarity (MMC; `metrics.prompt` fixes what its text leaves open)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image
from pydantic import field_validator
from torch import Tensor

from massl_fast.evaluation.base import Figure, Result
from massl_fast.evaluation.images import SizedImages, in_order
from massl_fast.evaluation.layouts.objects import ObjectImage, Objects
from massl_fast.evaluation.metrics.attention import blown_up
from massl_fast.evaluation.metrics.prompt import MORE_THAN_HALF, best_patch_iou, cosines, pixels_by_patch, prompt_iou
from massl_fast.evaluation.objects import ObjectProtocol, ObjectSettings
from massl_fast.evaluation.pictures import Picture, at_height, painted, row_of, spread
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.tokens import tokens_of

THRESHOLDS = (0.1, 0.2, 0.3, 0.4)
CEILING = "best patches possible"
# MMC, zero-shot segmentation on COCO: mIoU at thresholds 0.1, 0.2, 0.3, 0.4; ViT-B/16.
PUBLISHED = {
    "random": (16.8, 16.6, 16.2, 15.5), "MAE": (28.6, 30.1, 26.0, 18.5), "DINO": (33.3, 35.1, 33.0, 28.2), "MSN": (32.7, 34.4, 31.6, 25.9),
    "SiT": (32.9, 35.3, 34.7, 31.6), "iBOT": (33.5, 36.2, 36.2, 34.1), "MC-SSL": (31.9, 34.2, 35.0, 35.1), "MMC": (34.6, 37.6, 38.4, 37.9),
}  # fmt: skip


class PromptSettings(ObjectSettings):
    thresholds: tuple[float, ...] = THRESHOLDS
    """Patches of a higher cosine similarity to the prompt are the object."""
    prompts: Literal["all", "centre", "random"] = "all"
    """Every patch more than half on the object in turn, its most interior one, or one drawn at random."""
    by: Literal["instance", "class"] = "instance"
    """Whether instances of a category are objects of their own."""

    @field_validator("thresholds")
    @classmethod
    def _some(cls, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        if not thresholds or any(not -1 <= value <= 1 for value in thresholds):
            raise ValueError(f"--thresholds are {list(thresholds)}; they are one or more cosines, from -1 to 1.")
        return thresholds


class Prompt(ObjectProtocol):
    """Patch prompt: one patch on an object marks all patches that are similar to it as the object, without any training.

    IoU with the object's mask at full size: mean over prompts, then over objects. The row of the best possible patches is the ceiling of
    masks made of patches; that of raw pixels compares the mean and deviation of colours.
    """

    name = "prompt"
    title = "Zero-shot segmentation by a patch, mIoU %"
    Settings = PromptSettings
    settings: PromptSettings

    def figures(self) -> list[Figure]:
        figures = [Figure("best_miou_percent", "best")]
        return figures + [Figure(f"miou_at_{threshold:g}_percent", f"> {threshold:g}") for threshold in self.settings.thresholds]

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        scan = self.scan(subject)
        items = scan.items
        rows = [(position, self._image(subject, items[position], tokens, position)) for position, tokens in tokens_of(subject, scan.images)]
        ordered = in_order(rows, subject.shard)
        names = list(ordered[0][1]["iou"]) if ordered else []
        objects = {name: np.concatenate([row["iou"][name] for _, row in ordered]) for name in names}
        if not names or not len(objects[names[0]]):
            raise ValueError(f"No object of {settings.data} covers more than half of a patch of its image. Take a larger --image-size.")
        results = {name: self._figures(100 * values.mean(0)) for name, values in objects.items()}
        ceiling = 100 * float(np.concatenate([row["ceiling"] for _, row in ordered]).mean())
        results[CEILING] = self._figures(np.full(len(settings.thresholds), ceiling))
        network = next(iter(subject.networks))
        by_image = {position: float(row["iou"][network].mean(0).max()) for position, row in ordered if len(row["iou"][network])}
        departures = scan.departures
        own = not departures and settings.thresholds == THRESHOLDS and settings.prompts == "all"
        departures.append(
            f"What MMC leaves open: prompts are {settings.prompts}, objects are each {settings.by}, masks are compared at full size."
        )
        return Result(
            results=results,
            data={"test": {"path": settings.data, "images": len(ordered), "objects": len(objects[network])}},
            features="patches",
            image_size=scan.side,
            about=f"{len(objects[network])} objects in {len(ordered)} images of {settings.data}, by {settings.by}; "
            f"{sum(row['without'] for _, row in ordered)} objects have no patch of their own and are left out.",
            departures=departures,
            notes=notes,
            unreadable=scan.images.names_of_unreadable(),
            published=[
                dict(who=f"{who} ViT-B/16", value=" ".join(map(str, values)), source="MMC, COCO") for who, values in PUBLISHED.items()
            ]
            if own
            else [],
            pictures=self._pictures(subject, items, scan.images, by_image) if subject.pictures else [],
        )

    def _figures(self, values: np.ndarray) -> dict[str, float]:
        figures = {"best_miou_percent": float(values.max())}
        return figures | {f"miou_at_{t:g}_percent": float(value) for t, value in zip(self.settings.thresholds, values)}

    def _image(self, subject: Subject, item: ObjectImage, tokens: dict[str, Tensor], position: int) -> dict:
        """{"iou": {network: [objects, thresholds]}, "ceiling": [objects], "without": objects left out} of one image."""
        objects = self._objects(item)
        grid = tuple(next(iter(tokens.values())).shape[:2])
        inside, total = pixels_by_patch(objects.masks, grid)
        prompts = [self._prompts(pixels, total, grid, (subject.seed, position, number)) for number, pixels in enumerate(inside)]
        kept = [number for number, patches in enumerate(prompts) if len(patches)]
        thresholds, iou = np.array(self.settings.thresholds), {}
        for name, values in tokens.items():
            similarity = cosines(values.flatten(0, 1).cpu().numpy())
            rows = [prompt_iou(similarity, inside[n], total, prompts[n], thresholds).mean(0) for n in kept]
            iou[name] = np.array(rows).reshape(len(kept), len(thresholds))
        ceiling = np.array([best_patch_iou(inside[n], total) for n in kept])
        return {"iou": iou, "ceiling": ceiling, "without": len(prompts) - len(kept)}

    def _objects(self, item: ObjectImage) -> Objects:
        objects = item.read()
        return objects.joined() if self.settings.by == "class" else objects

    def _prompts(self, inside: np.ndarray, total: np.ndarray, grid: tuple[int, int], seed: tuple[int, int, int]) -> np.ndarray:
        """Patches [prompts] that stand for an object of which `inside` pixels lie in each patch."""
        patches = np.flatnonzero(inside / np.maximum(total, 1) > MORE_THAN_HALF)
        if self.settings.prompts == "all" or not len(patches):
            return patches
        if self.settings.prompts == "random":
            return np.random.default_rng(seed).choice(patches, 1)
        return patches[[interior(patches, grid).argmax()]]

    def _pictures(self, subject: Subject, items: list[ObjectImage], images: SizedImages, scores: dict[int, float]) -> list[Picture]:
        """Image, truth and prediction at the best threshold, from the most interior prompt of each object."""
        network, pictures = next(iter(subject.networks)), []
        for rank, position in spread(scores):
            one = SizedImages(images.source, images.geometry, positions=[position])
            ((_, tokens),) = tokens_of(subject, one, colours=False)
            values = tokens[network]
            grid = tuple(values.shape[:2])
            objects = self._objects(items[position])
            inside, total = pixels_by_patch(objects.masks, grid)
            similarity = cosines(values.flatten(0, 1).cpu().numpy())
            truth, drawn = np.zeros(objects.void.shape, np.uint8), np.zeros(objects.void.shape, np.uint8)
            for number, pixels in enumerate(inside):
                patches = np.flatnonzero(pixels / np.maximum(total, 1) > MORE_THAN_HALF)
                if not len(patches):
                    continue
                prompt = patches[interior(patches, grid).argmax()]
                iou = prompt_iou(similarity, pixels, total, np.array([prompt]), np.array(self.settings.thresholds))[0]
                found = similarity[prompt] > self.settings.thresholds[int(iou.argmax())]
                truth[objects.masks[number]] = drawn[blown_up(found, grid, truth.shape)] = 1 + number % 20
            image = Image.fromarray(one[0][1].permute(1, 2, 0).numpy()).resize(truth.shape[::-1])
            caption = f"{rank} image, {items[position].name}: mIoU {100 * scores[position]:.1f} % at its best threshold, {network}; "
            "image, truth, masks"
            shown = row_of([at_height(image), painted(image, truth), painted(image, drawn)])
            pictures.append(Picture(f"prompt_{rank}", caption, shown))
        return pictures


def interior(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """For each patch, how many steps lie between it and the nearest patch (or border) outside of the set: [patches]."""
    inside = np.zeros((grid[0] + 2, grid[1] + 2), bool)
    rows, columns = patches // grid[1] + 1, patches % grid[1] + 1
    inside[rows, columns] = True
    outside = np.argwhere(~inside)
    steps = np.abs(np.stack([rows, columns], 1)[:, None] - outside[None]).max(-1)
    return steps.min(1)
