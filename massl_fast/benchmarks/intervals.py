"""How far a median or the difference of two sets of samples can be trusted: intervals from the samples' own order, whatever their
distribution."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist, median

import numpy as np

CONFIDENCE = 0.99  # of the interval of a median
FEWEST_SAMPLES = 8  # smallest and largest of 8 samples enclose the true median in 99.2% of cases
SHIFT_CONFIDENCE = 0.999  # of the interval of a shift: a comparison of two records judges a hundred figures
FEWEST_OF_BOTH = 7  # two sets of 7 lie wholly apart by chance in 0.06% of cases
LARGEST_EXACT = 200_000  # m·n·min(m, n): what counting costs; beyond, the normal approximation gives an interval that is 1% wider


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """An interval that holds the true median with a probability of at least 99%; None for fewer than 8 samples.

    The number of independent samples below the true median is binomial (n, 1/2), so the k-th smallest and the k-th largest enclose it
    with probability 1 − 2·P(Binomial ≤ k − 1) (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    if len(samples) < FEWEST_SAMPLES:
        return None
    from scipy.stats import quantile_test  # measuring does without SciPy, pages and comparisons do not

    found = quantile_test(samples, p=0.5).confidence_interval(CONFIDENCE)
    return float(found.low), float(found.high)


def shift(before: Sequence[float], after: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """How far ``after`` lies above ``before``: the median of all differences of one of each (Hodges and Lehmann, 1963), and an interval
    that holds the true shift with a probability of at least 99.9%; None in its place where a side has fewer than 7 samples.

    Of all m·n differences ordered, the k-th smallest and the k-th largest enclose the shift with probability 1 − 2·P(U ≤ k − 1), U as in
    the test of Mann and Whitney (Hollander and Wolfe, Nonparametric Statistical Methods, section 4.3). It says more of the same samples
    than intervals of both medians that must not overlap, and samples that something delayed count for no more than others. SciPy tests
    whether there is a shift (``mannwhitneyu``) and gives no interval of it, hence the count of orders below.
    """
    differences = np.sort(np.subtract.outer(np.asarray(after, float), np.asarray(before, float)), axis=None)
    middle = float(np.median(differences))
    if min(len(before), len(after)) < FEWEST_OF_BOTH:
        return middle, None
    k = _rank(len(before), len(after))
    return middle, (float(differences[k - 1]), float(differences[-k]))


@functools.cache
def _rank(m: int, n: int) -> int:
    """The largest k with 2·P(U ≤ k − 1) ≤ 1 − SHIFT_CONFIDENCE."""
    tail = (1 - SHIFT_CONFIDENCE) / 2
    if m * n * min(m, n) > LARGEST_EXACT:
        return max(1, math.floor(m * n / 2 + NormalDist().inv_cdf(tail) * math.sqrt(m * n * (m + n + 1) / 12)))
    ways = _ways(m, n)
    allowed, k = tail * math.comb(m + n, n), 0
    while ways[k] <= allowed:
        allowed -= ways[k]
        k += 1
    return k


def _ways(m: int, n: int) -> list[int]:
    """Orders of m and n samples with U = 0, 1, …, m·n: the coefficients of a Gaussian binomial, Π (1 − q^(m+i)) / (1 − q^i)."""
    ways = [1] + [0] * (m * n)
    for i in range(1, min(m, n) + 1):
        for u in range(m * n, max(m, n) + i - 1, -1):
            ways[u] -= ways[u - max(m, n) - i]
        for u in range(i, m * n + 1):
            ways[u] += ways[u - i]
    return ways


def spread_percent(samples: Sequence[float]) -> float:
    """Distance between the quartiles in percent of the median; 0 for fewer than 4 samples."""
    if len(samples) < 4:
        return 0.0
    ordered, middle = sorted(samples), median(samples)
    low, high = ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
    return 100 * (high - low) / abs(middle) if middle else math.inf
