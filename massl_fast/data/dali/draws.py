"""``crops.draw`` for a whole batch at once, in the form that DALI's operators take.

The numbers are those of ``crops.draw``, one for one (``tests/data/test_dali_draws.py`` holds them together); a loop over it would cost
a Python thread more time than a GPU needs for the image. Colour becomes one matrix: brightness, contrast, saturation and grey are
linear in a crop's pixels x and their mean μ, and so is their composition in whatever order was drawn,

    y = A x + B μ,      A, B [3, 3],

except that values are clipped once, at the end, and that hue turns about the grey axis of RGB, the linear map nearest to the turn of
HSV (the two agree at multiples of a third of the circle). ``docs/data.md`` states the size of both differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from massl_fast.data.crops import JITTER_ORDERS, LUMA, View, sample_generator

DRAWN_PER_VIEW = 33  # random numbers that crops.draw takes
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
OPERATIONS = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
ORDERS = np.array([[OPERATIONS[name] for name in order] for order in JITTER_ORDERS])
TO_GRAY = np.repeat(LUMA.astype(np.float64), 3, axis=0)


@dataclass(frozen=True)
class Draws:
    """What was drawn for N images and V views; pixels are those of the whole upright image."""

    start: np.ndarray  # float32 [N, V, 2], top and left of the crop; left and right change places where it is flipped
    end: np.ndarray  # float32 [N, V, 2], bottom and right, exclusive
    matrix: np.ndarray  # float32 [N, V, 3, 3], A: what a pixel is multiplied with
    mean_matrix: np.ndarray  # float32 [N, V, 3, 3], B: what the crop's mean pixel is multiplied with
    sigma: np.ndarray  # float32 [N, V], pixels of the output; 0: no blur
    threshold: np.ndarray  # int32 [N, V], values from here on are inverted; 256: none


class ViewTable:
    """The views' fields as arrays [V]."""

    def __init__(self, views: Sequence[View]) -> None:
        def column(field) -> np.ndarray:
            return np.array([field(view) for view in views], np.float64)

        self.least_area, self.most_area = column(lambda v: v.scale[0]), column(lambda v: v.scale[1])
        self.least_ratio, self.most_ratio = column(lambda v: v.ratio[0]), column(lambda v: v.ratio[1])
        self.flip, self.jitter = column(lambda v: v.flip_probability), column(lambda v: v.jitter_probability)
        self.gray, self.blur = column(lambda v: v.grayscale_probability), column(lambda v: v.blur_probability)
        self.least_sigma, self.most_sigma = column(lambda v: v.blur_sigma[0]), column(lambda v: v.blur_sigma[1])
        self.solarize, self.threshold = column(lambda v: v.solarize_probability), column(lambda v: v.solarize_threshold)
        strengths = column(lambda v: v.jitter)
        self.least_factor, self.most_factor = np.maximum(0, 1 - strengths[:, :3]), 1 + strengths[:, :3]
        self.most_turn = strengths[:, 3]
        self.count = len(views)


def random_numbers(seed: int, epoch: int, indices: Sequence[int], num_views: int) -> np.ndarray:
    """float64 [N, V, 33] in [0, 1): what ``crops.draw`` would take for these images, from the same generators."""
    return np.stack([sample_generator(seed, epoch, index).random((num_views, DRAWN_PER_VIEW)) for index in indices])


def draw_batch(views: ViewTable, u: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> Draws:
    """Decides for all images, upright ones of ``widths`` [N] × ``heights`` [N] pixels, from the numbers ``u`` [N, V, 33]."""
    start, end = _boxes(views, u, widths[:, None].astype(np.float64), heights[:, None].astype(np.float64))
    flipped = u[..., 22] < views.flip
    start[flipped, 1], end[flipped, 1] = end[flipped, 1], start[flipped, 1]
    matrix, mean_matrix = _colour(views, u)
    sigma = np.where(u[..., 30] < views.blur, views.least_sigma + (views.most_sigma - views.least_sigma) * u[..., 31], 0)
    threshold = np.where(u[..., 32] < views.solarize, views.threshold, 256)
    # DALI takes dense arrays of exactly these types.
    dense = [np.ascontiguousarray(a, np.float32) for a in (start, end, matrix, mean_matrix, sigma)]
    return Draws(*dense, np.ascontiguousarray(threshold, np.int32))


def _boxes(views: ViewTable, u: np.ndarray, width: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the crops, float64 [N, V, 2] each: the first of ten attempts that fits, else the largest central crop."""

    def column(values: np.ndarray) -> np.ndarray:
        return values[:, None]

    area = (width * height)[..., None] * (column(views.least_area) + column(views.most_area - views.least_area) * u[..., 0:20:2])
    logs = np.log(views.least_ratio), np.log(views.most_ratio)
    ratio = np.exp(column(logs[0]) + column(logs[1] - logs[0]) * u[..., 1:20:2])
    across, down = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (across > 0) & (across <= width[..., None]) & (down > 0) & (down <= height[..., None])
    first = fits.argmax(-1)[..., None]
    across, down = (np.take_along_axis(sizes, first, -1)[..., 0] for sizes in (across, down))
    left, top = np.floor(u[..., 20] * (width - across + 1)), np.floor(u[..., 21] * (height - down + 1))
    none = ~fits.any(-1)
    if none.any():
        tall, wide = width / height < views.least_ratio, width / height > views.most_ratio
        central_down = np.where(tall, np.minimum(height, np.rint(width / views.least_ratio)), height)
        central_across = np.where(wide, np.minimum(width, np.rint(height * views.most_ratio)), width)
        across, down = np.where(none, central_across, across), np.where(none, central_down, down)
        left, top = np.where(none, (width - across) // 2, left), np.where(none, (height - down) // 2, top)
    return np.stack([top, left], -1), np.stack([top + down, left + across], -1)


def _colour(views: ViewTable, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and B, float64 [N, V, 3, 3] each."""
    jittered = u[..., 23] < views.jitter
    factors = views.least_factor + u[..., 24:27] * (views.most_factor - views.least_factor)
    factors = np.where(jittered[..., None], factors, 1)
    turn = np.where(jittered, views.most_turn * (2 * u[..., 27] - 1), 0)
    order = ORDERS[(u[..., 28] * len(ORDERS)).astype(np.int64)]

    identity = np.eye(3)
    brightness, contrast, saturation = (factors[..., n, None, None] for n in (BRIGHTNESS, CONTRAST, SATURATION))
    steps = np.empty((4, *turn.shape, 3, 3))
    steps[BRIGHTNESS], steps[CONTRAST] = brightness * identity, contrast * identity
    steps[SATURATION] = saturation * identity + (1 - saturation) * TO_GRAY
    steps[HUE] = _turn_about_gray(turn)
    matrix = np.broadcast_to(identity, steps[0].shape)
    mean_matrix = np.zeros_like(steps[0])
    for position in range(4):
        operation = order[..., position]
        step = np.take_along_axis(steps, operation[None, ..., None, None], 0)[0]
        # Contrast adds (1 - factor) times the grey mean of what it is given, whose mean is (A + B) μ so far.
        blend = np.where((operation == CONTRAST)[..., None, None], (1 - contrast) * (TO_GRAY @ (matrix + mean_matrix)), 0)
        matrix, mean_matrix = step @ matrix, step @ mean_matrix + blend
    gray = (u[..., 29] < views.gray)[..., None, None]
    return np.where(gray, TO_GRAY @ matrix, matrix), np.where(gray, TO_GRAY @ mean_matrix, mean_matrix)


def _turn_about_gray(turn: np.ndarray) -> np.ndarray:
    """Rotations [..., 3, 3] about (1, 1, 1) by ``turn`` circles, red towards green (Rodrigues' formula)."""
    angle = 2 * np.pi * turn[..., None, None]
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return np.cos(angle) * np.eye(3) + np.sin(angle) * across + (1 - np.cos(angle)) / 3
