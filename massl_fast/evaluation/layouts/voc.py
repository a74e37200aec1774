"""The folders of PASCAL VOC: multi-label lists of VOC2007, class and object masks of VOC2012."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from massl_fast.evaluation.layouts.lists import inside, read_lines
from massl_fast.evaluation.layouts.masks import read_mask

# fmt: off
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike",
    "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
VOID = 255


@dataclass(frozen=True)
class MultiLabel:
    """Images of one split with a label of every class."""

    root: Path
    files: tuple[str, ...]
    """Relative to `root`."""
    labels: np.ndarray
    """int64 [images, classes]: 1, 0 difficult, -1."""
    classes: tuple[str, ...]


def read_multilabel(root: Path, split: str) -> MultiLabel:
    """Labels of ROOT/ImageSets/Main/CLASS_SPLIT.txt, whose lines are an image's name and, last, its label.

    Classes are those that have a list, in VOC's order, others after them by name.

    Raises:
        ValueError: no list is there, a line is none, or the lists do not name the same images.
    """
    main = root / "ImageSets" / "Main"
    ending = f"_{inside(main, split, '--split')}.txt"
    found = {file.name.removesuffix(ending): file for file in sorted(main.glob(f"*{ending}"))}
    if not found:
        raise ValueError(f"{main} holds no lists CLASS{ending}. Name the folder VOCdevkit/VOC2007.")
    classes = [name for name in CLASSES if name in found] + [name for name in found if name not in CLASSES]
    names, columns = None, []
    for name in classes:
        rows = [line.split() for line in read_lines(found[name])]
        wrong = next((row for row in rows if len(row) < 2 or row[-1] not in ("1", "0", "-1")), None)
        if wrong is not None:
            raise ValueError(f"{found[name]} has the line {' '.join(wrong)!r}; a line is an image's name and 1, 0 or -1.")
        if names is None:
            names = [row[0] for row in rows]
        elif names != [row[0] for row in rows]:
            raise ValueError(f"{found[name]} names other images, or another order, than {found[classes[0]].name}.")
        columns.append([int(row[-1]) for row in rows])
    files = tuple(inside(root, f"JPEGImages/{name}.jpg", found[classes[0]]) for name in names)
    return MultiLabel(root, files, np.array(columns, np.int64).T.reshape(len(files), len(classes)), tuple(classes))


@dataclass(frozen=True)
class MaskedImage:
    """An image with label maps of one size."""

    name: str
    image: Path
    class_file: Path | None
    object_file: Path | None

    def class_map(self) -> np.ndarray:
        """[H, W]: 0 background, 1 … classes, 255 void."""
        return read_mask(self.class_file)

    def object_map(self) -> np.ndarray:
        """[H, W]: 0 background, 1 … objects of this image, 255 void."""
        return read_mask(self.object_file)


def read_segmentation(root: Path, split: str, *, objects: bool = False, classes: str = "SegmentationClass") -> list[MaskedImage]:
    """Images that ROOT/ImageSets/Segmentation/SPLIT.txt lists, with their masks in the folder `classes` (and, with `objects`, those of
    objects).

    Raises:
        ValueError: the list, an image or a mask is missing, or a name leads out of the folder.
    """
    listed = root / "ImageSets" / "Segmentation" / f"{inside(root, split, '--split')}.txt"
    if not listed.is_file():
        raise ValueError(f"There is no {listed}. Name the folder VOCdevkit/VOC2012.")
    found = []
    for name in read_lines(listed):
        paths = [root / inside(root, f"JPEGImages/{name}.jpg", listed), root / f"{classes}/{name}.png"]
        paths.append(root / f"SegmentationObject/{name}.png")
        needed = paths if objects else paths[:2]
        missing = next((path for path in needed if not path.is_file()), None)
        if missing is not None:
            raise ValueError(f"{listed} names {name}, but there is no {missing}.")
        found.append(MaskedImage(name, *paths))
    if not found:
        raise ValueError(f"{listed} lists no images.")
    return found
