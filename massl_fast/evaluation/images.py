"""Images of any size on their way to a network: what a protocol does to them, in batches of one shape, shared among ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from massl_fast.data.decode import UnreadableImage, decode_rgb
from massl_fast.data.sources import FolderSource, Source
from massl_fast.data.torchvision_loader import worker_arguments

USUAL_SIDE = 224
Row = TypeVar("Row")
Geometry = Callable[[Image.Image, int], Image.Image]
"""(upright RGB image, its position in the source) → what the network sees. Picklable, for worker processes."""


def files_below(root: Path, names: Sequence[str]) -> Source:
    """Files of a layout as an unlabelled source; ``names`` are relative to ``root`` and were checked by the layout."""
    return FolderSource(str(root), names, None, ())


@dataclass(frozen=True)
class Square:
    """Squeezed to a square, whatever the ratio of the sides; bicubic with antialiasing."""

    side: int

    def __call__(self, image: Image.Image, position: int) -> Image.Image:
        return image if image.size == (self.side, self.side) else image.resize((self.side, self.side), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class LongerSide:
    """Reduced until the longer side is at most `most` pixels, by Lanczos's filter; never enlarged. `boxes` are cut out first."""

    most: int
    boxes: Sequence[tuple[float, float, float, float]] | None = None
    """Box of each position: left, top, right, bottom, pixels."""

    def __call__(self, image: Image.Image, position: int) -> Image.Image:
        if self.boxes is not None:
            image = image.crop(tuple(round(edge) for edge in self.boxes[position]))
        image = image.copy()
        image.thumbnail((self.most, self.most), Image.Resampling.LANCZOS)
        return image


@dataclass(frozen=True)
class AsItIs:
    def __call__(self, image: Image.Image, position: int) -> Image.Image:
        return image


class SizedImages(Dataset):
    """Images of a source after a geometry, this rank's share of them: ranks take turns.

    Attributes:
        unreadable: positions of images of this rank that could not be decoded, once `batches` has come to its end.
    """

    def __init__(
        self, source: Source, geometry: Geometry, *, positions: Sequence[int] | None = None, shard: tuple[int, int] = (0, 1)
    ) -> None:
        self.source, self.geometry, self.shard = source, geometry, shard
        self.positions = list(range(len(source))) if positions is None else [int(i) for i in positions]
        self.mine = self.positions[shard[0] :: shard[1]]
        self.unreadable: list[int] = []

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, item: int) -> tuple[int, Tensor | None]:
        """(position, uint8 [3, H, W], or None where the image cannot be read)."""
        position = self.mine[item]
        try:
            image = decode_rgb(self.source.read(position), self.source.name(position))
            pixels = np.array(self.geometry(image, position))
        except (UnreadableImage, OSError):
            return position, None
        return position, torch.from_numpy(pixels).permute(2, 0, 1)

    def batches(self, batch_size: int, num_workers: int = 0) -> Iterator[tuple[list[int], Tensor]]:
        """Yields (positions, uint8 [b, 3, H, W]). Images of one shape go together; `batch_size` is for 224 × 224 pixels, larger
        images go fewer at a time. The order is not that of the source where shapes differ.
        """
        self.unreadable = []
        workers = worker_arguments() if num_workers > 0 else {}
        loader = DataLoader(self, batch_size=None, num_workers=num_workers, generator=torch.Generator(), **workers)
        waiting: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for position, pixels in loader:
            if pixels is None:
                self.unreadable.append(position)
                continue
            height, width = pixels.shape[1:]
            rows = waiting.setdefault((height, width), [])
            rows.append((position, pixels))
            if len(rows) >= max(1, batch_size * USUAL_SIDE**2 // (height * width)):
                yield _stacked(waiting.pop((height, width)))
        for rows in waiting.values():
            yield _stacked(rows)

    def set_aside(self, positions: Sequence[int]) -> None:
        """These images of this rank could not be read, by somebody else than ``batches``."""
        self.unreadable = list(positions)

    def names_of_unreadable(self) -> tuple[str, ...]:
        """Names of the images of all ranks that could not be read, in the order of the source. With several ranks a collective call."""
        return tuple(self.source.name(position) for position in sorted(gathered(self.unreadable, self.shard)))


def _stacked(rows: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    return [position for position, _ in rows], torch.stack([pixels for _, pixels in rows])


def gathered(rows: list[Row], shard: tuple[int, int]) -> list[Row]:
    """The rows of all ranks, rank by rank. With several ranks a collective call; rows are pickled among the ranks of one run."""
    if shard[1] == 1:
        return list(rows)
    parts: list[Any] = [None] * shard[1]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def in_order(rows: list[tuple[int, Row]], shard: tuple[int, int]) -> list[tuple[int, Row]]:
    """(position, row) of all ranks by position, so that sums over them are the same whatever the number of ranks."""
    return sorted(gathered(rows, shard), key=lambda row: row[0])
