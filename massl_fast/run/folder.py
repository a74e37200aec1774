"""The folder of a run: made or moved aside by rank 0, there for all, and the checkpoint that the run goes on from."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import torch

from massl_fast.distributed.heartbeat import end_process
from massl_fast.distributed.world import World, restarted
from massl_fast.models.checkpoint_files import lacks_checksums, read_state
from massl_fast.run.checkpoint import CheckpointFolder
from massl_fast.run.lock import FolderLock

SHARED_FOLDER_SECONDS = 10


def prepare_folder(folder: Path, mode: str, checkpoints: CheckpointFolder, world: World) -> tuple[Path | None, FolderLock | None]:
    """Make the run folder; returns the checkpoint to resume from, if any, and the lock on the folder, to be released at the end.

    Rank 0 decides and holds the lock (None on others), so that all ranks start from the same checkpoint. ``mode``: the setting run.resume.
    Raises ValueError where the folder cannot be made, is in use, or is not there for every rank. A collective call.
    """
    last, problem, lock = None, None, None
    if world.is_main:
        try:
            lock = _locked(folder, mode, world)
            last = checkpoints.last_intact()
            if last and lacks_checksums(read_state(last)):
                print(
                    f"massl-fast train: {last} carries no checksums (format 1): damage to its weights would not be noticed.",
                    file=sys.stderr,
                )
        except ValueError as error:
            problem = str(error)
    last, problem = world.from_main((last, problem))
    if problem:
        raise ValueError(problem)
    try:
        _demand_shared(last or folder, world)
        if mode == "must" and last is None:
            raise ValueError(f"run.resume is must, but {folder}/checkpoints holds no complete checkpoint. Choose auto to start anew.")
    except ValueError:
        with lock or contextlib.nullcontext():
            raise
    return last, lock


def _locked(folder: Path, mode: str, world: World) -> FolderLock:
    """The folder, there and locked; with ``never`` an old run is moved aside first, unless somebody works in it."""

    def lock() -> FolderLock:
        made = FolderLock(folder, world.meeting, world.round, on_loss=end_process)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made.acquire()
        except OSError as error:
            place = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
            raise ValueError(
                f"run.folder {folder} cannot be made or locked: {error.strerror}{place}. Name a place that can be written."
            ) from None
        return made

    held = lock()
    # Started again by torchrun or Slurm, the run goes on: only a person starts over.
    if mode == "never" and not restarted(world) and (folder / "config.yaml").is_file():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        held.rename_folder(aside)
        held = lock()
    return held


def _demand_shared(path: Path, world: World) -> None:
    """What rank 0 has made must be there for all ranks; network file systems may show it a little later."""
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not path.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    absent = torch.tensor(0.0 if path.is_dir() else 1.0, device=world.device)
    if world.sum(absent).item():
        raise ValueError(
            f"{path}, which rank 0 has made, is not there for every rank. Put run.folder on a file system that all hosts share."
        )
