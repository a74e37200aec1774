"""Accuracy on ImageNet-9 (Xiao et al. 2020, *Noise or signal: the role of image backgrounds in object recognition*)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

NO_CLASS = -1


def mapped_accuracy(prediction: np.ndarray, target: np.ndarray, mapping: np.ndarray | None = None) -> float:
    """Share of images whose predicted class, mapped, is the target; a class that maps to nothing (-1) is wrong.

    Args:
        prediction [n]: classes of the head, 0 … len(mapping) - 1, the largest of all of them and not only of those that map to something.
        target [n]: classes of the benchmark.
        mapping: the benchmark's class of each of the head's, or -1; None: they are the same.
    """
    mapped = prediction if mapping is None else mapping[prediction]
    return float(((mapped == target) & (mapped != NO_CLASS)).mean())


def background_gap(accuracy: Mapping[str, float]) -> float | None:
    """BG-gap: accuracy with a background of the image's own class less that with one of a random class; None without both."""
    if not {"mixed_same", "mixed_rand"} <= accuracy.keys():
        return None
    return accuracy["mixed_same"] - accuracy["mixed_rand"]
