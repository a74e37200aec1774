import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from massl_fast.evaluation.propagation import PropagationSettings, hard_labels, propagate


def patch_by_patch(features, first, settings):
    """The protocol in float64, one target patch after the other."""
    frames, height, width, _ = features.shape
    unit = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    labels = [first.astype(np.float64)]
    for frame in range(1, frames):
        context = [0, *[f for f in range(frame - settings.context, frame) if f > 0]]
        found = np.zeros_like(labels[0])
        for row in range(height):
            for column in range(width):
                sources = [
                    (unit[f, r, c] @ unit[frame, row, column], labels[f][:, r, c])
                    for f in context
                    for r in range(max(0, row - settings.radius), min(height, row + settings.radius + 1))
                    for c in range(max(0, column - settings.radius), min(width, column + settings.radius + 1))
                ]
                least = sorted((similarity for similarity, _ in sources), reverse=True)[: settings.neighbours][-1]
                kept = [(np.exp(similarity / settings.temperature), label) for similarity, label in sources if similarity >= least]
                found[:, row, column] = sum(w * label for w, label in kept) / sum(w for w, _ in kept)
        labels.append(found)
    return np.stack(labels[1:]) if frames > 1 else np.zeros((0, *first.shape))


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 11), st.integers(1, 6), st.integers(0, 3), st.integers(0, 12), st.integers(1, 9), st.integers(0, 99)
)
def test_windowed_rows_are_patch_by_patch(frames, height, width, context, radius, neighbours, seed):
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((frames, height, width, 5))
    first = np.eye(3)[generator.integers(0, 3, (height, width))].transpose(2, 0, 1)
    chosen = PropagationSettings(context=context, radius=radius, neighbours=neighbours)
    found = propagate(torch.from_numpy(features).float(), torch.from_numpy(first).float(), chosen)
    np.testing.assert_allclose(found, patch_by_patch(features, first, chosen), atol=2e-5)


def test_all_sources_that_tie_for_the_last_place_stay():
    features = torch.ones(2, 1, 4, 3)
    first = torch.tensor([[[1.0, 0, 0, 0]], [[0, 1.0, 1, 1]]])
    soft = propagate(features, first, PropagationSettings(neighbours=1))
    torch.testing.assert_close(soft[0, 0], torch.full((1, 4), 0.25))


def test_soft_labels_stay_shares_of_one():
    features = torch.randn(4, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    first = torch.eye(3)[torch.arange(42) % 3].T.reshape(3, 6, 7)
    soft = propagate(features, first)
    torch.testing.assert_close(soft.sum(1), torch.ones(3, 6, 7))


def test_a_channel_that_is_nowhere_is_never_chosen():
    soft = torch.zeros(1, 3, 2, 2)
    soft[:, 0], soft[:, 1, 0, 0] = 0.6, 0.4
    labels = hard_labels(soft, 4)
    assert labels.shape == (1, 8, 8) and labels.dtype == torch.uint8
    assert set(labels.unique().tolist()) == {0, 1}


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="neighbours at least 1"):
        PropagationSettings(neighbours=0)
