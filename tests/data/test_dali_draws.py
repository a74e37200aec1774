"""Draws of a whole batch against ``crops.draw``, one by one, and the colour matrix against the operations it stands for."""

import numpy as np
import pytest

from massl_fast.data import crops
from massl_fast.data.crops import LUMA, View, draw, published_views, sample_generator
from massl_fast.data.dali.draws import ViewTable, draw_batch, random_numbers

VIEWS = (
    *published_views(num_local=2),
    View(size=8, ratio=(1, 1), jitter=(0, 0.3, 2.0, 0.5), solarize_probability=1.0, solarize_threshold=77, blur_probability=0.5),
    View(jitter_probability=0, grayscale_probability=0, scale=(0.9, 1), ratio=(0.1, 0.11)),
)
SIZES = np.array([(500, 375), (375, 500), (1, 1), (1, 900), (900, 1), (20, 13), (4000, 30), (128, 128)])


def drawn_both_ways(count: int):
    """(crops.draw's result, image, view, Draws) for ``count`` images of all sizes."""
    indices = list(range(1000, 1000 + count))
    sizes = SIZES[np.arange(count) % len(SIZES)]
    batch = draw_batch(ViewTable(VIEWS), random_numbers(7, 3, indices, len(VIEWS)), *sizes.T)
    for n, (index, (width, height)) in enumerate(zip(indices, sizes.tolist())):
        generator = sample_generator(7, 3, index)
        for v, view in enumerate(VIEWS):
            yield draw(view, generator, width, height), n, v, batch


def test_every_number_is_that_of_draw():
    flips = 0
    for one, n, v, batch in drawn_both_ways(400):
        left, right = one.left, one.left + one.width
        flips += one.flip
        assert batch.start[n, v].tolist() == [one.top, right if one.flip else left]
        assert batch.end[n, v].tolist() == [one.top + one.height, left if one.flip else right]
        assert batch.sigma[n, v] == np.float32(one.blur_sigma)
        assert batch.threshold[n, v] == (one.view.solarize_threshold if one.solarize else 256)
    assert flips > 400


def composed(pixels: np.ndarray, one) -> np.ndarray:
    """The drawn colour operations on float64 [3, P], one after the other, without clipping; hue as a turn about the grey axis."""
    luma = LUMA.astype(np.float64)
    for name, amount in one.jitter:
        gray = luma @ pixels
        if name == "brightness":
            pixels = pixels * amount
        elif name == "contrast":
            pixels = amount * pixels + (1 - amount) * gray.mean()
        elif name == "saturation":
            pixels = amount * pixels + (1 - amount) * gray
        else:
            # In the plane across the grey axis, spanned by red and (green - blue).
            middle = pixels.mean(0)
            red = (2 * pixels[0] - pixels[1] - pixels[2]) / 3
            green_blue = (pixels[1] - pixels[2]) / np.sqrt(3)
            angle = np.arctan2(green_blue, red) + 2 * np.pi * amount
            chroma = np.hypot(red, green_blue)
            pixels = middle + np.stack([chroma * np.cos(angle - turn * 2 * np.pi / 3) for turn in range(3)])
    return np.repeat(luma @ pixels, 3, 0) if one.grayscale else pixels


def test_the_matrix_is_the_drawn_operations_in_the_drawn_order():
    pixels = np.random.default_rng(0).uniform(0, 255, (3, 50))
    orders = set()
    for one, n, v, batch in drawn_both_ways(200):
        orders.add(tuple(name for name, _ in one.jitter))
        found = batch.matrix[n, v] @ pixels + (batch.mean_matrix[n, v] @ pixels.mean(1))[:, None]
        np.testing.assert_allclose(found, composed(pixels, one), rtol=2e-5, atol=2e-3)
    assert len(orders) > 24


@pytest.mark.parametrize("turn", [1 / 3, -1 / 3])
def test_a_third_of_the_circle_is_the_turn_of_hsv(turn):
    pixels = np.random.default_rng(1).uniform(0, 255, (3, 50)).astype(np.float32)
    view = View(jitter=(0, 0, 0, 0.5), jitter_probability=1, grayscale_probability=0)
    u = np.full((1, 1, 33), 0.5)
    u[..., 27] = turn + 0.5
    batch = draw_batch(ViewTable([view]), u, np.array([10]), np.array([10]))
    np.testing.assert_allclose(batch.matrix[0, 0] @ pixels, crops.adjust_hue(pixels, turn), atol=0.01)


def test_shares_and_ranges_are_those_of_the_recipe():
    """6,000 images; a share may be off by 4.5 of its standard deviations."""
    views = published_views(num_local=1)
    count = 6000
    batch = draw_batch(ViewTable(views), random_numbers(0, 0, range(count), 3), np.full(count, 500), np.full(count, 375))

    def close(found: np.ndarray, share: float) -> bool:
        return abs(found.mean() - share) <= 4.5 * np.sqrt(share * (1 - share) / count)

    unchanged = (batch.matrix == np.eye(3, dtype=np.float32)).all((-1, -2))
    gray = np.ptp(batch.matrix, axis=-2).max(-1) < 1e-6
    for v, (view, blur, solarize) in enumerate(zip(views, (1.0, 0.1, 0.5), (0.0, 0.2, 0.0))):
        assert close(batch.start[:, v, 1] > batch.end[:, v, 1], 0.5)
        assert close(unchanged[:, v], 0.2 * 0.8)
        assert close(gray[:, v], 0.2)
        assert close(batch.sigma[:, v] > 0, blur)
        assert close(batch.threshold[:, v] == 128, solarize)
        area = np.abs(batch.end[:, v] - batch.start[:, v]).prod(-1) / (500 * 375)
        assert view.scale[0] * 0.98 <= area.min() and area.max() <= min(1, view.scale[1] * 1.02)
        drawn = batch.sigma[:, v][batch.sigma[:, v] > 0]
        assert drawn.min() >= 0.1 and drawn.max() <= 2.0 and abs(drawn.mean() - 1.05) < 4.5 * 1.9 / np.sqrt(12 * len(drawn))
