"""How far a median can be trusted: an interval from the samples' own order, whatever their distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

CONFIDENCE = 0.99
FEWEST_SAMPLES = 8  # smallest and largest of 8 samples enclose the true median in 99.2% of cases


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """An interval that holds the true median with a probability of at least 99%; None for fewer than 8 samples.

    The number of independent samples below the true median is binomial (n, 1/2), so the k-th smallest and the k-th largest enclose it
    with probability 1 − 2·P(Binomial ≤ k − 1) (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    n = len(samples)
    if n < FEWEST_SAMPLES:
        return None
    tail, k, probability = 0.0, 0, 0.5**n
    while 2 * (tail + probability) <= 1 - CONFIDENCE:
        tail += probability
        k += 1
        probability *= (n - k + 1) / k
    ordered = sorted(samples)
    return ordered[k - 1], ordered[n - k]


def spread_percent(samples: Sequence[float]) -> float:
    """Distance between the quartiles in percent of the median; 0 for fewer than 4 samples."""
    if len(samples) < 4:
        return 0.0
    ordered, middle = sorted(samples), median(samples)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return 100 * (high - low) / abs(middle) if middle else math.inf
