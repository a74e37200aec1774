import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_fast.evaluation.metrics import multilabel


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([-1, 0, 1])), min_size=1, max_size=40))
def test_without_interpolation_it_is_scikit_learns(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = (np.array(column, np.float64) for column in zip(*pairs))
    found = multilabel.average_precision_steps(scores, labels, difficult="negative")
    if (labels > 0).any():
        assert found == pytest.approx(metrics.average_precision_score(labels > 0, scores), abs=1e-12)
    else:
        assert np.isnan(found)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=40))
def test_interpolated_precision_is_the_best_at_that_recall_or_more(labels):
    """Image by image: precision at each recall is the best of all later ones; difficult images are passed over."""
    labels = np.array(labels)
    judged = labels[labels != 0] > 0
    scores = -np.arange(len(labels), dtype=np.float64)
    found = multilabel.average_precision_area(scores, labels), multilabel.average_precision_11_points(scores, labels)
    if not judged.any():
        assert np.isnan(found).all()
        return
    precision = [judged[: i + 1].mean() for i in range(len(judged))]
    recall = [judged[: i + 1].sum() / judged.sum() for i in range(len(judged))]
    area = sum(max(precision[i:]) / judged.sum() for i in range(len(judged)) if judged[i])
    points = [max((p for p, r in zip(precision, recall) if r >= t / 10 - 1e-9), default=0.0) for t in range(11)]
    assert found == pytest.approx((area, np.mean(points)), abs=1e-12)


def test_a_wrong_word_for_difficult_is_refused():
    with pytest.raises(ValueError, match="ignored or negative"):
        multilabel.average_precision_area(np.zeros(1), np.ones(1), difficult="maybe")
