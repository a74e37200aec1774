"""A patch as the prompt for its object, and how far similarities within a category overlap those between categories.

The protocols of MMC (*Masked momentum contrastive learning for zero-shot semantic understanding*), which comes without code. What its text
leaves open is fixed here: every patch more than half covered by an object is a prompt in turn, masks are compared at their full size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

MORE_THAN_HALF = 0.5
NUM_BINS = 200


def patch_of_pixels(shape: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Number of the patch of a grid [h, w] that holds the centre of each pixel of an image [H, W]: int64 [H, W]."""
    rows, columns = ((2 * np.arange(size) + 1) * cells // (2 * size) for size, cells in zip(shape, grid))
    return rows[:, None] * grid[1] + columns[None]


def pixels_by_patch(masks: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [objects, h·w]: pixels of each mask in each patch, int64 [h·w]: all pixels of each patch).

    Args:
        masks [objects, H, W]: bool; they may overlap.
    """
    patches, num = patch_of_pixels(masks.shape[1:], grid), grid[0] * grid[1]
    inside = np.array([np.bincount(patches[mask], minlength=num) for mask in masks], np.int64).reshape(len(masks), num)
    return inside, np.bincount(patches.ravel(), minlength=num)


def label_patches(label_map: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Most frequent label of each patch's pixels (the lowest of equals) [h·w], and its share of them [h·w].

    A patch that no pixel falls into, where the image is smaller than the grid, has share 0.
    """
    labels = np.unique(label_map)
    inside, total = pixels_by_patch(label_map[None] == labels[:, None, None], grid)
    best = inside.argmax(0)
    return labels[best], inside[best, np.arange(len(best))] / np.maximum(total, 1)


def cosines(features: np.ndarray) -> np.ndarray:
    """Cosine similarities of all patches of an image: [P, C] → [P, P], in their precision. A row of zeros is similar to nothing."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(features.dtype).tiny)
    return unit @ unit.T


@dataclass(frozen=True)
class Prompted:
    """Zero-shot masks of one object."""

    patches: np.ndarray
    """[prompts]: the patches that were prompts."""
    iou: np.ndarray
    """[prompts, thresholds]."""


def prompt_iou(similarity: np.ndarray, inside: np.ndarray, total: np.ndarray, patches: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """IoU of an object's mask with the patches that are more similar to a prompt than a threshold: [prompts, thresholds].

    Args:
        similarity [P, P]: cosines of the image's patches; a prompt belongs to its own mask whatever the threshold.
        inside [P], total [P]: pixels of the object, and all pixels, in each patch (`pixels_by_patch`).
        patches [prompts]: the prompts.
    """
    iou = np.empty((len(patches), len(thresholds)))
    for column, threshold in enumerate(thresholds):
        chosen = similarity[patches] > threshold
        chosen[np.arange(len(patches)), patches] = True
        common = chosen @ inside
        iou[:, column] = common / (chosen @ total + inside.sum() - common)
    return iou


def best_patch_iou(inside: np.ndarray, total: np.ndarray) -> float:
    """The highest IoU with an object's mask that any set of patches has: the ceiling of a patch-wise mask.

    Patches are taken in order of their covered share: the best set is one of those prefixes.
    """
    share = inside / np.maximum(total, 1)
    order = np.argsort(-share, kind="stable")
    common, size = np.cumsum(inside[order]), np.cumsum(total[order])
    return float((common / (size + inside.sum() - common)).max())


@dataclass
class SimilarityHistograms:
    """Cosines of patch pairs of the same label (intra) and of different ones (inter), added up over images."""

    bins: int = NUM_BINS
    intra: np.ndarray = field(init=False)
    inter: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"The histograms have {self.bins} bins; two at least are needed to compare them.")
        self.intra, self.inter = np.zeros(self.bins, np.int64), np.zeros(self.bins, np.int64)
        self._sums = np.zeros(2)

    @property
    def edges(self) -> np.ndarray:
        return np.linspace(-1, 1, self.bins + 1)

    def add(self, similarity: np.ndarray, labels: np.ndarray) -> None:
        """Pairs i < j of one image: cosines [P, P] and labels [P] of the patches that take part."""
        upper = np.triu_indices(len(labels), 1)
        # Rounding carries the cosine of two equal patches past 1, outside the last bin.
        values = np.clip(similarity[upper], -1, 1)
        same = labels[upper[0]] == labels[upper[1]]
        self.intra += np.histogram(values[same], self.edges)[0]
        self.inter += np.histogram(values[~same], self.edges)[0]
        self._sums += values[same].sum(dtype=np.float64), values[~same].sum(dtype=np.float64)

    def __iadd__(self, other: SimilarityHistograms) -> SimilarityHistograms:
        self.intra += other.intra
        self.inter += other.inter
        self._sums += other._sums
        return self

    @property
    def overlap(self) -> float:
        """Σ over bins of the smaller share: 0 where the kinds are apart, 1 where they coincide; nan where a kind has no pair."""
        if not self.intra.sum() or not self.inter.sum():
            return float("nan")
        return float(np.minimum(self.intra / self.intra.sum(), self.inter / self.inter.sum()).sum())

    @property
    def means(self) -> tuple[float, float]:
        """Mean cosine of the intra and of the inter pairs."""
        pairs = np.array([self.intra.sum(), self.inter.sum()])
        with np.errstate(invalid="ignore"):
            intra, inter = (self._sums / pairs).tolist()
        return intra, inter
