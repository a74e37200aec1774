import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_fast.evaluation import knn
from massl_fast.evaluation.features import Features
from massl_fast.evaluation.knn import knn_accuracy, nearest_neighbours


def features_of(rows, labels, classes=None):
    labels = torch.as_tensor(labels)
    classes = tuple(classes or (f"class {i}" for i in range(int(labels.max()) + 1)))
    return Features(torch.as_tensor(rows, dtype=torch.float32), labels, torch.arange(len(labels)), classes)


def random_features(num, classes, width=16, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (num,), generator=generator)
    return features_of(centres[labels] + noise * torch.randn(num, width, generator=generator), labels, range(classes))


def readable_accuracy(train, test, k, temperature):
    """The protocol image by image in float64: sort all similarities, let the first k vote."""

    def unit(rows):
        rows = rows.double().numpy()
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    keys, right = unit(train.features), 0
    for query, label in zip(unit(test.features), test.labels.tolist()):
        similarity = keys @ query
        votes = dict.fromkeys(train.classes, 0.0)
        for neighbour in np.argsort(-similarity, kind="stable")[:k]:
            votes[train.classes[int(train.labels[neighbour])]] += np.exp(similarity[neighbour] / temperature)
        right += max(votes, key=votes.get) == test.classes[label]
    return 100 * right / len(test.labels)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(("num_train", "num_test", "classes"), [(300, 70, 7), (1, 3, 2), (41, 1, 3)])
def test_matches_the_readable_twin(monkeypatch, num_train, num_test, classes, temperature):
    monkeypatch.setattr(knn, "KEY_CHUNK", 64)  # several chunks, with a remainder
    monkeypatch.setattr(knn, "QUERY_CHUNK", 16)
    train, test = random_features(num_train, classes, noise=2.0), random_features(num_test, classes, seed=1, noise=2.0)
    test = Features(test.features, torch.where(test.labels == train.labels[0], test.labels, train.labels[0]), test.indices, test.classes)
    ks = [k for k in (1, 5, 20, 100) if k <= num_train]
    found = knn_accuracy(train, test, ks=ks, temperature=temperature)
    assert found == {k: pytest.approx(readable_accuracy(train, test, k, temperature)) for k in ks}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 9), st.data())
def test_neighbours_are_those_of_a_stable_sort(num_keys, num_queries, width, data):
    # Few distinct rows, powers of two: many equal similarities, and every product exact whatever the order of summation.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    k = data.draw(st.integers(1, num_keys))

    def one_hot(num):
        sign = 2 * torch.randint(2, (num, 1), generator=generator) - 1
        return F.one_hot(torch.randint(width, (num,), generator=generator), width).float() * sign

    queries, keys = one_hot(num_queries), one_hot(num_keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "KEY_CHUNK", data.draw(st.integers(1, 100)))
        patch.setattr(knn, "QUERY_CHUNK", data.draw(st.integers(1, 50)))
        similarities, indices = nearest_neighbours(queries, keys, k)
    order = torch.sort(queries @ keys.T, dim=1, descending=True, stable=True)
    assert torch.equal(indices, order.indices[:, :k])
    assert torch.equal(similarities, order.values[:, :k])


def test_similarities_are_cosines_of_any_scale_and_layout():
    queries = torch.randn(8, 5, dtype=torch.float64).T  # not contiguous
    keys = 100 * torch.randn(9, 8)
    similarities, indices = nearest_neighbours(queries, keys, 9)
    assert similarities.dtype == torch.float32 and indices.dtype == torch.int64
    expected = F.cosine_similarity(queries.double()[:, None], keys.double()[None], dim=2).gather(1, indices)
    torch.testing.assert_close(similarities.double(), expected, atol=1e-6, rtol=0)
    assert (similarities.diff(dim=1) <= 0).all()


def test_never_holds_all_similarities(monkeypatch):
    monkeypatch.setattr(knn, "KEY_CHUNK", 32)
    monkeypatch.setattr(knn, "QUERY_CHUNK", 8)
    sizes, ranks = [], knn._ranks
    monkeypatch.setattr(knn, "_ranks", lambda similarities, first: sizes.append(similarities.numel()) or ranks(similarities, first))
    nearest_neighbours(torch.randn(50, 4), torch.randn(100, 4), 10)
    assert max(sizes) == 8 * 32 and sum(sizes) == 50 * 100


def test_equal_votes_go_to_the_first_class_and_equal_similarities_to_the_first_image():
    train = features_of([[1.0, 0], [1, 0], [1, 0]], [2, 1, 0], "abc")
    test = features_of([[1.0, 0]] * 3, [0, 1, 2], "abc")
    found = knn_accuracy(train, test, ks=(1, 2, 3))
    # k = 1: image 0, class c. k = 2: c against b. k = 3: all three. Each time one of the three test images is right.
    assert found == {k: pytest.approx(100 / 3) for k in (1, 2, 3)}
    only = {name: features_of([[1.0, 0]], ["abc".index(name)], "abc") for name in "abc"}
    assert [knn_accuracy(train, only["c"], ks=(k,))[k] for k in (1, 2, 3)] == [100, 0, 0]
    assert knn_accuracy(train, only["b"], ks=(2,))[2] == 100
    assert knn_accuracy(train, only["a"], ks=(3,))[3] == 100


def test_a_low_temperature_neither_overflows_nor_loses_the_nearest():
    train, test = random_features(200, 5), random_features(60, 5, seed=1)
    nearest = knn_accuracy(train, test, ks=(1,))[1]
    assert knn_accuracy(train, test, ks=(50,), temperature=1e-4)[50] == pytest.approx(nearest)


def test_classes_are_matched_by_name():
    train = features_of(torch.eye(3), [0, 1, 2], ("ant", "bee", "cat"))
    test = features_of(torch.eye(3)[1:], [1, 0], ("cat", "bee"))
    assert knn_accuracy(train, test, ks=(1,)) == {1: 100.0}


def test_a_class_without_training_images_is_named():
    train, test = features_of(torch.eye(2), [0, 1], "ab"), features_of(torch.eye(2), [0, 1], ("a", "zebra"))
    with pytest.raises(ValueError, match="classes that no training image has: zebra"):
        knn_accuracy(train, test, ks=(1,))
    # A class that the folders name but no test image has is no obstacle.
    unused = features_of(torch.eye(2), [0, 0], ("a", "zebra"))
    assert knn_accuracy(train, unused, ks=(1,)) == {1: 50.0}


def test_k_above_the_training_images_means_all_and_says_so():
    train, test = random_features(15, 3), random_features(30, 3, seed=1)
    with pytest.warns(UserWarning, match="k = 20, 200 compares with all 15 training images"):
        found = knn_accuracy(train, test, ks=(10, 20, 200))
    assert found[20] == found[200] == pytest.approx(readable_accuracy(train, test, 15, 0.07))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        knn_accuracy(train, test, ks=(15,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ks=()), "one or more positive numbers"),
        (dict(ks=(0, 5)), "one or more positive numbers"),
        (dict(temperature=0.0), "must be positive"),
        (dict(test=features_of(torch.randn(3, 5), [0, 1, 2])), "16 dimensions, test features 5"),
        (dict(test=features_of(torch.full((3, 16), float("nan")), [0, 1, 2], range(3))), "not finite for 3 of 3 test images"),
    ],
)
def test_mistakes_are_sentences(change, message):
    arguments = dict(train=random_features(30, 3), test=random_features(9, 3, seed=1), ks=(5,)) | change
    with pytest.raises(ValueError, match=message):
        knn_accuracy(arguments.pop("train"), arguments.pop("test"), **arguments)


def test_too_many_neighbours_are_refused():
    with pytest.raises(ValueError, match="There are 4 images"):
        nearest_neighbours(torch.randn(2, 3), torch.randn(4, 3), 5)


def test_the_search_is_in_float32_under_autocast():
    queries, keys = torch.randn(6, 32), torch.randn(50, 32)
    plain = nearest_neighbours(queries, keys, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = nearest_neighbours(queries, keys, 5)
    assert torch.equal(plain[0], within[0]) and torch.equal(plain[1], within[1])
