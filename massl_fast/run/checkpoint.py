"""Checkpoints of a run: tensors in safetensors, everything else in JSON, complete or absent.

    checkpoints/
      step_00001000/        written as .step_00001000.partial, flushed to disk, then renamed
        state.safetensors     student/…, teacher/…, optimizer/<parameter>/<moment>, objective/memory, objective/pointer
        state.json            its checksum, format, step, config, world_size, timm_args, best k-NN, checksums of the tensors
      last                  the folder to resume from (one line)
      best                  the folder with the best k-NN (one line)

Nothing is unpickled, so a checkpoint from a stranger is data. The layout does not depend on how many processes wrote it or how the
parameters were sharded: tensors are whole, and each rank reads the slices it needs. models.checkpoint_files has the two files and the
checksums in them.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as distributed_checkpoint
from safetensors import SafetensorError
from torch import Size, Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from massl_fast.models.checkpoint_files import FILES, damage_of, read_state, read_tensors, shapes_of, write_files


class CheckpointFolder:
    """The ``checkpoints`` folder of one run. ``keep_last`` and ``keep_every_steps`` say what stays (see ``CheckpointSection``)."""

    def __init__(self, folder: Path, keep_every_steps: int = 0, keep_last: int = 1):
        self.folder = folder
        self.keep_every_steps, self.keep_last = keep_every_steps, keep_last
        self._passed_over: list[str] = []

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, best: bool = False) -> Path:
        """Write one checkpoint and make it the last one; ``best`` makes it the best one, too.

        Old checkpoints are removed afterwards, never before. OSError where the disk refuses; what was begun is then taken back, so that a
        full disk gets its space again.
        """
        target = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            # Views and tied tensors are not for safetensors: each entry is written contiguous and on its own.
            whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            write_files(partial, whole, {"step": step, **state})
            for file in partial.iterdir():
                flush(file)
            if target.exists():
                shutil.rmtree(target)
            os.replace(partial, target)
        except SafetensorError as error:  # holds what the operating system said as text: "… (os error 28)"
            shutil.rmtree(partial, ignore_errors=True)
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(0, str(error))) from None
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        flush(self.folder)
        self._point("last", target)
        if best:
            self._point("best", target)
        self._prune()
        return target

    def last(self) -> Path | None:
        """The newest whole checkpoint by the names and lengths of its files, or None: for sentences, since no weight is read."""
        return next((path for path in reversed(self._folders()) if why_not_whole(path) is None), None)

    def last_intact(self) -> Path | None:
        """The newest checkpoint of which every byte is as it was written, or None; one that was cut off or damaged is passed over."""
        self._passed_over = []
        for path in reversed(self._folders()):
            damage = damage_of(path)
            if damage is None:
                return path
            self._passed_over.append(f"The checkpoint {path} is passed over: {damage.removesuffix('.')}.")
        return None

    def passed_over(self) -> list[str]:
        """A sentence for each checkpoint that ``last_intact`` passed over."""
        return self._passed_over

    def best(self) -> Path | None:
        return self._pointed("best")

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))

    def _pointed(self, name: str) -> Path | None:
        pointer = self.folder / name
        if not pointer.is_file():
            return None
        # Only the last part counts: a pointer never leads out of the folder.
        target = self.folder / Path(pointer.read_text(encoding="utf-8").strip()).name
        return target if target.is_dir() else None

    def _point(self, name: str, target: Path) -> None:
        temporary = self.folder / f".{name}.partial"
        temporary.write_text(target.name + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / name)

    def _prune(self) -> None:
        folders = self._folders()
        kept = {self._pointed("last"), self._pointed("best"), *folders[-self.keep_last :]}
        for path in folders:
            step = int(path.name.removeprefix("step_"))
            if path not in kept and not (self.keep_every_steps and step % self.keep_every_steps == 0):
                shutil.rmtree(path)


def why_not_whole(path: Path) -> str | None:
    """What a checkpoint folder lacks, or None. Reads no weights: the header of a safetensors file says how long the file must be."""
    for name in FILES:
        if not (path / name).is_file():
            return f"it has no {name}"
    try:
        read_state(path)
        shapes_of(path)
    except ValueError as error:
        return str(error)
    return None


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, state) of a checkpoint folder. ValueError says what is missing or damaged."""
    state = read_state(path)
    return dict(read_tensors(path, state)), state


def read_into(path: Path, targets: dict[str, Tensor]) -> None:
    """Fill ``targets`` in place from a checkpoint that has all of them; of a sharded tensor each rank reads its own slice.

    No collective call: any number of processes may read, each by itself.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        distributed_checkpoint.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def with_prefix(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The entries under ``prefix``, named without it."""
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}


def demand_same(owner: str, ours: dict[str, Size], theirs: dict[str, Size]) -> None:
    """ValueError naming the entries of ``owner`` whose names or shapes in a checkpoint (``theirs``) are not what they are here."""
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    differing = [f"{n} {tuple(theirs[n])} for {tuple(ours[n])}" for n in sorted(ours.keys() & theirs.keys()) if theirs[n] != ours[n]]
    problems = [
        f"{label} {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
        for label, names in (("lacks", missing), ("has besides", unexpected), ("has other shapes:", differing))
        if names
    ]
    if problems:
        raise ValueError(
            f"The checkpoint is of another architecture: its {owner} {'; '.join(problems)}. Start it with the settings it was made with."
        )


def load_strictly(owner: str, into: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy ``tensors`` into ``into`` in place; every name and shape must match, or a ValueError names those that do not."""
    demand_same(owner, {n: t.shape for n, t in into.items()}, {n: t.shape for n, t in tensors.items()})
    for name, tensor in into.items():
        tensor.copy_(tensors[name])


def flush(path: Path) -> None:
    """Have the operating system put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
