"""Training and validation images with class masks of VOC2012, ADE20K or Cityscapes, which their folders distinguish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from massl_fast.data.sources import is_image_name
from massl_fast.evaluation.layouts import voc
from massl_fast.evaluation.layouts.lists import inside
from massl_fast.evaluation.layouts.masks import read_mask

IGNORED = 255


@dataclass(frozen=True)
class Scene:
    name: str
    image: Path
    mask: Path
    to_labels: Callable[[np.ndarray], np.ndarray]

    def labels(self) -> np.ndarray:
        """[H, W] uint8: classes from 0, 255 ignored."""
        return self.to_labels(read_mask(self.mask))


@dataclass(frozen=True)
class SceneSet:
    kind: str
    """VOC2012 (augmented or not), ADE20K or Cityscapes."""
    num_classes: int
    splits: dict[str, list[Scene]]
    """train and val."""


def read_scenes(root: Path, *, augmented: bool = False) -> SceneSet:
    """The data set that the folders of `root` are those of.

    With `augmented`, VOC's training images are those of ImageSets/Segmentation/trainaug.txt, with masks in SegmentationClassAug (Hariharan
    et al. 2011), where that list is there; the set's kind is then "VOC2012, augmented".

    VOC: background counts as class 0, 255 is void. ADE20K: 0 is "other" and ignored, labels shift by one. Cityscapes: train ids.

    Raises:
        ValueError: the folders are none of these, or masks are missing.
    """
    if (root / "ImageSets/Segmentation").is_dir():
        more = augmented and (root / "ImageSets/Segmentation/trainaug.txt").is_file()
        items = {
            "train": voc.read_segmentation(root, "trainaug", classes="SegmentationClassAug")
            if more
            else voc.read_segmentation(root, "train"),
            "val": voc.read_segmentation(root, "val"),
        }
        splits = {split: [Scene(item.name, item.image, item.class_file, _as_it_is) for item in part] for split, part in items.items()}
        return SceneSet("VOC2012, augmented" if more else "VOC2012", 1 + len(voc.CLASSES), splits)
    if (root / "annotations/training").is_dir():
        folders = {"train": "training", "val": "validation"}
        splits = {
            split: _paired(
                root / "images" / folder, lambda path, folder=folder: root / "annotations" / folder / f"{path.stem}.png", _shifted
            )
            for split, folder in folders.items()
        }
        return SceneSet("ADE20K", 150, splits)
    if (root / "leftImg8bit").is_dir():

        def mask_of(path: Path) -> Path:
            stem = path.name.removesuffix("_leftImg8bit.png")
            return root / "gtFine" / path.parent.parent.name / path.parent.name / f"{stem}_gtFine_labelTrainIds.png"

        splits = {split: _paired(root / "leftImg8bit" / split, mask_of, _as_it_is) for split in ("train", "val")}
        return SceneSet("Cityscapes", 19, splits)
    raise ValueError(
        f"{root} has the folders of none of VOC2012 (ImageSets/Segmentation), ADE20K (images/training, annotations/training) and "
        f"Cityscapes (leftImg8bit, gtFine). Name the folder that holds these."
    )


def _paired(folder: Path, mask_of: Callable[[Path], Path], to_labels: Callable[[np.ndarray], np.ndarray]) -> list[Scene]:
    images = sorted(path for path in folder.rglob("*") if is_image_name(path.name)) if folder.is_dir() else []
    if not images:
        raise ValueError(f"There are no images in {folder}.")
    scenes = []
    for path in images:
        inside(folder, path.relative_to(folder).as_posix(), folder)
        mask = mask_of(path)
        if not mask.is_file():
            raise ValueError(f"The image {path} has no mask {mask}.")
        scenes.append(Scene(path.relative_to(folder).as_posix(), path, mask, to_labels))
    return scenes


def _as_it_is(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8)


def _shifted(mask: np.ndarray) -> np.ndarray:
    return np.where(mask == 0, IGNORED, mask - 1).astype(np.uint8)
