"""What a loader is: the contract that training, benchmarks and tests rely on, and what all loaders share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from massl_fast.config import Config
from massl_fast.config.sections import Section
from massl_fast.data.bad_files import BadFiles
from massl_fast.data.crops import View
from massl_fast.data.order import Batch, Order
from massl_fast.data.sources import Source

REPLACEMENTS = 100  # images tried in place of one that cannot be read
JUDGE_AFTER = 1000  # images seen before the share of unreadable ones can end a run


class Loader(ABC):
    """An endless, seekable source of micro-batches. A subclass gives ``name``, ``_batches`` and, where it has settings, ``own_arguments``.

    ``batches(start_step)`` depends on (seed, start_step, rank, world size) alone: not on workers, not on what was loaded before.
    An unreadable image is named once in ``bad_files_path`` and replaced by another, which its own number and epoch decide.

    Args:
        source: where the images are; ``self.source`` is the same without those named in ``bad_files``.
        views: what each crop undergoes, in the order of ``Batch.crops``.
        seed: of the order of images and of every augmentation.
        global_batch, device_batch, accumulation, rank, world_size: global_batch = world_size · accumulation · device_batch.
        num_workers: processes or threads, as the loader says. prefetch: micro-batches that it works ahead.
        max_bad_percent: share of unreadable images that ends the run with a ValueError.
        device: where the crops go.
        reason: why this loader was chosen, for the banner.

    Raises ValueError for a batch that does not divide or is larger than the source.
    """

    name: str
    Settings: type[Section] = Section
    """The model of ``data.loader_settings``."""
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        seed: int,
        global_batch: int,
        device_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        bad_files: Collection[str] = (),
        max_bad_percent: float = 5.0,
        bad_files_path: str | os.PathLike | None = None,
        device: torch.device | str = "cpu",
        reason: str = "",
    ) -> None:
        self.source = source.without(bad_files)
        self.views = tuple(views)
        self.order = Order(
            len(self.source),
            seed=seed,
            global_batch=global_batch,
            device_batch=device_batch,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            path=source.path,
        )
        self.seed, self.device_batch = seed, device_batch
        self.steps_per_epoch = self.order.steps_per_epoch
        images_per_epoch = self.steps_per_epoch * accumulation * device_batch
        self.bad = BadFiles(source.path, bad_files_path, max_bad_percent, min(JUDGE_AFTER, images_per_epoch))
        self.num_workers, self.prefetch = num_workers, prefetch
        self.device = torch.device(device)
        self.reason = reason
        self._running: Iterator[Batch] | None = None

    @classmethod
    def own_arguments(cls, config: Config, device: torch.device) -> dict[str, Any]:
        """Keyword arguments beyond those above, from the settings."""
        return {}

    @property
    def num_bad(self) -> int:
        """Different unreadable images that this process has met."""
        return len(self.bad.names)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Micro-batches from ``start_step`` on, ``accumulation`` of them per step, without end."""
        self.close()
        self._running = self._batches(start_step)
        return self._running

    def close(self) -> None:
        """Ends worker processes and threads and frees their buffers."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]  # a generator
            self._running = None

    @abstractmethod
    def _batches(self, start_step: int) -> Iterator[Batch]:
        """A generator behind ``batches``; what it holds is freed where it is closed."""
