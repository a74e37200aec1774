"""RankMe and LiDAR against their definitions, term by term."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_fast.evaluation.metrics.rank import lidar, rankme


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99))
def test_rankme_is_the_entropy_of_singular_values(rows, width, seed):
    features = np.random.default_rng(seed).standard_normal((rows, width))
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    expected = np.exp(-(shares * np.log(shares)).sum())
    found = rankme(torch.from_numpy(features))
    # The larger Gram matrix would have zeros more; the smaller one has as many values as the decomposition.
    assert found == pytest.approx(expected, rel=1e-6) and 0.99 < found < min(rows, width) + 0.01


def test_rankme_of_a_line_is_one_and_of_a_basis_its_size():
    assert rankme(torch.outer(torch.randn(50), torch.randn(8))) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.eye(7).repeat(3, 1)) == pytest.approx(7, abs=1e-4)
    assert rankme(torch.zeros(4, 3)) == pytest.approx(1, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 12), st.integers(1, 8), st.integers(0, 99))
def test_lidar_is_its_definition(views, images, width, seed):
    features = np.random.default_rng(seed).standard_normal((views, images, width)) + 3 * np.random.default_rng(1).standard_normal(
        (images, width)
    )
    means = features.mean(0)
    between = sum(np.outer(m - means.mean(0), m - means.mean(0)) for m in means) / (images - 1)
    within = sum(np.outer(row - means[i], row - means[i]) for view in features for i, row in enumerate(view)) / (images * (views - 1))
    values, vectors = np.linalg.eigh(within + 1e-4 * np.eye(width))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(0)
    shares = eigenvalues / eigenvalues.sum() + 1e-8
    assert lidar(torch.from_numpy(features)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_collapse_lowers_both_and_what_is_not_finite_is_nan():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 16, generator=generator)
    views = images + 0.1 * torch.randn(4, 40, 16, generator=generator)
    flat = torch.cat([views[..., :2], 0.01 * views[..., 2:]], dim=2)
    assert rankme(flat.flatten(0, 1)) < 0.5 * rankme(views.flatten(0, 1))
    assert lidar(views) > 10 and lidar(torch.randn(4, 40, 16, generator=generator)[:, :, :1].expand(-1, -1, 16)) < 2
    views[0, 0, 0] = float("nan")
    assert np.isnan(rankme(views.flatten(0, 1))) and np.isnan(lidar(views))
