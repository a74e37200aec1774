"""Frozen features of labelled images, in a fixed order.

One pass over the images serves any number of networks: decoding costs more than a small network's forward pass.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from massl_fast.data.crops import View, draw, sample_generator
from massl_fast.data.decode import UnreadableImage, decode_rgb
from massl_fast.data.torchvision_loader import worker_arguments

if TYPE_CHECKING:
    from massl_fast.data.sources import Source

FeatureFunction = Callable[[Tensor], Tensor]
"""Normalised images [N, 3, H, W] -> features [N, C]. A module, or a method of one, is run in eval mode and then put back."""

SMALL_IMAGE = 64
RAW_PIXEL_SIDE = 32


@dataclass(frozen=True)
class Features:
    """Features of the readable images of a source, in the order of the source."""

    features: Tensor
    """[n, C], float32, CPU; as the network gives them, not normalised."""
    labels: Tensor
    """[n], int64: positions in `classes`."""
    indices: Tensor
    """[n], int64: positions in the source."""
    classes: tuple[str, ...]
    """Names of the classes of the source."""
    unreadable: tuple[str, ...] = ()
    """Names of the images that could not be decoded and were left out."""


def default_resize_ratio(image_size: int) -> float:
    """Shorter side after resizing, in units of `image_size`, before the centre crop.

    256/224 as in the published k-NN protocol; 1 up to 64 pixels, where a margin would cut off a good part of the object.
    """
    return 1.0 if image_size <= SMALL_IMAGE else 256 / 224


def resize_and_crop(
    image: Image.Image, image_size: int, resize_ratio: float, how: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Shorter side to `image_size` × `resize_ratio` (with antialiasing), then the centre square of `image_size` pixels.

    Rounds as torchvision's Resize and CenterCrop do on PIL images.
    """
    width, height = image.size
    shorter = max(image_size, round(image_size * resize_ratio))
    if width <= height:
        width, height = shorter, int(shorter * height / width)
    else:
        width, height = int(shorter * width / height), shorter
    if image.size != (width, height):
        image = image.resize((width, height), how)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return image.crop((left, top, left + image_size, top + image_size))


def fixed_subset(num_images: int, limit: int) -> np.ndarray:
    """Positions, ascending, of a random subset of `limit` images (0: all); the same every time."""
    if not 0 < limit < num_images:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(0).permutation(num_images)[:limit])


class LabelledImages(Dataset):
    """The images of a labelled source at one size, as bytes.

    Args:
        source: a labelled `Source`.
        image_size: side of the square images, pixels.
        resize_ratio: see `resize_and_crop`; None: `default_resize_ratio`.
        positions: which images of the source, in this order; None: all.
        shard: (rank, world size). Ranks take turns over the images; the last turn is filled up with the first images, so that every rank
            has the same number of batches (a sharded network needs that). `extract` puts the whole together again on every rank.

    Raises:
        ValueError: the source has no images, or images without a label.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        *,
        resize_ratio: float | None = None,
        positions: Sequence[int] | None = None,
        shard: tuple[int, int] = (0, 1),
    ):
        if len(source) == 0:
            raise ValueError(f"{source.path} holds no images; evaluation needs at least one.")
        if image_size < 1:
            raise ValueError(f"The images are to be {image_size} pixels wide; the size must be at least 1.")
        positions = np.arange(len(source)) if positions is None else np.asarray(positions, dtype=np.int64)
        self.source, self.image_size = source, image_size
        self.resize_ratio = default_resize_ratio(image_size) if resize_ratio is None else resize_ratio
        self.positions = torch.from_numpy(positions)
        self.labels = self._labels(positions)
        self.rank, self.world_size = shard
        turns = -(-len(positions) // self.world_size)
        self._mine = np.resize(positions, turns * self.world_size)[self.rank :: self.world_size]
        self.kept: tuple[Tensor, Tensor] | None = None
        """After a pass that keeps them: this rank's images, uint8 [n, 3, S, S], and which of them are readable, bool [n]."""

    def _labels(self, positions: np.ndarray) -> Tensor:
        labels = [self.source.label(int(i)) for i in positions]
        without = labels.count(None)
        if not self.source.classes or without:
            found = f"{without} of its {len(labels)} images have none" if self.source.classes else "it has no classes"
            raise ValueError(
                f"{self.source.path} is not labelled ({found}): k-NN needs a label for every image. "
                f"Give a folder of class folders, or WebDataset tars with .cls entries."
            )
        return torch.tensor(labels, dtype=torch.int64)

    def geometry(self) -> dict[str, Any]:
        """What decides over the pixels of an image, besides the image; and which images of the source these are. Plain values."""
        chosen = "all"
        if not torch.equal(self.positions, torch.arange(len(self.source))):
            chosen = hashlib.sha256(self.positions.numpy().tobytes()).hexdigest()
        return {"image_size": self.image_size, "resize_ratio": self.resize_ratio, "images": chosen}

    @property
    def num_bytes(self) -> int:
        """Size of this rank's images in memory, once decoded."""
        return len(self) * 3 * self.image_size**2

    def __len__(self) -> int:
        return len(self._mine)

    def __getitem__(self, item: int) -> tuple[Tensor, bool]:
        """(uint8 [3, S, S], readable); an unreadable image is black."""
        position = int(self._mine[item])
        try:
            image = decode_rgb(self.source.read(position), self.source.name(position))
        except (UnreadableImage, OSError):
            return torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), False
        return self.pixels(image, position), True

    def pixels(self, image: Image.Image, position: int) -> Tensor:
        """uint8 [3, S, S] of an upright image."""
        return torch.from_numpy(np.array(resize_and_crop(image, self.image_size, self.resize_ratio))).permute(2, 0, 1)

    def batches(
        self, batch_size: int, num_workers: int = 0, *, keep: bool = False, first_batch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (uint8 [b, 3, S, S], readable [b]). `keep` holds the decoded images in memory for the next pass; `first_batch` is the
        number of batches to leave out (nothing is kept then).
        """
        if self.kept is not None:
            yield from islice(zip(*(t.split(batch_size) for t in self.kept)), first_batch, None)
            return
        # A generator of its own: without one the DataLoader draws from the global one, and a resumed run would part from an unbroken one.
        workers = worker_arguments() if num_workers > 0 else {}
        images = Subset(self, range(first_batch * batch_size, len(self))) if first_batch else self
        loader = DataLoader(images, batch_size, num_workers=num_workers, generator=torch.Generator(), **workers)
        kept = []
        for batch in loader:
            if keep and not first_batch:
                kept.append(batch)
            yield batch
        if kept:
            self.kept = tuple(torch.cat(column) for column in zip(*kept))


class AugmentedImages(LabelledImages):
    """One augmented view of every image: random resized crop (8 % to all of the area, bilinear) and flip, as linear probes train on.

    Which crop an image gets depends on (seed, view, its position) alone.
    """

    def __init__(self, source: Source, image_size: int, *, view: int, seed: int = 0, **arguments: Any):
        super().__init__(source, image_size, **arguments)
        self.view, self.seed = view, seed
        self._undergoes = View(size=image_size, scale=(0.08, 1.0), jitter_probability=0, grayscale_probability=0)

    def geometry(self) -> dict[str, Any]:
        return {**super().geometry(), "view": self.view, "seed": self.seed}

    def pixels(self, image: Image.Image, position: int) -> Tensor:
        drawn = draw(self._undergoes, sample_generator(self.seed, self.view, position, stream=2), *image.size)
        box = torch.from_numpy(np.array(image))[drawn.top : drawn.top + drawn.height, drawn.left : drawn.left + drawn.width]
        side = (self.image_size, self.image_size)
        resized = F.interpolate(box.permute(2, 0, 1)[None], size=side, mode="bilinear", antialias=True)[0]
        return resized.flip(2) if drawn.flip else resized.contiguous()


class SquareImages(LabelledImages):
    """Images squeezed to a square, whatever their labels; all have the label 0."""

    def _labels(self, positions: np.ndarray) -> Tensor:
        return torch.zeros(len(positions), dtype=torch.int64)

    def geometry(self) -> dict[str, Any]:
        return {**super().geometry(), "squeezed": True}

    def pixels(self, image: Image.Image, position: int) -> Tensor:
        side = (self.image_size, self.image_size)
        image = image if image.size == side else image.resize(side, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def truth_of(train: Features, test: Features, who: str) -> Tensor:
    """Labels [n] of the test images in the numbering of `train.classes`; classes are matched by name. `who` names the protocol.

    Raises:
        ValueError: features that are not finite or of different widths, a test class that no training image has.
    """
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"Training features have {train.features.shape[1]} dimensions, test features {test.features.shape[1]}; "
            f"both must come from the same network."
        )
    for name, part in (("training", train), ("test", test)):
        broken = int((~part.features.isfinite().all(1)).sum())
        if broken:
            raise ValueError(
                f"The network gives features that are not finite for {broken} of {len(part.labels)} {name} images; "
                f"it has diverged, or its precision is too low. Evaluate an earlier checkpoint, or in fp32."
            )
    present = {train.classes[i] for i in train.labels.unique().tolist()}
    missing = sorted({test.classes[i] for i in test.labels.unique().tolist()} - present)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"The test images have classes that no training image has: {shown}. {who} can never name them; "
            f"class folders must be called the same in both sets."
        )
    return torch.tensor([train.classes.index(name) if name in train.classes else -1 for name in test.classes])[test.labels]


@contextlib.contextmanager
def eval_mode(functions: Iterable[FeatureFunction]) -> Iterator[None]:
    """Put the modules behind `functions` into eval mode: a student in training would drop paths and move its batch statistics."""
    owners = [function if isinstance(function, nn.Module) else getattr(function, "__self__", None) for function in functions]
    before = {module: module.training for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()}
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def feature_batches(
    functions: Mapping[str, FeatureFunction],
    images: LabelledImages,
    *,
    device: torch.device | str,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    num_workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    keep_images: bool = False,
    first_batch: int = 0,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yields (readable [b], {name: features [b, ...] float32 on the CPU}) of this rank's images, batch by batch, from `first_batch` on.

    `extract` describes the arguments. Between two batches the networks are as they were before.
    """
    device = torch.device(device)
    scale = (1 / (255 * torch.tensor(std, device=device))).view(3, 1, 1)
    shift = (torch.tensor(mean, device=device) / torch.tensor(std, device=device)).view(3, 1, 1)
    for pixels, flags in images.batches(batch_size, num_workers, keep=keep_images, first_batch=first_batch):
        autocast = torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
        with eval_mode(functions.values()), autocast:
            batch = pixels.to(device, non_blocking=True).float().mul_(scale).sub_(shift)
            batch = batch.contiguous(memory_format=torch.channels_last)
            columns = {name: _checked(function(batch), len(batch)) for name, function in functions.items()}
        yield flags, columns


def extract(
    functions: Mapping[str, FeatureFunction],
    images: LabelledImages,
    *,
    device: torch.device | str,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    num_workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    keep_images: bool = False,
) -> dict[str, Features]:
    """Features of `images` under each of `functions`, in one pass over the images.

    Unreadable images are left out and named. Where `images` is sharded this is a collective call, and every rank gets the features of
    all images.

    Args:
        mean, std: of the normalisation, in the range 0 to 1.
        batch_size: images at a time, on this rank.
        num_workers: processes that decode; 0: this one. They are not forked from this process (`worker_arguments`), so that a script of
            your own must begin its work under ``if __name__ == "__main__":``. Before Python 3.12.8 each of them imports that script anew:
            what it imports outside of that condition is paid for at every pass.
        amp_dtype: autocast to this type; None: none.
        keep_images: hold the decoded images in memory for the next call.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in functions}
    readable = []
    arguments = dict(mean=mean, std=std, batch_size=batch_size, num_workers=num_workers, amp_dtype=amp_dtype, keep_images=keep_images)
    for flags, batch in feature_batches(functions, images, device=device, **arguments):
        readable.append(flags)
        for name, features in batch.items():
            columns[name].append(features)
    mask = _gather(torch.cat(readable).to(torch.uint8), images, device).bool()
    if not mask.any():
        raise ValueError(f"None of the {len(mask)} images of {images.source.path} can be read; run `massl-fast data check` on it.")
    names = tuple(images.source.name(int(i)) for i in images.positions[~mask])
    return {
        name: Features(
            features=_gather(torch.cat(column), images, device)[mask],
            labels=images.labels[mask],
            indices=images.positions[mask],
            classes=tuple(images.source.classes),
            unreadable=names,
        )
        for name, column in columns.items()
    }


def extract_features(
    feature_function: FeatureFunction,
    source: Source,
    *,
    image_size: int,
    device: torch.device | str,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    num_workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    resize_ratio: float | None = None,
) -> Features:
    """Features of all readable images of a labelled source under one network; `LabelledImages` and `extract` describe the arguments."""
    images = LabelledImages(source, image_size, resize_ratio=resize_ratio)
    settings = dict(device=device, mean=mean, std=std, batch_size=batch_size, num_workers=num_workers, amp_dtype=amp_dtype)
    return extract({"features": feature_function}, images, **settings)["features"]


def _checked(features: Tensor, num_images: int) -> Tensor:
    if features.ndim not in (2, 3) or len(features) != num_images:
        raise ValueError(
            f"The network gives features of shape {tuple(features.shape)} for {num_images} images; evaluation needs one vector per image. "
            f"Choose a network with pooled features."
        )
    return features.float().cpu()


def raw_pixels(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] -> [N, 3·S·S]: averaged down to S = min(H, 32) pixels a side, as they come (here: standardised per channel).

    The baseline below which a network has learned nothing.
    """
    side = min(RAW_PIXEL_SIDE, images.shape[-1])
    return F.adaptive_avg_pool2d(images, side).flatten(1)


def _gather(mine: Tensor, images: LabelledImages, device: torch.device | str) -> Tensor:
    """This rank's rows [m, ...] -> the rows of all images, in order, on the CPU."""
    return mine if images.world_size == 1 else gather_turns(mine, images.world_size, device)[: len(images.positions)]


def gather_turns(mine: Tensor, world_size: int, device: torch.device | str) -> Tensor:
    """Rows [m, ...] of every rank -> [world_size · m, ...] on the CPU: the first of every rank, the second of every rank, and so on."""
    mine = mine.to(device)
    parts = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(parts, mine)
    return torch.stack(parts, dim=1).flatten(0, 1).cpu()
