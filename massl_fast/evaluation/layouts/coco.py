"""Images of COCO with the masks of their instances: SPLIT2017/*.jpg and annotations/instances_SPLIT2017.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from massl_fast.data.decode import MOST_PIXELS
from massl_fast.evaluation.extra import needs
from massl_fast.evaluation.layouts.lists import inside


@dataclass(frozen=True)
class CocoImage:
    name: str
    image: Path
    height: int
    width: int
    """Width of the masks, pixels."""
    annotations: tuple[dict[str, Any], ...]

    def instances(self) -> tuple[np.ndarray, np.ndarray]:
        """(bool [objects, H, W], categories [objects]) of the instances that are not crowds, in the order of the file."""
        kept = [entry for entry in self.annotations if not entry.get("iscrowd")]
        return self._masks(kept), np.array([entry["category_id"] for entry in kept], np.int64)

    def crowd(self) -> np.ndarray:
        """bool [H, W]: where crowds are."""
        return self._masks([entry for entry in self.annotations if entry.get("iscrowd")]).any(0)

    def _masks(self, entries: list[dict[str, Any]]) -> np.ndarray:
        shape = self.height, self.width
        masks = [decode_segmentation(entry.get("segmentation"), shape, f"annotation {entry.get('id')} of {self.name}") for entry in entries]
        return np.array(masks, bool).reshape(len(entries), *shape)


def read_instances(root: Path, split: str) -> list[CocoImage]:
    """The images of ROOT/annotations/instances_SPLIT2017.json that are in ROOT/SPLIT2017.

    Raises:
        ValueError: the file is missing, is no such file, or names files outside the folder; or none of its images is there.
    """
    file = root / "annotations" / f"instances_{inside(root, split, '--split')}2017.json"
    folder = root / f"{split}2017"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        images = {entry["id"]: (entry["file_name"], int(entry["height"]), int(entry["width"])) for entry in content["images"]}
        by_image: dict[Any, list[dict[str, Any]]] = {key: [] for key in images}
        for entry in content["annotations"]:
            if not isinstance(entry["category_id"], int):
                raise TypeError("a category_id that is no whole number")
            by_image[entry["image_id"]].append(entry)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}. Name the folder that holds annotations and {split}2017.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no annotation file of COCO: {type(error).__name__} {error}.") from None
    found = []
    for key, (name, height, width) in images.items():
        path = folder / inside(folder, str(name), file)
        if not (height > 0 and width > 0 and height * width <= MOST_PIXELS):
            raise ValueError(f"{file} gives {name} {width} × {height} pixels; that is no image.")
        if path.is_file():
            found.append(CocoImage(str(name), path, height, width, tuple(by_image[key])))
    if not found:
        raise ValueError(f"{file} lists {len(images)} images, of which none is in {folder}.")
    return sorted(found, key=lambda item: item.name)


def decode_segmentation(segmentation: Any, shape: tuple[int, int], named: str) -> np.ndarray:
    """A mask [H, W] from polygons or from run lengths, plain or compressed.

    Raises:
        ValueError: it is neither, does not fit the image, or polygons are found and pycocotools is not installed.
    """
    height, width = shape
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        counts = _compressed_runs(counts) if isinstance(counts, str) else counts
        if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts) or sum(counts) != height * width:
            raise ValueError(f"The run lengths of {named} do not add up to the {width} × {height} pixels of its image.")
        runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return runs.reshape(width, height).T
    if isinstance(segmentation, list) and all(_is_polygon(part) for part in segmentation):
        mask = np.zeros(shape, bool)
        if segmentation:
            tools = needs("pycocotools.mask", "reading polygons of COCO")
            mask = tools.decode(tools.merge(tools.frPyObjects(segmentation, height, width))).astype(bool)
        return mask
    raise ValueError(f"The segmentation of {named} is neither polygons nor run lengths.")


def _is_polygon(part: Any) -> bool:
    """Whether these are coordinates of three points or more, none of them far off any image."""
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    return all(isinstance(value, int | float) and -1e5 < value < 1e5 for value in part)


def _compressed_runs(text: str) -> list[int]:
    """COCO's string of run lengths: 5 bits a character, a sixth says that more follow; from the third run on, differences to two before."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return []
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
