"""Attention of heads as masks of objects, with the best head of each object (DINO, figure 4)."""

from __future__ import annotations

import numpy as np

from massl_fast.evaluation.metrics.prompt import patch_of_pixels
from massl_fast.evaluation.metrics.segmentation import jaccard

VOID = 255


def heaviest_patches(attention: np.ndarray, keep: float) -> np.ndarray:
    """The largest patches of each head that together hold `keep` of its mass: [heads, P] → bool [heads, P].

    Patches are summed from the smallest up; a patch stays where the running share exceeds 1 - `keep`.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"The share of attention to keep is {keep}; it must lie above 0 and be at most 1.")
    order = np.argsort(attention, axis=1, kind="stable")
    ascending = np.take_along_axis(attention, order, 1)
    stays = np.cumsum(ascending / ascending.sum(1, keepdims=True), axis=1) > 1 - keep
    kept = np.empty(attention.shape, bool)
    np.put_along_axis(kept, order, stays, 1)
    return kept


def blown_up(patches: np.ndarray, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Values of patches [..., h·w] at the pixels of an image [..., H, W], by nearest neighbour."""
    return patches[..., patch_of_pixels(shape, grid)]


def object_jaccard(masks: np.ndarray, object_map: np.ndarray, *, void: int | None = VOID) -> np.ndarray:
    """Jaccard index of every object with every head: [objects, heads].

    Args:
        masks [heads, H, W]: bool.
        object_map [H, W]: the objects' numbers; 0 is background and 255 void, which are no objects.
        void: pixels of this number are taken out of the prediction; None: they count as wrong where predicted.
    """
    left_out = object_map == void if void is not None else None
    numbers = [number for number in np.unique(object_map) if number not in (0, VOID)]
    rows = [[jaccard(mask, object_map == number, left_out) for mask in masks] for number in numbers]
    return np.array(rows).reshape(len(numbers), len(masks))


def image_jaccard(by_object: np.ndarray) -> float:
    """Mean over objects of the best head: [objects, heads] → one figure. The choice of the head is an oracle."""
    return float(by_object.max(1).mean())
