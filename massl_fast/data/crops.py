"""What each view of an image undergoes: drawn here once for both loaders, applied here for the torchvision path.

The steps and their order are those of the published augmentation (Silva et al. 2024, section 4; the multi-crop of Caron et al. 2021):

    random resized crop (bicubic or bilinear, antialiased) -> flip -> colour jitter in random order -> grey -> blur -> solarize -> normalise

``draw`` decides, ``apply`` carries out. They are apart so that the distribution of what is drawn can be tested without an image,
and so that another loader can carry out the very same draw.

``apply`` does what ``torchvision.transforms`` does on Pillow images, several times faster: the resize runs in PyTorch's vectorised
uint8 kernel, colours on float32 planes in NumPy, rounded to uint8 once after the last of them, the blur on integers of 16 bits, rounded
after each of its two passes (Pillow: after each of six). What differs from the Pillow operations is at most rounding, except hue, which
Pillow quantises to 256 angles and which is exact here, and a crop of a JPEG decoded at a reduced scale, which may lie half a pixel of
that scale aside (``tests/data/test_crops.py`` states the size of each difference).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = np.array([[0.299, 0.587, 0.114]], np.float32)  # ITU-R 601-2, as Image.convert("L")
NO_TURN = np.eye(3, dtype=np.float32)
ONE_FURTHER = NO_TURN[[1, 2, 0]]  # red takes green's, green blue's, blue red's place
JITTER_ORDERS = tuple(permutations(("brightness", "contrast", "saturation", "hue")))


@dataclass(frozen=True)
class View:
    """What one view of an image may undergo. Probabilities lie in [0, 1]; ``jitter`` holds the strengths of brightness, contrast,
    saturation (a factor is drawn from 1 ± strength) and hue (a turn of the colour circle is drawn from ± strength, at most 0.5)."""

    size: int = 224  # pixels, both sides of the output
    scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area that the crop covers
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop, drawn log-uniformly
    interpolation: str = "bicubic"  # or bilinear: how the crop is resized, antialiased either way
    flip_probability: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the output
    solarize_probability: float = 0.0
    solarize_threshold: int = 128  # of 255; values from here on are inverted
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        def demand(holds: bool, name: str, wanted: str) -> None:
            if not holds:
                raise ValueError(f"A view's {name} is {getattr(self, name)}; it must be {wanted}.")

        demand(self.size >= 1, "size", "at least 1 pixel")
        demand(0 < self.scale[0] <= self.scale[1] <= 1, "scale", "two shares of the image's area, 0 < least <= most <= 1")
        demand(0 < self.ratio[0] <= self.ratio[1], "ratio", "two width-to-height ratios, 0 < least <= most")
        demand(self.interpolation in ("bicubic", "bilinear"), "interpolation", "bicubic or bilinear")
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            demand(0 <= getattr(self, f"{name}_probability") <= 1, f"{name}_probability", "a probability from 0 to 1")
        demand(len(self.jitter) == 4 and min(self.jitter) >= 0, "jitter", "four strengths of at least 0")
        demand(self.jitter[3] <= 0.5, "jitter", "at most 0.5 in its last strength, the hue: half a turn of the colour circle")
        demand(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", "two positive numbers of pixels, the lesser first")
        demand(0 <= self.solarize_threshold <= 256, "solarize_threshold", "from 0 to 256")
        demand(len(self.mean) == 3, "mean", "three numbers, for red, green and blue")
        demand(len(self.std) == 3 and min(self.std) > 0, "std", "three positive numbers, for red, green and blue")


@dataclass(frozen=True)
class Drawn:
    """What was decided for one view of one image; pixel coordinates are those of the whole upright image."""

    view: View = field(repr=False)
    image_width: int
    image_height: int
    left: int
    top: int
    width: int
    height: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]  # (operation, factor or turn) in the order they are applied; empty: none
    grayscale: bool
    blur_sigma: float  # pixels of the output; 0: no blur
    solarize: bool


def published_views(
    *,
    global_size: int = 224,
    local_size: int = 96,
    num_local: int = 10,
    global_scale: tuple[float, float] = (0.32, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.32),
    blur_probabilities: tuple[float, float, float] = (1.0, 0.1, 0.5),
    solarize_probabilities: tuple[float, float, float] = (0.0, 0.2, 0.0),
    **common: Any,
) -> tuple[View, ...]:
    """The views of the published recipe: two global ones first, then ``num_local`` local ones.

    ``blur_probabilities`` and ``solarize_probabilities`` are those of the first global, the second global and every local view;
    ``common`` overrides any other field of :class:`View` for all of them (small images want less blur, say).
    """
    if num_local < 0:
        raise ValueError(f"The number of local crops is {num_local}; it must be at least 0.")
    shape = View(size=global_size, scale=global_scale, **common)
    first, second, local = (
        replace(shape, blur_probability=blur, solarize_probability=solarize)
        for blur, solarize in zip(blur_probabilities, solarize_probabilities)
    )
    return (first, second, *[replace(local, size=local_size, scale=local_scale)] * num_local)


def sample_generator(seed: int, epoch: int, index: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one image in one epoch: a counter-based generator, so they depend on nothing drawn before.

    ``stream`` sets apart what is drawn for different purposes: 0 for the views, 1 for replacements of unreadable images.
    """
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, 0], counter=[0, stream, index, epoch]))


def draw(view: View, generator: np.random.Generator, width: int, height: int) -> Drawn:
    """Decides what ``view`` of an upright image of ``width`` × ``height`` pixels undergoes.

    Always takes the same count of numbers from ``generator``: what one view gets never depends on another's luck.
    """
    u = generator.random(33).tolist()
    left, top, crop_width, crop_height = _draw_box(view, u[:22], width, height)
    jitter = ()
    if u[23] < view.jitter_probability:
        turn = view.jitter[3] * (2 * u[27] - 1)
        factors = {
            name: max(0.0, 1 - strength) + spread * (1 + strength - max(0.0, 1 - strength))
            for name, strength, spread in zip(("brightness", "contrast", "saturation"), view.jitter, u[24:27])
        } | {"hue": turn}
        strengths = dict(zip(factors, view.jitter))
        jitter = tuple((name, factors[name]) for name in JITTER_ORDERS[int(u[28] * 24)] if strengths[name] > 0)
    least, most = view.blur_sigma
    return Drawn(
        view=view,
        image_width=width,
        image_height=height,
        left=left,
        top=top,
        width=crop_width,
        height=crop_height,
        flip=u[22] < view.flip_probability,
        jitter=jitter,
        grayscale=u[29] < view.grayscale_probability,
        blur_sigma=least + (most - least) * u[31] if u[30] < view.blur_probability else 0.0,
        solarize=u[32] < view.solarize_probability,
    )


def _draw_box(view: View, u: list[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width, height of the crop: ten attempts, then the largest central crop within the ratios, as torchvision does."""
    least, most = view.scale
    log_least, log_most = math.log(view.ratio[0]), math.log(view.ratio[1])
    for attempt in range(10):
        area = width * height * (least + (most - least) * u[2 * attempt])
        ratio = math.exp(log_least + (log_most - log_least) * u[2 * attempt + 1])
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return (
                int(u[20] * (width - crop_width + 1)),
                int(u[21] * (height - crop_height + 1)),
                crop_width,
                crop_height,
            )
    crop_width, crop_height = width, height
    if width / height < view.ratio[0]:
        crop_height = min(height, round(width / view.ratio[0]))
    elif width / height > view.ratio[1]:
        crop_width = min(width, round(height * view.ratio[1]))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def apply(image: Image.Image, drawn: Drawn) -> torch.Tensor:
    """The view of an upright RGB ``image`` that was ``drawn`` for it: float32 [3, size, size], normalised."""
    values = resize(torch.from_numpy(np.array(image)), drawn)[None]
    color_(values, [drawn])
    return normalize(torch.from_numpy(values), drawn.view)[0]


def normalize(values: torch.Tensor, view: View) -> torch.Tensor:
    """uint8 [N, 3, H, W] on any device to float32 [N, 3, H, W], channels-last: (value / 255 - mean) / std."""
    scale, shift = _scale_and_shift(view.mean, view.std, values.device)
    return values.contiguous(memory_format=torch.channels_last).to(torch.float32).mul_(scale).add_(shift)


@cache  # A copy to a GPU from ordinary memory makes the host wait: once, not every step.
def _scale_and_shift(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)], device=device)
    return scale[:, None, None], shift[:, None, None]


def resize(pixels: torch.Tensor, drawn: Drawn) -> np.ndarray:
    """Crop, resize and flip: uint8 [H, W, 3] -> uint8 [3, size, size].

    ``pixels`` may be the image at a reduced scale, 1/2, 1/4 or 1/8: then each edge of the crop goes to the nearest edge of its pixels.
    """
    size, scale = drawn.view.size, max(1, round(drawn.image_width / pixels.shape[1]), round(drawn.image_height / pixels.shape[0]))
    left, top = min(round(drawn.left / scale), pixels.shape[1] - 1), min(round(drawn.top / scale), pixels.shape[0] - 1)
    right, bottom = round((drawn.left + drawn.width) / scale), round((drawn.top + drawn.height) / scale)
    box = pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
    mode = drawn.view.interpolation
    resized = torch.nn.functional.interpolate(box.permute(2, 0, 1)[None], size=(size, size), mode=mode, antialias=True)
    return (resized.flip(-1) if drawn.flip else resized)[0].numpy()


def largest_reduction(drawn: Sequence[Drawn]) -> int:
    """How many times smaller an image may be decoded, 1, 2, 4 or 8, so that every crop of it is still made smaller and never larger."""
    room = min(min(d.width, d.height) / d.view.size for d in drawn)
    return next(reduction for reduction in (8, 4, 2, 1) if room >= reduction or reduction == 1)


def color_(values: np.ndarray, drawn: Sequence[Drawn]) -> None:
    """Everything after resize and flip but the normalisation, in place on uint8 [N, 3, S, S], one draw each."""
    for image, d in zip(values, drawn):
        changed = image
        if d.jitter or d.grayscale:
            planes = image.reshape(3, -1).astype(np.float32)
            for name, amount in d.jitter:
                planes = JITTER[name](planes, amount)
            if d.grayscale:
                planes = LUMA @ planes
            planes += 0.5
            changed = planes.astype(np.uint8).reshape(-1, *image.shape[1:])
        if d.blur_sigma > 0:
            changed = blur(changed, d.blur_sigma)
        if d.solarize:
            changed = np.where(changed >= d.view.solarize_threshold, 255 - changed, changed)
        if changed is not image:
            image[:] = changed


# Colour operations: float32 [3, P] of values 0 … 255, which may be changed in place, to values 0 … 255 up to the rounding of float32.


def adjust_brightness(planes: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black."""
    planes *= factor
    return np.clip(planes, 0, 255, out=planes) if factor > 1 else planes


def adjust_contrast(planes: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean of the image's own grey values."""
    mean = (LUMA @ planes.mean(1)).item()
    planes *= factor
    planes += (1 - factor) * mean
    return np.clip(planes, 0, 255, out=planes) if factor > 1 else planes


def adjust_saturation(planes: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image."""
    blended = (factor * NO_TURN + (1 - factor) * LUMA) @ planes
    return np.clip(blended, 0, 255, out=blended) if factor > 1 else blended


def adjust_hue(planes: np.ndarray, turn: float) -> np.ndarray:
    """Rotate the hue of HSV by ``turn`` (1 = once around), keeping saturation and value, the largest and the least channel.

    In HSV a channel is ``least + chroma · c(u)`` with u the hue in sixths of the circle and c a trapezoid: red |u − 3| − 1, green
    2 − |u − 2|, blue 2 − |u − 4|, each clipped to [0, 1]. A third of the circle exchanges the channels. Within a sixth to either
    side, h = 6 · turn and k = 1 − 2·|h|, the moved trapezoids are cut from planes, so that neither the hue nor a division is needed:

        red' = clip(red − green − k·blue + (1 − |h|)·(most + least), least, most)    for h ≥ 0; k goes to green for h < 0

    and green' and blue' likewise with the channels one further.
    """
    red, green, blue = planes
    most, least = np.maximum(red, green), np.minimum(red, green)
    np.maximum(most, blue, out=most)
    np.minimum(least, blue, out=least)
    thirds = round(3 * turn)
    sixths = 6 * turn - 2 * thirds  # within ±1
    one_further, two_further = (1.0, 1 - 2 * sixths) if sixths >= 0 else (1 + 2 * sixths, 1.0)
    rotation = NO_TURN - one_further * ONE_FURTHER - two_further * ONE_FURTHER.T
    rotated = (rotation @ np.roll(NO_TURN, thirds, 0)).astype(np.float32) @ planes
    total = most + least
    total *= 1 - abs(sixths)
    rotated += total
    return np.clip(rotated, least, most, out=rotated)


JITTER = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def gaussian_kernel(sigma: float) -> list[float]:
    """The weights that Pillow's GaussianBlur comes to at distances 0, 1, …, of variance sigma².

    Pillow runs one box three times; the box of fractional width (Gwosdek et al. 2011, "Theoretical foundations of Gaussian
    convolution by extended box filtering", section 3) has weight 1 at distances 0 … l and a fraction at l + 1. Weights too small
    to move a value are left out.
    """
    variance = sigma**2 / 3
    inner = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance) / (6 * (variance - (inner + 1) ** 2))
    box = np.array([fraction, *[1.0] * (2 * inner + 1), fraction]) / (2 * inner + 1 + 2 * fraction)
    weights = np.convolve(np.convolve(box, box), box)[3 * (inner + 1) :].tolist()
    while weights[-1] < 2e-4:
        weights[0] += 2 * weights.pop()
    return weights


def blur(images: np.ndarray, sigma: float) -> np.ndarray:
    """``gaussian_blur`` of uint8 [C, H, W], as uint8, in integers of 16 bits and weights of 1/256: at most 2.5 of 255 from it.

    255 times the sum of the weights, 256, is the most that an unsigned 16-bit number holds; each pass is rounded to 8 bits.
    """
    weights = [round(256 * weight) for weight in gaussian_kernel(sigma)]
    weights[0] = 256 - 2 * sum(weights[1:])
    weights = [np.uint16(weight) for weight in weights]
    for axis in (2, 1):
        images = _weigh(images, weights, axis, np.uint16)
        images += 128
        images >>= 8
    return images.astype(np.uint8)


def gaussian_blur(images: np.ndarray, sigma: float) -> np.ndarray:
    """Blur of float32 [C, H, W] by ``sigma`` pixels; border pixels are repeated. What ``blur`` is held to."""
    weights = [np.float32(weight) for weight in gaussian_kernel(sigma)]
    return _weigh(_weigh(images, weights, 2, np.float32), weights, 1, np.float32)


def _weigh(images: np.ndarray, weights: list, axis: int, dtype: type) -> np.ndarray:
    """The sum of the images moved by −radius … radius along an axis, those at equal distance with equal weight."""
    radius, length = len(weights) - 1, images.shape[axis]
    padded: np.ndarray = np.empty([n + 2 * radius * (k == axis) for k, n in enumerate(images.shape)], dtype)

    def moved(begin: int, end: int) -> np.ndarray:
        return padded[:, :, begin:end] if axis == 2 else padded[:, begin:end]

    moved(radius, radius + length)[:] = images
    moved(0, radius)[:] = moved(radius, radius + 1)
    moved(radius + length, 2 * radius + length)[:] = moved(radius + length - 1, radius + length)
    total = moved(radius, radius + length) * weights[0]
    for distance in range(1, radius + 1):
        pair = moved(radius - distance, radius - distance + length) + moved(radius + distance, radius + distance + length)
        pair *= weights[distance]
        total += pair
    return total
