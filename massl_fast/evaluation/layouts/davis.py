"""The folders of DAVIS-2017: JPEGImages/480p/SEQ/*.jpg, Annotations/480p/SEQ/*.png and ImageSets/2017/SPLIT.txt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from massl_fast.data.sources import is_image_name
from massl_fast.evaluation.layouts.lists import inside, read_lines
from massl_fast.evaluation.layouts.masks import read_mask

RESOLUTION = "480p"
YEAR = "2017"


@dataclass(frozen=True)
class Sequence:
    name: str
    frames: tuple[Path, ...]
    """Images in order of their names."""
    masks: tuple[Path | None, ...]
    """Masks of the same frames, None where there is none; the first frame always has one."""

    def truth(self) -> np.ndarray | None:
        """The masks of all frames [T, H, W], uint8, or None where some are missing (a test split).

        Raises:
            ValueError: a mask cannot be read, or they differ in size.
        """
        if None in self.masks:
            return None
        masks = [read_mask(file) for file in self.masks]
        shapes = {mask.shape for mask in masks}
        if len(shapes) > 1:
            raise ValueError(f"The masks of the sequence {self.name} are of different sizes: {', '.join(map(str, sorted(shapes)))}.")
        return np.stack(masks)


def read_sequences(root: Path, split: str) -> list[Sequence]:
    """The sequences that ImageSets/2017/SPLIT.txt lists.

    Raises:
        ValueError: the list, a sequence or the mask of its first frame is missing, or a name leads out of the folder.
    """
    listed = root / "ImageSets" / YEAR / f"{inside(root, split, '--split')}.txt"
    if not listed.is_file():
        raise ValueError(f"There is no {listed}. Name the folder DAVIS itself, which holds JPEGImages, Annotations and ImageSets.")
    images, annotations = root / "JPEGImages" / RESOLUTION, root / "Annotations" / RESOLUTION
    sequences = []
    for name in read_lines(listed):
        folder, masks = images / inside(images, name, listed), annotations / inside(annotations, name, listed)
        frames = sorted(file for file in folder.glob("*") if is_image_name(file.name)) if folder.is_dir() else []
        if not frames:
            raise ValueError(f"{listed} names the sequence {name!r}, but {folder} holds no frames.")
        files = [file if (file := masks / f"{frame.stem}.png").is_file() else None for frame in frames]
        if files[0] is None:
            raise ValueError(f"The sequence {name} has no mask of its first frame, {frames[0].stem}.png: nothing says what to follow.")
        sequences.append(Sequence(name, tuple(frames), tuple(files)))
    if not sequences:
        raise ValueError(f"{listed} lists no sequences.")
    return sequences
