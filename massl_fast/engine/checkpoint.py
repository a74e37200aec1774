"""Checkpoints of a run: tensors in safetensors, everything else in JSON, complete or absent.

    checkpoints/
      step_00001000/        written as .step_00001000.partial, flushed to disk, then renamed
        state.safetensors     student/…, teacher/…, optimizer/<parameter>/<moment>, objective/memory, objective/pointer
        state.json            format, step, config, world_size, timm_args, best k-NN
      last                  the folder to resume from (one line)
      best                  the folder with the best k-NN (one line)

Nothing is unpickled, so a checkpoint from a stranger is data.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1


class CheckpointFolder:
    """The ``checkpoints`` folder of one run."""

    def __init__(self, folder: Path, keep_every_steps: int = 0):
        self.folder = folder
        self.keep_every_steps = keep_every_steps

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, best: bool = False) -> Path:
        """Write one checkpoint and make it the last one; ``best`` makes it the best one, too.

        Checkpoints that are neither last, best nor a multiple of ``keep_every_steps`` are removed afterwards, never before.
        """
        target = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # Views and tied tensors are not for safetensors: each entry is written contiguous and on its own.
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1), encoding="utf-8")
        for file in partial.iterdir():
            flush(file)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        flush(self.folder)
        self._point("last", target)
        if best:
            self._point("best", target)
        self._prune()
        return target

    def last(self) -> Path | None:
        """The newest complete checkpoint, or None. A folder that was cut off keeps its partial name and is not seen."""
        complete = sorted(p for p in self.folder.glob("step_*") if (p / "state.json").is_file() and (p / "state.safetensors").is_file())
        return complete[-1] if complete else None

    def best(self) -> Path | None:
        return self._pointed("best")

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
        kept = {self._pointed("last"), self._pointed("best")}
        for path in self.folder.glob("step_*"):
            step = int(path.name.removeprefix("step_"))
            if path not in kept and not (self.keep_every_steps and step % self.keep_every_steps == 0):
                shutil.rmtree(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, state) of a checkpoint folder. ValueError says what is missing or damaged."""
    path = Path(path)
    for name in ("state.json", "state.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a checkpoint of massl-fast: it has no {name}.")
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors")
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"The checkpoint {path} is damaged ({error}). Use an earlier one.") from None
    if state.get("format") != FORMAT:
        raise ValueError(f"The checkpoint {path} has format {state.get('format')!r}; this version reads format {FORMAT}.")
    return tensors, state


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries under ``prefix``, named without it."""
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}


def load_strictly(owner: str, into: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy ``tensors`` into ``into`` in place; every name and shape must match, or a ValueError names those that do not."""
    missing, unexpected = sorted(into.keys() - tensors.keys()), sorted(tensors.keys() - into.keys())
    differing = [
        f"{n} {tuple(tensors[n].shape)} for {tuple(into[n].shape)}"
        for n in into.keys() & tensors.keys()
        if tensors[n].shape != into[n].shape
    ]
    problems = [
        f"{label} {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
        for label, names in (("lacks", missing), ("has besides", unexpected), ("has other shapes:", differing))
        if names
    ]
    if problems:
        raise ValueError(
            f"The checkpoint is of another architecture: its {owner} {'; '.join(problems)}. Start it with the settings it was made with."
        )
    for name, tensor in into.items():
        tensor.copy_(tensors[name])


def flush(path: Path) -> None:
    """Have the operating system put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
