import numpy as np
import pytest

from massl_fast.evaluation.metrics import attention


def test_the_largest_patches_that_hold_the_mass_stay():
    kept = attention.heaviest_patches(np.array([[0.1, 0.4, 0.2, 0.3], [1.0, 0.0, 0.0, 0.0]]), 0.6)
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert attention.heaviest_patches(np.array([[0.2, 0.8]]), 1.0).all()


def test_void_is_taken_out_of_the_prediction_or_counts_against_it():
    masks = np.ones((1, 2, 4), bool)
    objects = np.array([[1, 1, 0, 255], [1, 1, 0, 255]])
    assert attention.object_jaccard(masks, objects) == pytest.approx(4 / 6)
    assert attention.object_jaccard(masks, objects, void=None) == pytest.approx(4 / 8)


def test_the_figure_of_an_image_is_the_mean_over_objects_of_the_best_head():
    assert attention.image_jaccard(np.array([[0.2, 0.6], [0.5, 0.1]])) == pytest.approx(0.55)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        attention.heaviest_patches(np.ones((1, 4)), 0.0)
