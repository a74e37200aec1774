"""Objects of COCO or VOC2012, which their folders distinguish: masks of instances, their categories, and where nothing is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from massl_fast.evaluation.layouts import coco, voc
from massl_fast.evaluation.layouts.coco import CocoImage
from massl_fast.evaluation.layouts.voc import MaskedImage


@dataclass(frozen=True)
class Objects:
    """Objects of one image."""

    masks: np.ndarray
    """bool [objects, H, W]; they may overlap."""
    categories: np.ndarray
    """int64 [objects], from 1."""
    void: np.ndarray
    """bool [H, W]: crowds and borders, which are no object."""

    def joined(self) -> Objects:
        """The objects of each category as one."""
        categories = np.unique(self.categories)
        masks = np.array([self.masks[self.categories == category].any(0) for category in categories], bool)
        return Objects(masks.reshape(len(categories), *self.void.shape), categories, self.void)

    def category_map(self) -> np.ndarray:
        """int64 [H, W]: category of each pixel, 0 background, -1 void; where objects overlap, that of the last."""
        found = np.zeros(self.void.shape, np.int64)
        for mask, category in zip(self.masks, self.categories):
            found[mask] = category
        return np.where(self.void & (found == 0), -1, found)


@dataclass(frozen=True)
class ObjectImage:
    name: str
    image: Path
    read: Callable[[], Objects]


def read_objects(root: Path, split: str) -> tuple[str, list[ObjectImage]]:
    """(COCO or VOC2012, images of a split with their objects); raises ValueError where the folders are of neither."""
    if (root / "ImageSets/Segmentation").is_dir():
        items = voc.read_segmentation(root, split, objects=True)
        return "VOC2012", [ObjectImage(item.name, item.image, lambda item=item: _of_voc(item)) for item in items]
    if (root / "annotations").is_dir():
        images = coco.read_instances(root, split)
        return "COCO", [ObjectImage(item.name, item.image, lambda item=item: _of_coco(item)) for item in images]
    raise ValueError(
        f"{root} has the folders of neither VOC2012 (ImageSets/Segmentation) nor COCO (annotations). Name the folder that does."
    )


def _of_voc(item: MaskedImage) -> Objects:
    objects, classes = item.object_map(), item.class_map()
    if objects.shape != classes.shape:
        raise ValueError(f"The masks {item.object_file} and {item.class_file} are of different sizes.")
    numbers = [number for number in np.unique(objects) if number not in (0, voc.VOID)]
    masks = np.array([objects == number for number in numbers], bool).reshape(len(numbers), *objects.shape)
    categories = [np.bincount(labels).argmax() if len(labels := classes[mask & (classes != voc.VOID)]) else 0 for mask in masks]
    return Objects(masks, np.array(categories, np.int64), (objects == voc.VOID) | (classes == voc.VOID))


def _of_coco(item: CocoImage) -> Objects:
    masks, categories = item.instances()
    return Objects(masks, categories, item.crowd())
