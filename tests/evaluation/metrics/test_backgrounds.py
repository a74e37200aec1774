import numpy as np
import pytest

from massl_fast.evaluation.layouts.imagenet9 import CLASSES, imagenet_to_nine
from massl_fast.evaluation.metrics.backgrounds import background_gap, mapped_accuracy


def test_a_class_that_belongs_to_none_is_wrong():
    mapping = np.array([0, -1, 1])
    assert mapped_accuracy(np.array([0, 1, 2, 2]), np.array([0, 0, 1, 0]), mapping) == 0.5
    assert mapped_accuracy(np.array([3, 4]), np.array([3, 3])) == 0.5


def test_370_of_the_imagenet_classes_belong_to_the_nine():
    mapping = imagenet_to_nine()
    assert (mapping >= 0).sum() == 370 and set(mapping[mapping >= 0]) == set(range(len(CLASSES)))
    # Chihuahua, goldfish, hen's neighbour the brambling, sports car, guitar, chimpanzee; a table belongs to none.
    assert mapping[[151, 1, 10, 817, 546, 367, 532]].tolist() == [0, 8, 1, 2, 6, 7, -1]


def test_the_gap_needs_both_backgrounds():
    assert background_gap({"mixed_same": 0.9, "mixed_rand": 0.7}) == pytest.approx(0.2)
    assert background_gap({"mixed_same": 0.9}) is None
