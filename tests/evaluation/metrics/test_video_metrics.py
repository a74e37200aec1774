import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from massl_fast.evaluation.metrics import video

ndimage = pytest.importorskip("scipy.ndimage")
SHARED = Path(__file__).parents[4] / "shared"


def f_by_dilation(prediction, truth):
    """The published way: both boundaries dilated by a disk."""
    radius = video.boundary_radius(truth.shape)
    steps = np.arange(-radius, radius + 1)
    disk = steps[:, None] ** 2 + steps[None] ** 2 <= radius**2
    found, expected = video.boundary(prediction), video.boundary(truth)
    if not found.any() or not expected.any():
        return float(found.any() == expected.any())
    precision = (found & ndimage.binary_dilation(expected, disk)).sum() / found.sum()
    recall = (expected & ndimage.binary_dilation(found, disk)).sum() / expected.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1), st.integers(0, 10_000))
def test_boundaries_match_as_by_dilation_with_a_disk(height, width, density, seed):
    generator = np.random.default_rng(seed)
    block = generator.integers(1, 12)
    masks = (
        np.kron(generator.random((-(-height // block), -(-width // block))) < density, np.ones((block, block), bool)) for _ in range(2)
    )
    prediction, truth = (mask[:height, :width] for mask in masks)
    assert video.boundary_f(prediction, truth) == f_by_dilation(prediction, truth)


def test_void_is_background_and_objects_are_those_of_the_first_frame():
    truth = np.zeros((4, 20, 20), np.uint8)
    truth[:, 2:8, 2:8] = 1
    truth[1:, 12:15, 12:15] = 2  # not in the first frame: not scored
    truth[:, 18:] = 255
    region, edge = video.region_and_boundary(truth, np.where(truth == 1, 1, 0))
    assert region.tolist() == [[1, 1]] and edge.tolist() == [[1, 1]]


def test_a_sequence_without_a_scored_frame_or_object_is_refused():
    with pytest.raises(ValueError, match="sequence of 1 frames"):
        video.region_and_boundary(np.ones((1, 4, 4), np.uint8), np.ones((1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="no object"):
        video.region_and_boundary(np.zeros((4, 4, 4), np.uint8), np.ones((4, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="shape"):
        video.region_and_boundary(np.ones((4, 4, 4), np.uint8), np.ones((4, 4, 5), np.uint8))


def test_decay_goes_on_beyond_255_frames():
    values = np.linspace(1, 0, 600)
    assert video.mean_recall_decay(values)[2] == pytest.approx(0.75, abs=0.01)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real tracker's masks are not beside this repository")
def test_the_official_figures_of_a_real_tracker_are_reproduced():
    expected = json.loads((SHARED / "golden/evaluation/davis_osvos.json").read_text())
    data = SHARED / "data/davis_small"
    parts = []
    for name in expected["sequences"]:
        names = sorted(path.name for path in (data / "results_osvos" / name).glob("*.png"))
        truth, found = (
            np.stack([np.array(Image.open(folder / name / file)) for file in names])
            for folder in (data / "DAVIS/Annotations/480p", data / "results_osvos")
        )
        parts.append(video.region_and_boundary(truth, found))
        for row, key in zip(parts[-1], ("j", "f")):
            np.testing.assert_allclose(row[0], expected["per_frame"][name][key], atol=1e-9)
    scores = video.davis_scores([part[0] for part in parts], [part[1] for part in parts])
    assert scores == pytest.approx(expected["global_row"], abs=1e-9)
