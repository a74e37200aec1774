"""Average precision of one class among several that an image may have, in the three ways of PASCAL VOC and its users."""

from __future__ import annotations

import numpy as np


def precision_and_recall(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each image by falling score [n]; equal scores stay in their order, as in the devkit."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    return hits / np.arange(1, len(order) + 1), hits / max(1, int(positive.sum()))


def average_precision_area(scores: np.ndarray, labels: np.ndarray, *, difficult: str = "ignored") -> float:
    """Area under precision made monotone, over recall: VOC2010 and later, and what CARP and PCL report as VOC07.

    Args:
        scores [n]: higher is more certain.
        labels [n]: 1, 0 difficult, -1.
        difficult: `ignored`, as the devkit does, or `negative`, as CARP's and PCL's code does.

    Returns:
        Share of one; nan without a positive.
    """
    scores, positive = _judged(scores, labels, difficult)
    if not positive.any():
        return float("nan")
    precision, recall = precision_and_recall(scores, positive)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * np.diff(recall, prepend=0.0)).sum())


def average_precision_11_points(scores: np.ndarray, labels: np.ndarray, *, difficult: str = "ignored") -> float:
    """Mean, over recalls of 0, 0.1, …, 1, of the highest precision at that recall or more: VOC2007's own."""
    scores, positive = _judged(scores, labels, difficult)
    if not positive.any():
        return float("nan")
    precision, recall = precision_and_recall(scores, positive)
    return float(np.mean([precision[recall >= point - 1e-12].max(initial=0.0) for point in np.linspace(0, 1, 11)]))


def average_precision_steps(scores: np.ndarray, labels: np.ndarray, *, difficult: str = "ignored") -> float:
    """Sum of precision times the recall gained, without interpolation; equal scores count as one step (scikit-learn's)."""
    scores, positive = _judged(scores, labels, difficult)
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    precision, recall = (values[ends] for values in precision_and_recall(scores, positive))
    return float((precision * np.diff(recall, prepend=0.0)).sum())


def _judged(scores: np.ndarray, labels: np.ndarray, difficult: str) -> tuple[np.ndarray, np.ndarray]:
    if difficult not in ("ignored", "negative"):
        raise ValueError(f"Difficult images can be ignored or negative, not {difficult!r}.")
    kept = labels != 0 if difficult == "ignored" else np.ones(len(labels), bool)
    return scores[kept], labels[kept] > 0
