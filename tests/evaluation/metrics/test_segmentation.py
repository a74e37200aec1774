import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_fast.evaluation.metrics import segmentation


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 400), st.integers(0, 10_000))
def test_the_figures_are_those_of_scikit_learn(num_classes, pixels, seed):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, num_classes, pixels).astype(np.uint8)
    prediction = np.where(generator.random(pixels) < 0.5, truth, generator.integers(0, num_classes, pixels)).astype(np.uint8)
    truth[generator.random(pixels) < 0.1] = 255
    kept = truth != 255
    confusion = segmentation.confusion_matrix(truth, prediction, num_classes)
    np.testing.assert_array_equal(
        confusion, metrics.confusion_matrix(truth[kept], prediction[kept], labels=range(num_classes)) if kept.any() else 0
    )
    scores = segmentation.scores_of_confusion(confusion)
    if kept.any():
        assert scores["miou"] == pytest.approx(metrics.jaccard_score(truth[kept], prediction[kept], average="macro"))
        assert scores["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(truth[kept], prediction[kept]))
    else:
        assert np.isnan(scores["miou"]) and np.isnan(scores["pixel_accuracy"])


def test_confusions_of_parts_add_up():
    generator = np.random.default_rng(0)
    truth, prediction = generator.integers(0, 5, (2, 6, 9)), generator.integers(0, 5, (2, 6, 9))
    parts = sum(segmentation.confusion_matrix(t, p, 5) for t, p in zip(truth, prediction))
    np.testing.assert_array_equal(parts, segmentation.confusion_matrix(truth, prediction, 5))


def test_a_class_out_of_range_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="class 7, but there are 3 classes"):
        segmentation.confusion_matrix(np.array([7]), np.array([0]), 3)
    with pytest.raises(ValueError, match="the same pixels"):
        segmentation.confusion_matrix(np.zeros((2, 3)), np.zeros((3, 2)), 3)


def test_the_index_of_empty_masks_is_one_and_void_counts_for_nothing():
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    assert segmentation.jaccard(empty, empty) == 1
    assert segmentation.jaccard(full, empty) == 0
    assert segmentation.jaccard(full, empty, void=full) == 1
