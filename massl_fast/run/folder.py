"""The folder of a run: made or moved aside by rank 0, there for all, and the checkpoint that the run goes on from."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from massl_fast.distributed.world import World, restarted
from massl_fast.run.checkpoint import CheckpointFolder

SHARED_FOLDER_SECONDS = 10


def prepare_folder(folder: Path, mode: str, checkpoints: CheckpointFolder, world: World) -> Path | None:
    """Make the run folder; returns the checkpoint to resume from, if any. Rank 0 decides, so that all ranks start from the same one.

    ``mode``: the setting run.resume. Raises ValueError where the folder cannot be made or is not there for every rank. A collective call.
    """
    last = None
    if world.is_main:
        # Started again by torchrun or Slurm, the run goes on: only a person starts over.
        if mode == "never" and not restarted(world) and (folder / "config.yaml").is_file():
            number = 1
            while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(aside)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run.folder {folder} cannot be made: {error.strerror}. Name a place that can be written.") from None
        last = checkpoints.last_intact()
    last = world.from_main(last)
    _demand_shared(last or folder, world)
    if mode == "must" and last is None:
        raise ValueError(f"run.resume is must, but {folder}/checkpoints holds no complete checkpoint. Choose auto to start anew.")
    return last


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
