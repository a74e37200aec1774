"""Overlap of masks: intersection over union of single masks and of label maps."""

from __future__ import annotations

import numpy as np

IGNORED = 255


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int, ignore: int | None = IGNORED) -> np.ndarray:
    """Pixels by class: int64 [num_classes, num_classes], true class by predicted class. Sums over images add up.

    Args:
        truth, prediction: integers of one shape; pixels whose truth is `ignore` are left out.

    Raises:
        ValueError: shapes differ, or a class is out of range.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"Truth is of shape {truth.shape} and prediction of shape {prediction.shape}; both must have the same pixels.")
    kept = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    true, predicted = truth[kept].astype(np.int64), prediction[kept].astype(np.int64)
    for name, values in (("truth", true), ("prediction", predicted)):
        if values.size and not 0 <= values.min() <= values.max() < num_classes:
            wrong = values[(values < 0) | (values >= num_classes)][0]
            raise ValueError(f"The {name} holds class {wrong}, but there are {num_classes} classes, numbered from 0.")
    return np.bincount(true * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores_of_confusion(confusion: np.ndarray) -> dict[str, np.ndarray | float]:
    """Figures of a confusion matrix, as shares of one.

    `iou` [classes] is nan for classes in neither truth nor prediction; `miou` is the mean of the others, as in mmseg and scikit-learn's
    macro Jaccard; `miou_present` is the mean over the classes that occur in the truth, which some papers take instead.
    """
    hits, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    union = true + predicted - hits
    with np.errstate(invalid="ignore"):
        iou = np.where(union > 0, hits / union, np.nan)
        recall = np.where(true > 0, hits / true, np.nan)
    present = true > 0
    return {
        "iou": iou,
        "miou": _mean(iou),
        "miou_present": _mean(iou[present]),
        "pixel_accuracy": float(hits.sum() / confusion.sum()) if confusion.sum() else float("nan"),
        "mean_class_accuracy": _mean(recall),
    }


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def jaccard(prediction: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """Intersection over union of two masks (bool, one shape), void pixels left out; 1 where both are empty."""
    if void is not None:
        prediction, truth = prediction & ~void, truth & ~void
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0
