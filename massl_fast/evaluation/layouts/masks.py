"""Label masks as benchmarks and their users store them: palette, grey, 16-bit or painted in VOC's colours."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from massl_fast.data.decode import MOST_PIXELS

INDEX_MODES = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L")


def voc_palette() -> np.ndarray:
    """uint8 [256, 3]: the colours of VOC and DAVIS; bit b of a number goes to bit 7 - b // 3 of channel b % 3."""
    numbers = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        palette[:, bit % 3] |= (((numbers >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    return palette


def read_mask(file: Path) -> np.ndarray:
    """The labels of a mask: [H, W], uint8, or int32 where a label exceeds 255. Colours are taken for those of VOC's palette.

    Raises:
        ValueError: the file is missing or damaged, too large, or has colours that the palette lacks.
    """
    try:
        image = Image.open(io.BytesIO(file.read_bytes()))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"it announces {image.width} × {image.height} pixels")
        image.load()
    except Exception as error:  # decoders of strangers' bytes raise anything at all
        raise ValueError(f"The mask {file} cannot be read: {' '.join(str(error).split()) or type(error).__name__}.") from None
    if image.mode in INDEX_MODES:
        labels = np.asarray(image).astype(np.int32)
        return labels.astype(np.uint8) if labels.max(initial=0) < 256 else labels
    colours = np.asarray(image.convert("RGB")).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    known = voc_palette().astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    order = np.argsort(known)
    place = np.searchsorted(known[order], colours).clip(max=255)
    labels = order[place]
    if (known[labels] != colours).any():
        wrong = colours[known[labels] != colours][0]
        raise ValueError(
            f"The mask {file} ({image.mode}) has the colour #{wrong:06x}, which is none of VOC's palette. Save masks of numbers."
        )
    return labels.astype(np.uint8)


def write_mask(file: Path, labels: np.ndarray) -> None:
    """Labels [H, W], uint8, as a PNG with VOC's palette, which the evaluators of DAVIS and VOC read."""
    image = Image.fromarray(labels.astype(np.uint8), mode="P")
    image.putpalette(voc_palette().tobytes())
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
