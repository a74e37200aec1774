"""Agreement of clusters with classes."""

from __future__ import annotations

import numpy as np

from massl_fast.evaluation.extra import needs


def contingency(labels: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Images by class and cluster: int64 [classes, clusters] of the classes and clusters that occur."""
    _, rows = np.unique(labels, return_inverse=True)
    _, columns = np.unique(assignment, return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1), np.int64)
    np.add.at(table, (rows, columns), 1)
    return table


def clustering_scores(labels: np.ndarray, assignment: np.ndarray) -> dict[str, float]:
    """Figures of a clustering, as shares of one.

    `nmi` (arithmetic mean), `ami`, `ari`, `fms`, `homogeneity`, `completeness`, `v_measure` are scikit-learn's; `accuracy` is that of the
    best one-to-one matching of clusters with classes (images of unmatched clusters count as wrong), `purity` the share of images in the
    majority class of their cluster. `nmi` and `purity` favour many clusters; `ami` and `ari` do not.

    Args:
        labels [n], assignment [n]: integers; any numbering.

    Raises:
        ValueError: scikit-learn or SciPy is not installed, or there are no images.
    """
    if len(labels) == 0 or len(labels) != len(assignment):
        raise ValueError(f"There are {len(labels)} labels for {len(assignment)} clustered images; they must be the same, one at least.")
    measures = needs("sklearn.metrics", "the agreement of clusters with classes")
    optimize = needs("scipy.optimize", "the matching of clusters with classes")
    table = contingency(labels, assignment)
    matched = table[optimize.linear_sum_assignment(table, maximize=True)].sum()
    homogeneity, completeness, v_measure = measures.homogeneity_completeness_v_measure(labels, assignment)
    return {
        "nmi": float(measures.normalized_mutual_info_score(labels, assignment)),
        "ami": float(measures.adjusted_mutual_info_score(labels, assignment)),
        "ari": float(measures.adjusted_rand_score(labels, assignment)),
        "fms": float(measures.fowlkes_mallows_score(labels, assignment)),
        "homogeneity": float(homogeneity),
        "completeness": float(completeness),
        "v_measure": float(v_measure),
        "accuracy": float(matched / len(labels)),
        "purity": float(table.max(0).sum() / len(labels)),
    }


def size_entropy(assignment: np.ndarray, num_clusters: int) -> float:
    """Entropy of the cluster sizes in units of its maximum, log K: 1 for equal clusters, 0 where all images share one."""
    if num_clusters == 1:
        return 1.0
    share = np.bincount(assignment, minlength=num_clusters) / len(assignment)
    share = share[share > 0]
    return float(max(0.0, -(share * np.log(share)).sum() / np.log(num_clusters)))
