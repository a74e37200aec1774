import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from massl_fast.evaluation.metrics import prompt


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
def test_iou_by_counting_is_that_of_masks_at_full_size(rows, columns, height, width, seed):
    generator = np.random.default_rng(seed)
    mask = generator.random((height, width)) < 0.6
    mask[0, 0] = True
    similarity = prompt.cosines(generator.standard_normal((rows * columns, 3)))
    inside, total = prompt.pixels_by_patch(mask[None], (rows, columns))
    chosen = np.arange(rows * columns)
    found = prompt.prompt_iou(similarity, inside[0], total, chosen, np.array([-0.5, 0.2]))
    patches = prompt.patch_of_pixels((height, width), (rows, columns))
    for patch, (column, threshold) in itertools.product(chosen, enumerate([-0.5, 0.2])):
        kept = similarity[patch] > threshold
        kept[patch] = True
        predicted = kept[patches]
        assert found[patch, column] == pytest.approx((predicted & mask).sum() / (predicted | mask).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10_000))
def test_no_set_of_patches_beats_the_ceiling(num, seed):
    generator = np.random.default_rng(seed)
    total = generator.integers(0, 9, num)
    inside = generator.integers(0, total + 1)
    inside[0], total[0] = 1, max(1, total[0])
    best = 0.0
    for kept in itertools.product([False, True], repeat=num):
        kept = np.array(kept)
        common = inside[kept].sum()
        best = max(best, common / (total[kept].sum() + inside.sum() - common))
    assert prompt.best_patch_iou(inside, total) == pytest.approx(best)


def test_nearest_patches_of_pixels_are_those_of_pillow():
    grid = np.arange(30, dtype=np.uint8).reshape(5, 6)
    for shape in ((80, 96), (33, 47), (5, 6), (7, 120)):
        expected = np.array(Image.fromarray(grid).resize(shape[::-1], Image.Resampling.NEAREST))
        # A centre on the border of two patches belongs to either.
        borders = [(2 * np.arange(size) + 1) * cells % (2 * size) == 0 for size, cells in zip(shape, (5, 6))]
        clear = ~(borders[0][:, None] | borders[1][None])
        np.testing.assert_array_equal(prompt.patch_of_pixels(shape, (5, 6))[clear], expected[clear])


def test_overlap_of_kinds_that_lie_apart_is_none_and_of_equal_ones_all():
    apart = prompt.SimilarityHistograms()
    apart.add(np.where(np.eye(4, dtype=bool) | np.kron(np.eye(2), np.ones((2, 2))).astype(bool), 1.0, -1.0), np.array([0, 0, 1, 1]))
    assert apart.overlap == 0 and apart.means == (1, -1)
    equal = prompt.SimilarityHistograms(bins=20)
    equal.add(np.ones((4, 4)), np.array([0, 0, 1, 1]))
    assert equal.overlap == 1
    assert np.isnan(prompt.SimilarityHistograms().overlap)
    with pytest.raises(ValueError, match="two at least"):
        prompt.SimilarityHistograms(bins=1)


def test_a_patch_of_zeros_is_similar_to_nothing():
    assert prompt.cosines(np.array([[0.0, 0.0], [1.0, 0.0]])).tolist() == [[0, 0], [0, 1]]
