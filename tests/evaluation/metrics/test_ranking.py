import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_fast.evaluation.metrics import ranking


def sorted_positions(queries, database, listed):
    """The same by a stable sort of all similarities."""
    similarity = queries.numpy() @ database.numpy().T
    order = [np.argsort(-row, kind="stable") for row in similarity]
    return [np.argsort(ranks)[rows] for ranks, rows in zip(order, listed)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 4), st.integers(1, 70), st.integers(0, 10_000))
def test_positions_by_counting_are_those_of_a_stable_sort_with_many_ties(num_database, num_queries, width, chunk, seed):
    generator = np.random.default_rng(seed)

    def one_hot(num):  # every product exact, many of them equal
        return (
            torch.eye(width)[torch.from_numpy(generator.integers(width, size=num))]
            * torch.from_numpy(generator.choice([-1.0, 1.0], (num, 1))).float()
        )

    queries, database = one_hot(num_queries), one_hot(num_database)
    listed = [np.unique(generator.integers(num_database, size=generator.integers(0, 8))) for _ in range(num_queries)]
    found = ranking.positions_in_ranking(queries, database, listed, chunk=chunk)
    for one, other in zip(found, sorted_positions(queries, database, listed)):
        np.testing.assert_array_equal(one, other)


def test_the_size_of_the_chunks_changes_no_position():
    generator = torch.Generator().manual_seed(0)
    queries, database = torch.randn(5, 16, generator=generator), torch.randn(1000, 16, generator=generator)
    listed = [np.arange(start, 1000, 97) for start in range(5)]
    whole = ranking.positions_in_ranking(queries, database, listed)
    for chunk in (37, 333, 999):
        for one, other in zip(whole, ranking.positions_in_ranking(queries, database, listed, chunk=chunk)):
            np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=12, unique=True), st.integers(0, 5))
def test_the_trapezoid_is_the_area_under_precision_over_recall(positions, missing):
    """The devkit's own way: recall and precision step by step through the ranking, area by trapezoids."""
    positions, total = sorted(positions), len(positions) + missing
    area, old_recall, old_precision, hits = 0.0, 0.0, 1.0, 0
    for place in range(positions[-1] + 1):
        hits += place in positions
        recall, precision = hits / total, hits / (place + 1)
        area += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
    assert ranking.trapezoid_average_precision(np.array(positions), total) == pytest.approx(area, abs=1e-12)


def test_ignored_images_do_not_push_positives_down():
    assert ranking.without_ignored(np.array([5, 0, 3]), np.array([4, 1])).tolist() == [0, 2, 3]


def test_precision_at_k_ends_at_the_last_positive():
    assert ranking.precision_at(np.array([0, 1]), (1, 5, 10)).tolist() == [1, 1, 1]
    assert ranking.precision_at(np.array([2, 30]), (1, 5, 10)).tolist() == [0, 0.2, 0.1]


def test_a_query_without_positives_is_left_out_of_the_means():
    none = np.array([], np.int64)
    judgements = [ranking.Judgement(none, np.array([0]), none), ranking.Judgement(np.array([1]), none, none)]
    scores = ranking.revisited_scores([np.array([0]), np.array([0])], judgements)
    assert np.isnan(scores["easy"]["average_precisions"]).tolist() == [True, False]
    assert scores["easy"]["map"] == 1.0
    assert np.isnan(scores["hard"]["average_precisions"]).tolist() == [False, True]
    nothing = ranking.revisited_scores([np.array([])], [ranking.Judgement(none, none, none)])
    assert np.isnan(nothing["medium"]["map"])


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="easy, medium, hard"):
        ranking.Judgement(*[np.array([], np.int64)] * 3).split("harder")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_micro_average_precision_is_scikit_learns(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, correct = (np.array(column) for column in zip(*pairs))
    if not correct.any():
        assert np.isnan(ranking.micro_average_precision(scores, correct, 0))
        return
    expected = metrics.average_precision_score(correct, scores)
    assert ranking.micro_average_precision(scores, correct, int(correct.sum())) == pytest.approx(expected, abs=1e-12)


def test_copies_beyond_the_truncation_gain_nothing():
    found = ranking.truncated_average_precisions([np.array([0]), np.array([20]), np.array([], np.int64)], 20)
    assert found[:2].tolist() == [1.0, 0.0]
    assert np.isnan(found[2])
