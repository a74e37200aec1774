"""What MMC's two protocols share: photos with objects of COCO or VOC2012, squeezed to a square of 480 px."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from massl_fast.evaluation.base import Protocol, Settings
from massl_fast.evaluation.extra import needs
from massl_fast.evaluation.images import SizedImages, Square, files_below
from massl_fast.evaluation.layouts.objects import ObjectImage, read_objects
from massl_fast.evaluation.subject import Subject
from massl_fast.evaluation.tokens import patch_side

IMAGE_SIZE = 480
BENCHMARK = 5000


class ObjectSettings(Settings):
    data: str
    """Folder of COCO (annotations, val2017) or VOCdevkit/VOC2012."""
    split: str = "val"
    """Images of this split."""
    max_images: int = Field(0, ge=0)
    """Evaluate only this many images, the first ones; 0: all."""


@dataclass(frozen=True)
class Scan:
    """The photos of a split on their way to the networks."""

    items: list[ObjectImage]
    images: SizedImages
    """This rank's share of the items."""
    side: int
    """Side of the square, pixels."""
    departures: list[str]
    """What tells these images from MMC's."""


class ObjectProtocol(Protocol):
    """A protocol on the patches of photos whose objects are known."""

    settings: ObjectSettings
    recipes = ("patches",)

    def prepare(self, subject: Subject) -> list[str]:
        patch_side(subject)
        kind, _ = read_objects(Path(self.settings.data), self.settings.split)
        if kind == "COCO":
            needs("pycocotools.mask", "reading polygons of COCO")
        return []

    def scan(self, subject: Subject) -> Scan:
        root, side = Path(self.settings.data), subject.size_or(IMAGE_SIZE)
        kind, every = read_objects(root, self.settings.split)
        items = every[: self.settings.max_images or None]
        departures = []
        if kind != "COCO" or len(every) != BENCHMARK or len(items) != len(every):
            departures.append(f"The images are {len(items)} of {kind}; MMC's are the {BENCHMARK} of COCO val.")
        if side != IMAGE_SIZE:
            departures.append(f"Images are {side} px instead of {IMAGE_SIZE}.")
        source = files_below(root, [item.image.relative_to(root).as_posix() for item in items])
        return Scan(items, SizedImages(source, Square(side), shard=subject.shard), side, departures)
