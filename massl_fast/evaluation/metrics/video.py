"""Region and boundary accuracy of DAVIS (Pont-Tuset et al. 2017, *The 2017 DAVIS challenge*; Perazzi et al. 2016, section 4).

J is the Jaccard index of a mask, F the harmonic mean of precision and recall of its boundary pixels, where one is found if the other
boundary comes within 0.8 % of the image's diagonal. Figures agree with the official evaluator, which dilates boundaries by a disk.
"""

from __future__ import annotations

import math

import numpy as np

from massl_fast.evaluation.extra import needs
from massl_fast.evaluation.metrics.segmentation import jaccard

BOUNDARY_SHARE = 0.008
NUM_BINS = 4


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask [H, W] that differ from their right, lower or lower right neighbour, where there is one; never the last corner."""
    edge = np.zeros(mask.shape, bool)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def boundary_radius(shape: tuple[int, int]) -> int:
    """Pixels within which boundaries match: 0.8 % of the diagonal, rounded up."""
    return math.ceil(BOUNDARY_SHARE * math.hypot(*shape))


def boundary_f(prediction: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """F of two masks (bool [H, W]); void pixels are cleared from both first. 1 where neither has a boundary, 0 where one has none.

    Raises:
        ValueError: SciPy is not installed.
    """
    if void is not None:
        prediction, truth = prediction & ~void, truth & ~void
    found, expected = np.argwhere(boundary(prediction)), np.argwhere(boundary(truth))
    if len(found) == 0 or len(expected) == 0:
        return float(len(found) == len(expected))
    # A pixel lies in the other boundary dilated by a disk where the nearest pixel of that boundary is at most the radius away.
    tree = needs("scipy.spatial", "the boundary measure of DAVIS").cKDTree
    radius = boundary_radius(truth.shape)
    precision = float((tree(expected).query(found)[0] <= radius).mean())
    recall = float((tree(found).query(expected)[0] <= radius).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def region_and_boundary(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J and F of every object in every scored frame of a sequence: two float64 [objects, T - 2].

    Args:
        truth, prediction [T, H, W]: integers, 0 background, 1 … objects. Objects are counted in the first true frame; 255 is void and,
            as in the semi-supervised task, counts as background. The first and the last frame are not scored.

    Raises:
        ValueError: shapes differ, no frame would be scored, or the first frame has no object.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"The true masks are of shape {truth.shape}, the predicted ones of shape {prediction.shape}; they must agree.")
    if len(truth) < 3:
        raise ValueError(f"A sequence of {len(truth)} frames has none to score: the first and the last do not count.")
    truth = np.where(truth == 255, 0, truth)
    objects = int(truth[0].max())
    if objects == 0:
        raise ValueError("The first frame holds no object, so that there is nothing to follow.")
    region, edge = np.zeros((objects, len(truth) - 2)), np.zeros((objects, len(truth) - 2))
    for number in range(objects):
        for frame in range(1, len(truth) - 1):
            masks = prediction[frame] == number + 1, truth[frame] == number + 1
            region[number, frame - 1] = jaccard(*masks)
            edge[number, frame - 1] = boundary_f(*masks)
    return region, edge


def mean_recall_decay(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of an object's values over frames, share above 0.5, and mean of the first quarter minus that of the last.

    Quarters share their edge frames. The official code keeps edges in 8 bits and goes wrong beyond 255 frames; this does not.
    """
    edges = (np.round(np.linspace(1, len(values), NUM_BINS + 1) + 1e-10) - 1).astype(np.int64)
    first, last = values[edges[0] : edges[1] + 1], values[edges[-2] : edges[-1] + 1]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())


def davis_scores(region: list[np.ndarray], edge: list[np.ndarray]) -> dict[str, float]:
    """The official global row, as shares of one: means over the objects of all sequences, not over sequences.

    Args:
        region, edge: for each sequence, J and F [objects, frames] (`region_and_boundary`).
    """
    rows = [np.array([mean_recall_decay(values) for part in parts for values in part]) for parts in (region, edge)]
    j, f = (row.mean(0).tolist() for row in rows)
    keys = ("Mean", "Recall", "Decay")
    scores = {"J&F-Mean": (j[0] + f[0]) / 2}
    scores |= {f"J-{key}": value for key, value in zip(keys, j)}
    return scores | {f"F-{key}": value for key, value in zip(keys, f)}
