"""Whether patches of two views of an image find the same places (iBOT, appendix on sparse correspondence)."""

from __future__ import annotations

import numpy as np


def patch_centres(corners: np.ndarray, side: int) -> np.ndarray:
    """Centres in the image of the patches of views: [N, 4] → [N, side², 2] (row, column), in the units of the corners.

    Args:
        corners: top, left, bottom, right of each view; left and right swapped where it is mirrored.
        side: patches along a side.
    """
    steps = (np.arange(side) + 0.5) / side
    rows = corners[:, 0, None] + (corners[:, 2] - corners[:, 0])[:, None] * steps
    columns = corners[:, 1, None] + (corners[:, 3] - corners[:, 1])[:, None] * steps
    grid = np.stack(np.broadcast_arrays(rows[:, :, None], columns[:, None, :]), -1)
    return grid.reshape(len(corners), side * side, 2)


def overlapping(centres1: np.ndarray, centres2: np.ndarray, margin: float) -> np.ndarray:
    """Patches of view 1 that view 2 shows, too, with a margin: bool [N, P]."""
    low, high = centres2.min(1, keepdims=True) - margin, centres2.max(1, keepdims=True) + margin
    return ((centres1 >= low) & (centres1 <= high)).all(-1)


def matches(features1: np.ndarray, features2: np.ndarray) -> np.ndarray:
    """For each patch of view 1, the patch of view 2 of largest inner product (not cosine): [N, P, C] twice → int64 [N, P]."""
    return (features1 @ features2.transpose(0, 2, 1)).argmax(-1)


def correct_matches(match: np.ndarray, centres1: np.ndarray, centres2: np.ndarray, radius: int) -> np.ndarray:
    """Whether each match lies at most `radius` rows and columns from the patch of view 2 that is nearest by true position: bool [N, P]."""
    side = int(np.sqrt(match.shape[1]))
    distance = ((centres1[:, :, None] - centres2[:, None]) ** 2).sum(-1)
    nearest = distance.argmin(-1)
    rows, columns = (np.abs(part(match, side) - part(nearest, side)) for part in (np.floor_divide, np.remainder))
    return np.maximum(rows, columns) <= radius


def correspondence_accuracy(correct: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """Share of correct matches among the overlapping patches of each pair [N]; nan where the views share none."""
    with np.errstate(invalid="ignore"):
        return (correct & overlap).sum(1) / overlap.sum(1)
