"""Features on disk: extracted once, found again by what they depend on, whole or absent.

A set of features depends on the network's weights, the images, the way they were cut and normalised, the recipe and the precision. A
hash of all that names its folder, so the same weights in another file find it, and anything else does not:

    DIR/<hash>/features.npy    [n, C] ([n, h·w, C] for patches), readable images only, in the order of the source
               labels.npy      [n] int64
               indices.npy     [n] int64: positions in the source
               names.txt       n lines; a backslash or a line break in a name is written \\\\ or \\n
               meta.json       what they depend on, and the names of unreadable images

The folder is written as <hash>.partial and renamed at the end. An extraction that was interrupted goes on from the last rows that it noted
there, at the beginning of a batch, so that the features are those of an unbroken one. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from massl_fast.evaluation.features import FeatureFunction, Features, LabelledImages, feature_batches, gather_turns

FORMAT = 1
NOTE_SECONDS = 20
"""Longest time whose work an interruption costs."""
DTYPES = {"fp32": np.float32, "fp16": np.float16}


def weights_hash(function: FeatureFunction) -> str:
    """A hash of a network's weights, buffers and layout; for a plain function, of its name."""
    if not isinstance(function, nn.Module):
        return f"function {function.__name__}"
    network = getattr(function, "network", function)
    found = hashlib.sha256(json.dumps(getattr(network, "timm_args", type(network).__name__), sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class FeatureStore:
    """Features under ``folder``.

    Attributes:
        folder: made where it is not there. With several ranks all of them must see it.
        dtype: format on disk, fp32 or fp16. fp16 halves the size and rounds to 11 bits; features beyond its range are refused.
        quiet: no progress bar.
    """

    folder: Path
    dtype: str = "fp32"
    quiet: bool = False

    def features(
        self, functions: Mapping[str, FeatureFunction], images: LabelledImages, *, recipe: str, precision: str, **extraction: Any
    ) -> dict[str, Features]:
        """What ``features.extract`` returns, of which as much as possible from the disk; the rest in one pass, and kept.

        ``extraction``: further arguments of ``feature_batches``. With several ranks a collective call. The tensors are mapped from the
        disk, not read; changes to them do not reach it.
        """
        common = {
            "format": FORMAT,
            "source": images.source.stamp(),
            "geometry": images.geometry(),
            "recipe": recipe,
            "precision": precision,
            "mean": list(extraction["mean"]),
            "std": list(extraction["std"]),
            "dtype": self.dtype,
        }
        metas = {name: {**common, "weights": weights_hash(function)} for name, function in functions.items()}
        missing = {name: meta for name, meta in metas.items() if not self._place(meta).is_dir()}
        if images.world_size > 1:
            dist.barrier()  # before anybody writes, all have looked
        # Two networks with the same weights are one.
        once = {self._place(meta): name for name, meta in missing.items()}
        if once:
            with self._locked(once):
                self._extract({name: functions[name] for name in once.values()}, metas, images, extraction)
        return {name: self._read(meta, images) for name, meta in metas.items()}

    def _place(self, meta: Mapping[str, Any]) -> Path:
        return self.folder / hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:32]

    @contextlib.contextmanager
    def _locked(self, places: Mapping[Path, str]) -> Iterator[None]:
        """No other process writes to the same folders meanwhile; ValueError where one does."""
        with contextlib.ExitStack() as stack:
            if _is_main():
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    for place in sorted(places):
                        lock = stack.enter_context(open(place.with_suffix(".lock"), "w", encoding="utf-8"))
                        stack.callback(place.with_suffix(".lock").unlink, missing_ok=True)
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    stack.pop_all()  # the lock file is the other's
                    raise ValueError(
                        f"Another process is extracting the same features into {self.folder}. Wait for it, or name another --cache."
                    ) from None
                except OSError as error:
                    raise self._refused(error) from None
            yield

    def _extract(
        self,
        functions: Mapping[str, FeatureFunction],
        metas: Mapping[str, Mapping[str, Any]],
        images: LabelledImages,
        extraction: dict[str, Any],
    ) -> None:
        step = extraction["batch_size"] * images.world_size
        writers = {name: _Writer(self._place(metas[name]), len(images.positions), DTYPES[self.dtype]) for name in functions}
        starts = [writer.rows_noted() // step for writer in writers.values()] if _is_main() else []
        first = min(starts, default=0)
        if images.world_size > 1:
            shared = torch.tensor([first], device=extraction["device"])
            dist.broadcast(shared, 0)
            first = int(shared)
        try:
            with progress(f"features of {images.source.path}", len(images.positions), first * step, quiet=self.quiet) as advance:
                row = first * step
                for flags, columns in feature_batches(functions, images, first_batch=first, **extraction):
                    readable, columns = _of_all_ranks(flags, columns, images, extraction["device"], row)
                    if _is_main():
                        for name, writer in writers.items():
                            writer.write(row, columns[name], readable)
                    row += len(readable)
                    advance(len(readable))
            if _is_main():
                for name, writer in writers.items():
                    writer.finish(metas[name], images)
        except OSError as error:
            raise self._refused(error) from None
        finally:
            for writer in writers.values():
                writer.note()
        if images.world_size > 1:
            dist.barrier()

    def _refused(self, error: OSError) -> ValueError:
        return ValueError(f"Features cannot be kept in {self.folder}: {error.strerror or error}. Make room, or name another --cache.")

    def _read(self, meta: Mapping[str, Any], images: LabelledImages) -> Features:
        place = self._place(meta)
        try:
            found = json.loads((place / "meta.json").read_text(encoding="utf-8"))
            arrays = [np.load(place / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in ("features", "labels", "indices")]
            if {name: found[name] for name in meta} != dict(meta) or len({len(array) for array in arrays}) != 1:
                raise ValueError("its parts do not belong together")
            unreadable = tuple(found["unreadable"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The features kept in {place} are damaged ({error}). Delete that folder, and they are made anew.") from None
        features, labels, indices = map(torch.from_numpy, arrays)
        return Features(features, labels, indices, tuple(images.source.classes), unreadable)


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def progress(title: str, total: int, done: int = 0, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the time left, where rank 0 writes to a terminal; yields how to move it on."""
    console = Console(stderr=True, quiet=quiet or not _is_main() or not sys.stderr.isatty())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda more: bar.advance(task, more)


def _of_all_ranks(
    flags: Tensor, columns: Mapping[str, Tensor], images: LabelledImages, device: torch.device | str, row: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """One batch of every rank, put together in the order of the source and without the images that fill up the last turn."""
    most = len(images.positions) - row
    if images.world_size == 1:
        return flags[:most], {name: column[:most] for name, column in columns.items()}
    together = {name: gather_turns(column, images.world_size, device)[:most] for name, column in columns.items()}
    return gather_turns(flags.to(torch.uint8), images.world_size, device).bool()[:most], together


class _Writer:
    """The rows of one set of features on their way to the disk."""

    def __init__(self, place: Path, rows: int, dtype: type) -> None:
        self.place, self.rows, self.dtype = place, rows, dtype
        self.partial = place.with_suffix(".partial")
        self.features: np.memmap | None = None
        self.readable: np.memmap | None = None
        self.written = 0
        self.last_note = time.monotonic()

    def rows_noted(self) -> int:
        """How many rows an interrupted extraction has left behind; opens them. 0 where there are none that fit."""
        try:
            noted = int(json.loads((self.partial / "progress.json").read_text(encoding="utf-8"))["rows"])
            features = np.load(self.partial / "features.npy", mmap_mode="r+", allow_pickle=False)
            readable = np.load(self.partial / "readable.npy", mmap_mode="r+", allow_pickle=False)
            if not 0 < noted <= self.rows or len(features) != self.rows or features.dtype != self.dtype or readable.shape != (self.rows,):
                return 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        self.features, self.readable = features, readable
        return noted

    def write(self, row: int, features: Tensor, readable: Tensor) -> None:
        with np.errstate(over="ignore"):  # what overflows is refused below
            rows = features.numpy().astype(self.dtype)
        broken = ~np.isfinite(rows.reshape(len(rows), -1)).all(1) & readable.numpy() & np.isfinite(features.flatten(1).numpy()).all(1)
        if broken.any():
            raise ValueError(
                f"Features of {int(broken.sum())} images exceed the range of fp16 ({np.finfo(np.float16).max:g}). "
                f"Keep them as --cache-dtype fp32."
            )
        if self.features is None or self.features.shape[1:] != rows.shape[1:]:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            self.features = np.lib.format.open_memmap(self.partial / "features.npy", "w+", self.dtype, (self.rows, *rows.shape[1:]))
            self.readable = np.lib.format.open_memmap(self.partial / "readable.npy", "w+", np.bool_, (self.rows,))
        self.features[row : row + len(rows)], self.readable[row : row + len(rows)] = rows, readable.numpy()
        self.written = row + len(rows)
        if time.monotonic() - self.last_note > NOTE_SECONDS:
            self.note()

    def note(self) -> None:
        """Write down how far the rows have reached the disk, unless all is done."""
        if self.written and self.partial.is_dir():
            self.features.flush()
            self.readable.flush()
            temporary = self.partial / "progress.new"
            temporary.write_text(json.dumps({"rows": self.written}), encoding="utf-8")
            os.replace(temporary, self.partial / "progress.json")
            self.last_note = time.monotonic()

    def finish(self, meta: Mapping[str, Any], images: LabelledImages) -> None:
        mask = np.asarray(self.readable)
        source, positions = images.source, images.positions.numpy()
        if not mask.any():
            shutil.rmtree(self.partial)
            raise ValueError(f"None of the {len(mask)} images of {source.path} can be read; run `massl-fast data check` on it.")
        if not mask.all():
            self._leave_out(mask)
        self.features.flush()
        np.save(self.partial / "labels.npy", images.labels.numpy()[mask])
        np.save(self.partial / "indices.npy", positions[mask])
        names = (source.name(int(i)).replace("\\", "\\\\").replace("\n", "\\n") for i in positions[mask])
        (self.partial / "names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8", errors="surrogateescape")
        unreadable = [source.name(int(i)) for i in positions[~mask]]
        (self.partial / "meta.json").write_text(json.dumps({**meta, "unreadable": unreadable}, indent=1), encoding="utf-8")
        for left in ("readable.npy", "progress.json"):
            (self.partial / left).unlink(missing_ok=True)
        os.replace(self.partial, self.place)

    def _leave_out(self, mask: np.ndarray, chunk: int = 4096) -> None:
        """Only the rows of readable images stay, in a file of their own size."""
        kept = np.flatnonzero(mask)
        shape = (len(kept), *self.features.shape[1:])
        whole = np.lib.format.open_memmap(self.partial / "whole.npy", "w+", self.dtype, shape)
        for start in range(0, len(kept), chunk):
            whole[start : start + chunk] = self.features[kept[start : start + chunk]]
        whole.flush()
        os.replace(self.partial / "whole.npy", self.partial / "features.npy")
        self.features = whole
