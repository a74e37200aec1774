"""Linear support vector machines, one per class, of images that may have several labels (VOC07, as CARP and PCL train them)."""

from __future__ import annotations

import numpy as np

from massl_fast.evaluation.extra import needs

NORM_FLOOR = 1e-5
CLASS_WEIGHT = {1: 2, -1: 1}
TOLERANCE = 1e-4
ITERATIONS = 2000


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows divided by (norm + 1e-5), as the published code does; float64."""
    features = features.astype(np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + NORM_FLOOR)


def svm_decisions(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    cost: float = 0.5,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> np.ndarray:
    """Signed distances of the test images for one class: [m] float64.

    Squared hinge loss, L2 penalty, positives twice as heavy; difficult images (label 0) are negatives.

    Args:
        train [n, D], test [m, D]: rows of `unit_rows`.
        labels [n]: 1, 0 difficult, -1.

    Raises:
        ValueError: scikit-learn is not installed, or the training images are all of one kind.
    """
    signs = np.where(labels > 0, 1, -1)
    if len(np.unique(signs)) < 2:
        raise ValueError("A support vector machine needs images of the class and others; the training images are of one kind.")
    svm = needs("sklearn.svm", "the linear support vector machines of VOC07")
    machine = svm.LinearSVC(
        C=cost, class_weight=CLASS_WEIGHT, loss="squared_hinge", penalty="l2", dual=True, tol=tolerance, max_iter=iterations, random_state=0
    )
    return machine.fit(train, signs).decision_function(test)
