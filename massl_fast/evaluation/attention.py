"""Attention of [CLS] as masks of objects (DINO, figure 4): the largest patches of each head, the best head of each object."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from massl_fast.evaluation.base import Figure, Protocol, Result, Settings
from massl_fast.evaluation.images import SizedImages, Square, files_below, in_order
from massl_fast.evaluation.layouts.voc import MaskedImage, read_segmentation
from massl_fast.evaluation.metrics.attention import blown_up, heaviest_patches, image_jaccard, object_jaccard
from massl_fast.evaluation.pictures import Picture, at_height, painted, row_of, spread
from massl_fast.evaluation.subject import Subject, backbone_of
from massl_fast.evaluation.tokens import cut_to_patches, evaluated, normalised, patch_side
from massl_fast.models.attention import class_token_attention

IMAGE_SIZE = 480
BENCHMARK = 1449
KEEP = 0.6


class AttentionSettings(Settings):
    data: str
    """Folder VOCdevkit/VOC2012."""
    split: str = "val"
    """List of images in ImageSets/Segmentation."""
    keep: float = Field(KEEP, gt=0, le=1)
    """Share of a head's attention that its mask holds."""
    by: Literal["object", "class"] = "object"
    """Whether instances of a class are objects of their own."""


class Attention(Protocol):
    """Attention maps as segmentation: each head's largest patches that hold 60 % of its mass, compared with each object.

    The best head counts for each object, which is an oracle; then means over objects and over images. Void pixels are taken out of the
    prediction, or count against it in the second column: the published text leaves that open.
    """

    name = "attention"
    title = "Jaccard index of attention and objects, %"
    Settings = AttentionSettings
    settings: AttentionSettings

    def figures(self) -> list[Figure]:
        return [Figure("jaccard_percent", "Jaccard"), Figure("jaccard_void_counted_percent", "void counted")]

    def prepare(self, subject: Subject) -> list[str]:
        patch_side(subject)
        for network in subject.networks.values():  # says in a sentence where a network has no such attention
            side = patch_side(subject)
            with evaluated(subject):
                class_token_attention(backbone_of(network), torch.zeros(1, 3, 2 * side, 2 * side, device=subject.device))
        read_segmentation(Path(self.settings.data), self.settings.split, objects=self.settings.by == "object")
        return []

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        root = Path(settings.data)
        items = read_segmentation(root, settings.split, objects=settings.by == "object")
        side = subject.size_or(IMAGE_SIZE)
        images = self._images(subject, items, side)
        rows: list[tuple[int, dict[str, tuple[float, float]]]] = []
        for positions, pixels in images.batches(subject.batch_size, subject.num_workers):
            kept = self._kept(subject, pixels)
            for row, position in enumerate(positions):
                truth = self._truth(items[position])
                if ((truth == 0) | (truth == 255)).all():
                    continue
                found = {}
                for name, (patches, grid) in kept.items():
                    masks = blown_up(patches[row], grid, truth.shape)
                    found[name] = tuple(image_jaccard(object_jaccard(masks, truth, void=void)) for void in (255, None))
                rows.append((position, found))
        ordered = in_order(rows, subject.shard)
        if not ordered:
            raise ValueError(f"No image of {settings.data} could be read and has an object.")
        results, first = {}, {}
        for name in subject.networks:
            scores = np.array([found[name] for _, found in ordered])
            results[name] = dict(zip(("jaccard_percent", "jaccard_void_counted_percent"), (100 * scores.mean(0)).tolist()))
            first = first or {position: float(score) for (position, _), score in zip(ordered, scores[:, 0])}
        departures = []
        if len(items) != BENCHMARK:
            departures.append(f"There are {len(items)} images; VOC2012 val has {BENCHMARK}.")
        if side != IMAGE_SIZE:
            departures.append(f"Images are {side} px instead of {IMAGE_SIZE}.")
        if settings.keep != KEEP:
            departures.append(f"Masks hold {100 * settings.keep:g} % of the attention instead of 60 %.")
        departures.append(
            "Whether objects are instances or classes, and what becomes of void, is not published; the options say what was taken."
        )
        return Result(
            results=results,
            data={"test": {"path": settings.data, "images": len(ordered)}},
            features="attention of the last block",
            image_size=side,
            about=f"{len(ordered)} images of {settings.data}, by {settings.by}.",
            departures=departures,
            notes=notes,
            unreadable=images.names_of_unreadable(),
            pictures=self._pictures(subject, items, images, first) if subject.pictures else [],
        )

    def _images(self, subject: Subject, items: list[MaskedImage], side: int) -> SizedImages:
        root = Path(self.settings.data)
        source = files_below(root, [item.image.relative_to(root).as_posix() for item in items])
        return SizedImages(source, Square(side), shard=subject.shard)

    def _truth(self, item: MaskedImage) -> np.ndarray:
        return item.object_map() if self.settings.by == "object" else item.class_map()

    def _kept(self, subject: Subject, pixels: torch.Tensor) -> dict[str, tuple[np.ndarray, tuple[int, int]]]:
        """{network: (bool [N, heads, h·w], (h, w))} of a batch."""
        kept = {}
        with evaluated(subject):
            batch = normalised(subject, cut_to_patches(pixels.float(), patch_side(subject)))
            for name, network in subject.networks.items():
                maps = class_token_attention(backbone_of(network), batch)
                rows = maps.flatten(2).double().numpy()
                kept[name] = np.stack([heaviest_patches(of_image, self.settings.keep) for of_image in rows]), tuple(maps.shape[-2:])
        return kept

    def _pictures(self, subject: Subject, items: list[MaskedImage], images: SizedImages, scores: dict[int, float]) -> list[Picture]:
        """Image, truth and the masks of the best heads of the first network."""
        network = next(iter(subject.networks))
        place = {position: item for item, position in enumerate(images.positions)}
        whole = SizedImages(images.source, images.geometry)
        pictures = []
        for rank, position in spread(scores):
            pixels, truth = whole[place[position]][1], self._truth(items[position])
            patches, grid = self._kept(subject, pixels[None])[network]
            masks = blown_up(patches[0], grid, truth.shape)
            best = object_jaccard(masks, truth).argmax(1)
            numbers = [number for number in np.unique(truth) if number not in (0, 255)]
            drawn = np.zeros(truth.shape, np.uint8)
            for number, head in zip(numbers, best):
                drawn[masks[head]] = number
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(truth.shape[::-1])
            shown = row_of([at_height(image), painted(image, np.where(truth == 255, 0, truth)), painted(image, drawn)])
            caption = f"{rank} image, {items[position].name}: Jaccard {100 * scores[position]:.1f} %, {network}; image, truth, best heads"
            pictures.append(Picture(f"attention_{rank}", caption, shown))
        return pictures
