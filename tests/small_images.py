"""Small labelled JPEG files for tests: each class has a colour of its own, so that k-NN has something to find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, *, classes: int, per_class: int, size: int = 24, seed: int = 0) -> Path:
    """``folder``/class_<c>/<i>.jpg; returns ``folder``."""
    generator = np.random.default_rng(seed)
    for number in range(classes):
        colour = generator.integers(40, 215, 3)
        (folder / f"class_{number}").mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = np.clip(colour + generator.normal(0, 30, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class_{number}" / f"{index:03d}.jpg", quality=90)
    return folder
