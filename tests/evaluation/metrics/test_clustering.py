from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_fast.evaluation.metrics import clustering

pytest.importorskip("sklearn")


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 80), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_accuracy_and_purity_are_those_of_a_plain_search(images, classes, clusters, seed):
    generator = np.random.default_rng(seed)
    labels, assignment = 3 * generator.integers(0, classes, images), generator.integers(0, clusters, images) - 1
    scores = clustering.clustering_scores(labels, assignment)
    names, groups = np.unique(labels).tolist(), np.unique(assignment).tolist()
    padded = names + [None] * len(groups)
    best = max(
        sum((labels == name)[assignment == group].sum() for group, name in zip(groups, order))
        for order in permutations(padded, len(groups))
    )
    assert scores["accuracy"] == pytest.approx(best / images)
    assert scores["purity"] == pytest.approx(sum(max((labels[assignment == g] == n).sum() for n in names) for g in groups) / images)


def test_the_numbering_of_clusters_changes_nothing():
    generator = np.random.default_rng(0)
    labels, assignment = generator.integers(0, 5, 200), generator.integers(0, 9, 200)
    renamed = generator.permutation(9)[assignment]
    assert clustering.clustering_scores(labels, assignment) == pytest.approx(clustering.clustering_scores(labels, renamed), abs=1e-12)


def test_entropy_of_sizes_shows_collapse():
    assert clustering.size_entropy(np.zeros(10, np.int64), 4) == 0
    assert clustering.size_entropy(np.arange(12) % 4, 4) == pytest.approx(1)
    assert clustering.size_entropy(np.zeros(3, np.int64), 1) == 1


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="one at least"):
        clustering.clustering_scores(np.array([]), np.array([]))


def test_a_missing_library_is_named_with_its_installation(monkeypatch):
    from massl_fast import extras

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"scikit-learn does not import .* pip install 'massl-fast\[eval\]'"):
        clustering.clustering_scores(np.arange(3), np.arange(3))
