"""Processes and devices: who this rank is, how ranks talk, and how the student is replicated."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows [n, D] of every rank, in rank order: [size·n, D]."""
        if self.size == 1:
            return rows
        gathered = rows.new_empty(self.size * rows.shape[0], rows.shape[1])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    def all_true(self, flag: Tensor) -> Tensor:
        """Whether a bool 0-d tensor is true on every rank; stays on the device."""
        if self.size == 1:
            return flag
        value = flag.to(torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return value.bool()

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a tensor over ranks."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module as one of equal replicas whose gradients are averaged (DistributedDataParallel), or itself in one process."""
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )

    def describe(self) -> str:
        return f"rank {self.rank} of {self.size} on {socket.gethostname()}, {device_name(self.device)}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU ({torch.get_num_threads()} threads)"


def join_world(device: str = "auto", timeout_seconds: float = 600) -> World:
    """Join the processes started by torchrun or srun; without either, be the only one.

    ``device``: auto, cuda or cpu. NCCL joins GPUs, gloo joins CPUs.
    """
    environment = os.environ
    if "RANK" in environment:
        rank, size, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    elif int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        rank, size, local_rank = (int(environment[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
        if "MASTER_ADDR" not in environment:
            raise ValueError(
                "srun started several tasks, but MASTER_ADDR is not set. Set it to the first host's name (and MASTER_PORT to a free port) "
                "in the job script, as in docs/cluster.md."
            )
        environment.setdefault("MASTER_PORT", "29500")
        environment.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    else:
        rank, size, local_rank = 0, 1, 0
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is cuda, but PyTorch finds no GPU here. Choose auto or cpu.")
    if device != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"This host runs at least {local_rank + 1} processes but has {torch.cuda.device_count()} GPUs. "
                f"Start one process a GPU (torchrun --nproc-per-node {torch.cuda.device_count()})."
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds))
    return World(rank, size, local_rank, chosen)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_map(world: World) -> list[str]:
    """One line a rank: where it runs and on what."""
    if world.size == 1:
        return [device_name(world.device)]
    lines: list[str | None] = [None] * world.size
    dist.all_gather_object(lines, world.describe())
    return lines
