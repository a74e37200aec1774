"""Pictures that go with a result: the median, the best and the worst case, never a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from massl_fast.evaluation.layouts.masks import voc_palette

HEIGHT = 240
GAP = 6
OPAQUE = 0.55
RIGHT, WRONG = (26, 156, 91), (212, 61, 53)
Key = TypeVar("Key")


@dataclass(frozen=True)
class Picture:
    name: str
    """Name of its file, without an ending."""
    caption: str
    """What is seen and why this one: a sentence."""
    image: Image.Image


def spread(figures: Mapping[Key, float]) -> list[tuple[str, Key]]:
    """[("median", key), ("best", key), ("worst", key)] by figure, nan left out; fewer where there are fewer cases."""
    order = sorted((key for key, value in figures.items() if not np.isnan(value)), key=lambda key: (figures[key], str(key)))
    if not order:
        return []
    chosen = {"median": order[(len(order) - 1) // 2], "best": order[-1], "worst": order[0]}
    seen: dict[Key, str] = {}
    for rank, key in chosen.items():
        seen.setdefault(key, rank)
    return [(rank, key) for key, rank in seen.items()]


def at_height(image: Image.Image, height: int = HEIGHT, *, sharp: bool = False) -> Image.Image:
    """Resized to a height; `sharp` keeps the edges of patches and pixels."""
    how = Image.Resampling.NEAREST if sharp else Image.Resampling.BICUBIC
    return image.resize((max(1, round(image.width * height / image.height)), height), how)


def row_of(images: Sequence[Image.Image], height: int = HEIGHT) -> Image.Image:
    """Images side by side at one height, on white."""
    scaled = [at_height(image, height) if image.height != height else image for image in images]
    canvas = Image.new("RGB", (sum(image.width + GAP for image in scaled) - GAP, height), "white")
    left = 0
    for image in scaled:
        canvas.paste(image, (left, 0))
        left += image.width + GAP
    return canvas


def column_of(rows: Sequence[Image.Image]) -> Image.Image:
    """Images one below the other, on white."""
    canvas = Image.new("RGB", (max(row.width for row in rows), sum(row.height + GAP for row in rows) - GAP), "white")
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height + GAP
    return canvas


def painted(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """The image with its labels [H, W] laid over in the colours of VOC; 0 stays clear."""
    labels = labels.astype(np.uint8)
    if labels.shape != (image.height, image.width):
        labels = np.array(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
    pixels = np.asarray(image, np.float32)
    mixed = (1 - OPAQUE) * pixels + OPAQUE * voc_palette()[labels]
    return Image.fromarray(np.where((labels > 0)[..., None], mixed, pixels).astype(np.uint8))


def framed(image: Image.Image, right: bool | None, height: int = 120, width: int = 5) -> Image.Image:
    """At a height, with a frame of green for right, red for wrong, white for neither."""
    image = at_height(image, height)
    colour = "white" if right is None else RIGHT if right else WRONG
    canvas = Image.new("RGB", (image.width + 2 * width, image.height + 2 * width), colour)
    canvas.paste(image, (width, width))
    return canvas


def linked(left: Image.Image, right: Image.Image, pairs: Sequence[tuple[tuple[float, float], tuple[float, float], bool]]) -> Image.Image:
    """Two images side by side with lines between (x, y) of the left and of the right; wrong ones in red."""
    canvas = row_of([left, right], left.height)
    draw = ImageDraw.Draw(canvas)
    offset = left.width + GAP
    for (x1, y1), (x2, y2), good in pairs:
        colour = RIGHT if good else WRONG
        draw.line([(x1, y1), (x2 + offset, y2)], fill=colour, width=2)
        for x, y in ((x1, y1), (x2 + offset, y2)):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], outline=colour, width=2)
    return canvas
