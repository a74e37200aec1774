import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_fast.evaluation import patch_knn as module
from massl_fast.evaluation.patch_knn import most_frequent, nearest_patches, patch_knn


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(module.METRICS), st.integers(0, 999))
def test_neighbours_are_those_of_a_sort_in_float64(num_keys, num_queries, metric, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (torch.randn(num, 6, generator=generator) for num in (num_keys, num_queries))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KEY_CHUNK", 16)
        patch.setattr(module, "QUERY_CHUNK", 4)
        found = nearest_patches(queries, keys, min(5, num_keys), metric)
    wide = [part.double() for part in (queries, keys)]
    distance = torch.cdist(*wide) if metric == "L2" else -torch.nn.functional.cosine_similarity(wide[0][:, None], wide[1][None], dim=2)
    assert torch.equal(found, distance.argsort(dim=1)[:, : min(5, num_keys)])


def test_the_smallest_of_equally_frequent_labels_wins():
    labels = np.array([[3, 1, 1, 3], [7, 7, 2, 2], [5, 9, 9, 0]], np.uint8)
    assert most_frequent(labels).tolist() == [1, 2, 9]
    assert most_frequent(labels).dtype == np.uint8


def test_patches_that_are_mostly_void_do_not_vote():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    pixels = np.array([[255, 255, 255], [4, 4, 255]], np.uint8)
    assert patch_knn(train, pixels, torch.tensor([[1.0, 0.0]]), [1])[1].tolist() == [[4, 4, 255]]
    with pytest.raises(ValueError, match="all are void"):
        patch_knn(train[:1], pixels[:1], train, [1])


def test_an_unknown_metric_and_too_many_neighbours_are_refused():
    with pytest.raises(ValueError, match="cosine or L2"):
        nearest_patches(torch.ones(1, 2), torch.ones(1, 2), 1, "L1")
    with pytest.raises(ValueError, match="2 nearest ones cannot"):
        nearest_patches(torch.ones(1, 2), torch.ones(1, 2), 2, "L2")
