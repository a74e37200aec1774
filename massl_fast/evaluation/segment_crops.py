"""A linear layer on frozen patch tokens, trained on crops: MMC's long protocol of segmentation, after VICRegL (`segment --train-like mmc`).

Published are the blocks, the crop of 512 px, the optimizer and its schedule. What is not is taken from mmsegmentation, whose pipeline both
papers use, as far as its defaults are known here: scales of 0.5 to 2, crops of which no class fills more than three quarters, the loss as a
mean over all pixels (void ones count as 0), windows of 512 px every 341 px for validation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from massl_fast.data.decode import UnreadableImage, decode_rgb
from massl_fast.data.torchvision_loader import worker_arguments
from massl_fast.evaluation.images import gathered
from massl_fast.evaluation.layouts.scenes import IGNORED, Scene
from massl_fast.evaluation.metrics.segmentation import confusion_matrix
from massl_fast.evaluation.store import progress
from massl_fast.evaluation.subject import RAW_PIXELS, Subject, backbone_of
from massl_fast.evaluation.tokens import block_tokens, demand_finite, evaluated, normalised, patch_colours

SIDE = 512
STEPS, CROPS, WARM_UP = 40_000, 16, 1_500
RATE, BETAS, DECAY = 1e-4, (0.9, 0.999), 0.05
LONGEST = 4
"""The longer side is at most so many times the crop's side before the scale is drawn: 2048 px."""
SCALES = (0.5, 2.0)
MOST_OF_ONE, TRIES = 0.75, 10
STRIDE = 341 / 512
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18 / 180
INITIAL_DEVIATION = 0.01


def blocks_of(network: nn.Module) -> list[int]:
    """Blocks (from 0) whose tokens are concatenated: 6, 8, 10 and 12 of 12, and those as deep of another network."""
    backbone = backbone_of(network)
    depth = len(getattr(backbone, "blocks", ()))
    if not depth:
        raise ValueError(f"{type(backbone).__name__} has no list of blocks to take tokens from. Take --train-like capi.")
    return sorted({max(0, round(depth * number / 12) - 1) for number in (6, 8, 10, 12)})


def read_scene(scene: Scene) -> tuple[Image.Image, Image.Image] | None:
    """(upright RGB image, labels of its size), or None where the image cannot be read; ValueError for a mask that cannot."""
    try:
        image = decode_rgb(scene.image.read_bytes(), scene.name)
    except (UnreadableImage, OSError):
        return None
    labels = Image.fromarray(scene.labels())
    return image, labels if labels.size == image.size else labels.resize(image.size, Image.Resampling.NEAREST)


def scaled(size: tuple[int, int], side: int, scale: float = 1.0) -> tuple[int, int]:
    """(width, height) with the shorter side at `side` × `scale`, unless the longer one would exceed four times that."""
    factor = scale * min(side / min(size), LONGEST * side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def distorted(pixels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Brightness ± 32, contrast and saturation × 0.5 to 1.5, hue ± 18°/180°, each half of the time; contrast before or after colours.
    uint8 [H, W, 3] → the same.
    """
    contrast_first = draw.random() < 0.5

    def contrasted(pixels: np.ndarray) -> np.ndarray:
        return _to_bytes(pixels * np.float32(draw.uniform(*CONTRAST))) if draw.random() < 0.5 else pixels

    if draw.random() < 0.5:
        pixels = _to_bytes(pixels + np.float32(draw.uniform(-BRIGHTNESS, BRIGHTNESS)))
    if contrast_first:
        pixels = contrasted(pixels)
    saturation = draw.uniform(*SATURATION) if draw.random() < 0.5 else 1.0
    hue = round(256 * draw.uniform(-HUE, HUE)) if draw.random() < 0.5 else 0
    if saturation != 1 or hue:
        hues, saturations, values = Image.fromarray(pixels).convert("HSV").split()
        hues = hues.point([(value + hue) % 256 for value in range(256)])
        saturations = saturations.point([min(255, int(value * saturation)) for value in range(256)])
        pixels = np.array(Image.merge("HSV", (hues, saturations, values)).convert("RGB"))
    return pixels if contrast_first else contrasted(pixels)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


class Crops(Dataset):
    """The crops of a training run, by their number: the same every time for (seed, number), whoever makes them.

    Images take turns in an order that is drawn for each epoch.
    """

    def __init__(self, scenes: Sequence[Scene], side: int, seed: int, numbers: Sequence[int], fill: tuple[int, ...]) -> None:
        self.scenes, self.side, self.seed, self.numbers, self.fill = scenes, side, seed, numbers, fill

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, int]:
        """(uint8 [3, side, side], labels uint8 [side, side], -1 or the image's number where it cannot be read: then all is void)."""
        number = self.numbers[item]
        epoch, place = divmod(number, len(self.scenes))
        which = int(np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.scenes))[place])
        pixels = np.full((self.side, self.side, 3), self.fill, np.uint8)
        labels = np.full((self.side, self.side), IGNORED, np.uint8)
        read = read_scene(self.scenes[which])
        if read is not None:
            part, of_part = self._crop(*read, np.random.default_rng((self.seed, 1, number)))
            pixels[: part.shape[0], : part.shape[1]], labels[: part.shape[0], : part.shape[1]] = part, of_part
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(labels), -1 if read is not None else which

    def _crop(self, image: Image.Image, labels: Image.Image, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        size = scaled(image.size, self.side, draw.uniform(*SCALES))
        image, labels = image.resize(size, Image.Resampling.BILINEAR), labels.resize(size, Image.Resampling.NEAREST)
        for _ in range(TRIES):
            left, top = (int(draw.integers(max(0, length - self.side) + 1)) for length in size)
            box = (left, top, min(left + self.side, size[0]), min(top + self.side, size[1]))
            part = np.array(labels.crop(box))
            counts = np.bincount(part[part != IGNORED], minlength=2)
            if np.count_nonzero(counts) > 1 and counts.max() < MOST_OF_ONE * counts.sum():
                break
        pixels = np.array(image.crop(box))
        if draw.random() < 0.5:
            pixels, part = pixels[:, ::-1], part[:, ::-1]
        return distorted(np.ascontiguousarray(pixels), draw), part


@dataclass(frozen=True)
class LinearLayers:
    """One linear layer per network (and per raw pixels: mean and deviation of each patch's colours), trained on the same crops."""

    layers: dict[str, nn.Conv2d]
    losses: list[float]
    """Of each step, mean over the layers."""
    unreadable: list[int]
    """Numbers of training images that could not be read, of all ranks."""


def _features(subject: Subject, pixels: Tensor, patch: int, with_colours: bool) -> dict[str, Tensor]:
    """{network: tokens of its blocks [N, 4C, h, w], float32} of uint8 images."""
    with evaluated(subject):
        batch = normalised(subject, pixels)
        found = {}
        for name, network in subject.networks.items():
            found[name] = block_tokens(network, batch, blocks_of(network))
        if with_colours:
            found[RAW_PIXELS] = patch_colours(batch, patch).permute(0, 3, 1, 2)
    demand_finite(found)
    return {name: tokens.float() for name, tokens in found.items()}


def trained(
    subject: Subject, scenes: Sequence[Scene], classes: int, *, side: int, patch: int, steps: int, crops: int, rate: float
) -> LinearLayers:
    """Train a linear layer per network on `crops` crops of each of `steps` steps: AdamW, warm-up, then linearly to 0.

    Ranks share the crops of a step and add up their gradients. With several ranks a collective call.
    """
    rank, world = subject.shard
    if crops < world:
        raise ValueError(
            f"{world} ranks cannot share {crops} crops per step; each needs one. Take fewer ranks or more {subject.option('crops')}."
        )
    numbers = [step * crops + place for step in range(steps) for place in range(rank, crops, world)]
    workers = worker_arguments() if subject.num_workers > 0 else {}
    loader = DataLoader(
        Crops(scenes, side, subject.seed, numbers, _fill(subject)),
        batch_size=len(range(rank, crops, world)),
        num_workers=subject.num_workers,
        generator=torch.Generator(),
        **workers,
    )
    widths = {name: len(blocks_of(network)) * backbone_of(network).num_features for name, network in subject.networks.items()}
    widths |= {RAW_PIXELS: 6} if subject.raw_pixels else {}
    layers = {name: _layer(width, classes, subject) for name, width in widths.items()}
    weights = [weight for layer in layers.values() for weight in layer.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=BETAS, weight_decay=DECAY)
    losses: list[float] = []
    unreadable: set[int] = set()
    with torch.enable_grad(), progress("steps of linear layers", steps) as advance:
        for step, (pixels, labels, missing) in enumerate(loader):
            unreadable |= set(missing[missing >= 0].tolist())
            labels = labels.to(subject.device).long()
            total = torch.zeros((), device=subject.device)
            optimizer.zero_grad()
            for name, tokens in _features(subject, pixels, patch, subject.raw_pixels).items():
                for row in range(len(labels)):  # one by one: the logits of 16 crops and 150 classes take 2.5 GB
                    logits = _enlarged(layers[name](tokens[row : row + 1]), (side, side))
                    loss = F.cross_entropy(logits, labels[row : row + 1], ignore_index=IGNORED, reduction="sum") / (crops * side**2)
                    loss.backward()
                    total += loss.detach() / len(layers)
            if world > 1:
                flat = torch.cat([total[None], *(weight.grad.flatten() for weight in weights)])
                dist.all_reduce(flat)
                total, *gradients = flat.split([1, *(weight.numel() for weight in weights)])
                for weight, gradient in zip(weights, gradients):
                    weight.grad.copy_(gradient.view_as(weight))
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps) * min(1, (step + 1) / warm_up_steps(steps))
            optimizer.step()
            losses.append(float(total))
            advance(1)
    return LinearLayers(layers, losses, sorted(set(gathered(sorted(unreadable), subject.shard))))


def warm_up_steps(steps: int) -> int:
    """The published 1,500 of 40,000 steps, as large a part of fewer."""
    return max(1, round(WARM_UP * min(1, steps / STEPS)))


def _fill(subject: Subject) -> tuple[int, ...]:
    """The colour around an image that is smaller than a crop: 0 after normalisation, but for rounding."""
    return tuple(round(255 * mean) for mean in subject.mean)


def _enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _layer(width: int, classes: int, subject: Subject) -> nn.Conv2d:
    layer = nn.Conv2d(width, classes, 1)
    generator = torch.Generator().manual_seed(subject.seed)
    with torch.no_grad():
        layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0, INITIAL_DEVIATION, generator=generator))
        layer.bias.zero_()
    return layer.to(subject.device)


@torch.no_grad()
def predicted(subject: Subject, layers: dict[str, nn.Conv2d], image: Image.Image, *, side: int, patch: int) -> dict[str, Tensor]:
    """{network: class [height, width] uint8 of each pixel of an image}: mean logits of windows over it, enlarged to its size."""
    width, height = scaled(image.size, side)
    room = (max(height, side), max(width, side))
    canvas = np.full((*room, 3), _fill(subject), np.uint8)
    canvas[:height, :width] = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(canvas).permute(2, 0, 1)
    places = [(top, left) for top in window_starts(room[0], side) for left in window_starts(room[1], side)]
    sums: dict[str, Tensor] = {}
    hits = torch.zeros(room, device=subject.device)
    at_once = max(1, subject.batch_size * 224**2 // side**2)
    for first in range(0, len(places), at_once):
        some = places[first : first + at_once]
        windows = torch.stack([pixels[:, top : top + side, left : left + side] for top, left in some])
        found = _features(subject, windows, patch, RAW_PIXELS in layers)
        for name, layer in layers.items():
            if name not in sums:
                sums[name] = torch.zeros(layer.out_channels, *room, device=subject.device)
            for row, (top, left) in enumerate(some):
                sums[name][:, top : top + side, left : left + side] += _enlarged(layer(found[name][row : row + 1]), (side, side))[0]
        for top, left in some:
            hits[top : top + side, left : left + side] += 1
    classes = {}
    for name, values in sums.items():
        mean = (values / hits)[None, :, :height, :width]
        classes[name] = _enlarged(mean, image.size[::-1])[0].argmax(0).to(torch.uint8).cpu()
    return classes


def window_starts(length: int, side: int) -> list[int]:
    """Where windows of `side` begin so that they cover `length`, two thirds of a window apart, the last at the end."""
    stride = int(side * STRIDE)
    return [min(number * stride, length - side) for number in range(max(0, length - side + stride - 1) // stride + 1)]


def confusions(
    subject: Subject, layers: dict[str, nn.Conv2d], scenes: Sequence[Scene], classes: int, *, side: int, patch: int
) -> tuple[dict[str, np.ndarray], dict[int, float], list[int]]:
    """({network: confusion matrix of all images at their own size}, {image's number: share of the first network's pixels that are right},
    numbers of images that cannot be read). With several ranks a collective call.
    """
    rows: list[tuple[int, dict[str, np.ndarray] | None]] = []
    for number, read in _read_in_turns(scenes, subject.shard):
        if read is None:
            rows.append((number, None))
            continue
        image, labels = read
        truth = np.array(labels)
        found = predicted(subject, layers, image, side=side, patch=patch)
        rows.append((number, {name: confusion_matrix(truth, guess.numpy(), classes) for name, guess in found.items()}))
    rows = sorted(gathered(rows, subject.shard), key=lambda row: row[0])
    readable = [(number, row) for number, row in rows if row is not None]
    if not readable:
        raise ValueError("No validation image can be read.")
    first = next(iter(layers))
    accuracy = {number: float(np.trace(row[first]) / row[first].sum()) if row[first].sum() else float("nan") for number, row in readable}
    return {name: sum(row[name] for _, row in readable) for name in layers}, accuracy, [number for number, row in rows if row is None]


def _read_in_turns(scenes: Sequence[Scene], shard: tuple[int, int]) -> Iterator[tuple[int, tuple[Image.Image, Image.Image] | None]]:
    for number in range(shard[0], len(scenes), shard[1]):
        yield number, read_scene(scenes[number])
