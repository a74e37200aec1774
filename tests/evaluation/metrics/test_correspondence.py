import numpy as np

from massl_fast.evaluation.metrics import correspondence


def test_equal_views_match_everywhere_and_a_mirrored_one_in_mirrored_places():
    corners = np.array([[0.1, 0.2, 0.9, 0.8]])
    mirrored = corners[:, [0, 3, 2, 1]]
    centres, flipped = (correspondence.patch_centres(c, 4) for c in (corners, mirrored))
    features = np.eye(16)[None]
    mirrored_features = features.reshape(1, 4, 4, 16)[:, :, ::-1].reshape(1, 16, 16)
    for other, places in ((features, centres), (mirrored_features, flipped)):
        match = correspondence.matches(features, other)
        right = correspondence.correct_matches(match, centres, places, 0)
        overlap = correspondence.overlapping(centres, places, 0.0)
        assert right.all() and overlap.all()
        assert correspondence.correspondence_accuracy(right, overlap).tolist() == [1.0]


def test_views_that_share_nothing_have_no_accuracy():
    one, other = (correspondence.patch_centres(np.array([c]), 2) for c in ([0.0, 0.0, 0.2, 0.2], [0.7, 0.7, 1.0, 1.0]))
    overlap = correspondence.overlapping(one, other, 0.01)
    assert not overlap.any()
    assert np.isnan(correspondence.correspondence_accuracy(np.ones((1, 4), bool), overlap)).all()
