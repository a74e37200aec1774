"""The torchvision path: worker processes decode and augment with Pillow, NumPy and PyTorch's uint8 resize.

Crops leave the workers as uint8, a quarter of the size, and become normalised floats on the device they are for.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from multiprocessing import forkserver, resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from massl_fast.config import Config
from massl_fast.data.crops import Drawn, View, color_, draw, largest_reduction, normalize, resize, sample_generator
from massl_fast.data.decode import UnreadableImage
from massl_fast.data.loader import REPLACEMENTS, Loader
from massl_fast.data.order import Batch
from massl_fast.data.pixels import Pixels
from massl_fast.data.sources import Source


class TorchvisionLoader(Loader):
    """``num_workers``: processes; 0 loads in this one. ``prefetch``: micro-batches that each of them works ahead.

    ``pin_memory``: page-locked host memory, which lets a copy to a GPU overlap with its work. The rest, and what is raised: ``Loader``;
    ValueError, too, where shared memory is too small.
    """

    name = "torchvision"

    def __init__(self, source: Source, views: Sequence[View], *, pin_memory: bool = False, **shared: Any) -> None:
        super().__init__(source, views, **shared)
        self.pin_memory = pin_memory
        self._micro_batches = _MicroBatches(self.source, self.views, self.seed)
        if self.num_workers > 0:
            self._demand_shared_memory()

    @classmethod
    def own_arguments(cls, config: Config, device: torch.device) -> dict[str, Any]:
        return {"pin_memory": device.type == "cuda"}

    def _batches(self, start_step: int) -> Iterator[Batch]:
        workers = worker_arguments() | {"prefetch_factor": self.prefetch} if self.num_workers > 0 else {}
        loaded = iter(
            DataLoader(
                self._micro_batches,
                batch_size=None,  # an item is a whole micro-batch
                sampler=_Keys(self.order.micro_batches(start_step)),
                num_workers=self.num_workers,
                collate_fn=_as_it_is,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),  # its own: the global one belongs to the training
                **workers,
            )
        )
        try:
            for indices, groups, bad, failure in loaded:
                self.bad.count(len(indices) + len(bad), bad)
                if failure:
                    raise ValueError(failure)
                yield Batch(self._crops(groups), indices)
        finally:
            del loaded

    def _crops(self, groups: list[torch.Tensor]) -> list[torch.Tensor]:
        crops: list[torch.Tensor] = [None] * len(self.views)
        for members, values in zip(self._micro_batches.groups, groups):
            values = values.to(self.device, non_blocking=True)
            normalized = normalize(values.flatten(0, 1), self.views[members[0]])
            for view, crop in zip(members, normalized.chunk(len(members))):
                crops[view] = crop
        return crops

    def _demand_shared_memory(self) -> None:
        try:
            status = os.statvfs("/dev/shm")
        except OSError:
            return  # Not every system keeps shared memory there.
        image = sum(3 * view.size**2 for view in self.views)
        needed, free = image * self.device_batch * self.num_workers * (self.prefetch + 1), status.f_bavail * status.f_frsize
        if needed > free:
            raise ValueError(
                f"{self.num_workers} loader processes need {needed / 2**20:.0f} MiB of shared memory, /dev/shm has {free / 2**20:.0f} MiB "
                "left. Give a container more (--shm-size), or set fewer data.num_workers."
            )


def worker_arguments() -> dict[str, Any]:
    """How a DataLoader starts its worker processes, as arguments of it; for one that has any.

    Not fork: a copy of a process that holds CUDA, DALI or OpenMP threads may lock up. The server that workers fork from imports once
    what they need, for all loaders of the process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "massl_fast.data.worker_server"])
    # Both start before there is anything to load, with a scheduler's signals blocked, which they and all workers inherit: the server takes
    # seconds to import what it needs, and a signal meanwhile would end it. The tracker comes first, because starting it opens them again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return {"multiprocessing_context": context, "worker_init_fn": _prepare_worker}


class _Keys:
    """A sampler of the DataLoader that is its own, single iteration."""

    def __init__(self, keys: Iterable) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator:
        return iter(self._keys)


class _MicroBatches(Dataset):
    """From (epoch, image numbers) to uint8 crops; what runs in a worker.

    Views of one size and normalisation travel together: ``groups`` holds their numbers.
    """

    def __init__(self, source: Source, views: Sequence[View], seed: int) -> None:
        self.source, self.views, self.seed = source, tuple(views), seed
        kind = {n: (view.size, view.mean, view.std) for n, view in enumerate(views)}
        self.groups = [list(members) for _, members in groupby(sorted(kind, key=lambda n: (kind[n], n)), key=kind.get)]
        self._unreadable: dict[int, str] = {}

    def __getitem__(self, key: tuple[int, np.ndarray]):
        """indices [N], a uint8 tensor [views, N, 3, S, S] a group, (name, reason) of unreadable images, a sentence if all failed."""
        epoch, wanted = key
        indices, bad = wanted.copy(), []
        arrays = [np.empty((len(g), len(wanted), 3, *[self.views[g[0]].size] * 2), np.uint8) for g in self.groups]
        drawn: list[list[list[Drawn]]] = [[[] for _ in g] for g in self.groups]
        for n, index in enumerate(wanted.tolist()):
            found = self._load(epoch, index, bad)
            if found is None:
                return (
                    torch.from_numpy(indices),
                    [],
                    bad,
                    (
                        f"{REPLACEMENTS} images of {self.source.path} that were tried one after another cannot be read; "
                        f"the last was {bad[-1][0]}: {bad[-1][1]}. Look at the data with massl-fast data check."
                    ),
                )
            indices[n], pixels, draws = found
            for group, array, lists in zip(self.groups, arrays, drawn):
                for row, view in enumerate(group):
                    array[row, n] = resize(pixels, draws[view])
                    lists[row].append(draws[view])
        for array, lists in zip(arrays, drawn):
            color_(array.reshape(-1, *array.shape[2:]), [d for row in lists for d in row])
        return torch.from_numpy(indices), [torch.from_numpy(a) for a in arrays], bad, None

    def _load(self, epoch: int, index: int, bad: list[tuple[str, str]]) -> tuple[int, torch.Tensor, list[Drawn]] | None:
        """The image, its pixels, uint8 [H, W, 3], and the draws of its views, or those of the first readable replacement."""
        wanted, generator = index, None
        for _ in range(1 + REPLACEMENTS):
            reason = self._unreadable.get(index)
            if reason is None:
                try:
                    image = Pixels(self.source.read(index), self.source.name(index))
                    views = sample_generator(self.seed, epoch, wanted)
                    draws = [draw(view, views, image.width, image.height) for view in self.views]
                    return index, image.decode(largest_reduction(draws)), draws
                except UnreadableImage as error:
                    reason = error.reason
                except OSError as error:
                    reason = error.strerror or str(error)
                self._unreadable[index] = reason
            bad.append((self.source.name(index), reason))
            generator = generator or sample_generator(self.seed, epoch, index, stream=1)
            index = int(generator.integers(len(self.source)))
        return None


def _as_it_is(item):
    return item


def _prepare_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach every process of the job: the main one is to finish its step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A main process that is killed outright would leave its workers waiting for ever: their own parent, the fork server, lives on
    # as long as they do.
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
