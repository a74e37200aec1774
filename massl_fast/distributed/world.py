"""Processes and devices: who this rank is, how ranks talk, and how the student is spread over them."""

from __future__ import annotations

import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

# NCCL's own watchdog tears a process down without a word; it gets this much longer, so that the heartbeat speaks first.
NCCL_EXTRA_SECONDS = 60
MAX_RANK_LINES = 16


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
        gathered = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over ranks; stays on the device."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a tensor over ranks; stays on the device."""
        return self.sum(values) / self.size

    def from_main(self, value: Any) -> Any:
        """What rank 0 holds (a plain value), on every rank. Waits for the device."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module as one of equal replicas whose gradients are averaged (DistributedDataParallel).

        In one process, and where the module is sharded (fully_shard sees to its gradients), the module itself.
        """
        if self.size == 1 or isinstance(module, FSDPModule):
            return module
        with warnings.catch_warnings():
            # Of newer releases, which would rename it; what they offer instead older ones do not know.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return nn.parallel.DistributedDataParallel(
                module,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )

    def describe(self) -> tuple[str, str]:
        """(host, device) of this rank."""
        return socket.gethostname(), device_name(self.device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU ({torch.get_num_threads()} threads)"


def join_world(device: str = "auto", timeout_seconds: float = 600) -> World:
    """Join the processes started by torchrun or srun; without either, be the only one.

    ``device``: auto, cuda or cpu. NCCL joins GPUs, gloo joins CPUs.
    """
    environment = os.environ
    by_srun = False
    if "RANK" in environment:
        rank, size, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    elif int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        by_srun = True
        rank, size, local_rank = (int(environment[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
        if "MASTER_ADDR" not in environment:
            raise ValueError(
                "srun started several tasks, but MASTER_ADDR is not set. Set it to the first host's name (and MASTER_PORT to a free port) "
                "in the job script, as in docs/cluster.md."
            )
        environment.setdefault("MASTER_PORT", "29500")
        environment.setdefault("LOCAL_WORLD_SIZE", environment.get("SLURM_NTASKS_PER_NODE", "1"))
        environment.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    else:
        rank, size, local_rank = 0, 1, 0
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is cuda, but PyTorch finds no GPU here. Choose auto or cpu.")
    if device != "cpu" and torch.cuda.is_available():
        visible = torch.cuda.device_count()
        # With a GPU bound to each task (srun --gpus-per-task 1) every process sees its own as number 0.
        index = 0 if by_srun and visible == 1 else local_rank
        if index >= visible:
            raise ValueError(
                f"This host runs at least {local_rank + 1} processes but has {visible} GPUs. "
                f"Start one process a GPU (torchrun --nproc-per-node {visible})."
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    if size > 1:
        store = meet(timeout_seconds, serve=rank == 0)
        if chosen.type == "cuda":
            backend, timeout = {"backend": "nccl", "device_id": chosen}, timeout_seconds + NCCL_EXTRA_SECONDS
        else:
            backend, timeout = {"backend": "gloo"}, timeout_seconds
        dist.init_process_group(**backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    return World(rank, size, local_rank, chosen)


def meet(timeout_seconds: float, *, serve: bool = False) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT at which the ranks meet; with ``serve`` opened by this process, unless torchrun has done it.

    Keys are kept apart by torchrun's count of restarts: its store outlives the processes, and ranks that find the addresses of those before
    them try to connect to the dead (seen with PyTorch 2.15; pytorch#135712 tells of the same).
    """
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=serve and not by_torchrun,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return dist.PrefixStore(f"massl_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun or Slurm started this process again after a failure or a preemption."""
    return any(int(os.environ.get(name, 0)) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def choose_strategy(asked: str, world_size: int) -> tuple[str, str]:
    """(none, ddp or fsdp2, reason) for a setting of auto, none, ddp or fsdp2."""
    if world_size == 1:
        return "none", "one process" if asked in ("auto", "none") else f"{asked} was asked for, but one process has nobody to share with"
    if asked == "none":
        raise ValueError(
            f"parallel.strategy is none, but {world_size} processes were started: each would train alone. "
            f"Choose auto, ddp or fsdp2, or start one process."
        )
    return ("ddp", f"{world_size} processes") if asked == "auto" else (asked, "asked for")


def synchronise_batch_norms(module: nn.Module, world: World) -> tuple[nn.Module, str | None]:
    """(the module with batch norms that see the whole global batch, a sentence for the user or None).

    PyTorch has SyncBatchNorm for GPUs only; on CPUs each process keeps normalising with its own images, and the sentence says so.
    """
    count = sum(isinstance(part, _BatchNorm) for part in module.modules())
    if world.size == 1 or not count:
        return module, None
    if world.device.type != "cuda":
        return module, (
            f"PyTorch synchronises batch norms on GPUs only: the {count} of this network normalise with the images of their own process, "
            f"and checkpoints hold the running statistics of rank 0."
        )
    return convert_sync_batchnorm(module), None


def rank_map(world: World) -> list[str]:
    """Where each rank runs and on what: one line a rank, or one a host where there are many."""
    if world.size == 1:
        return [device_name(world.device)]
    places: list[tuple[str, str]] = [("", "")] * world.size
    dist.all_gather_object(places, world.describe())
    if world.size <= MAX_RANK_LINES:
        return [f"rank {rank} of {world.size} on {host}, {device}" for rank, (host, device) in enumerate(places)]
    lines = []
    for host, members in groupby(enumerate(places), key=lambda place: place[1][0]):
        ranks, devices = zip(*((rank, device) for rank, (_, device) in members))
        names = ", ".join(dict.fromkeys(device.split(" (")[0] for device in devices))
        lines.append(f"ranks {ranks[0]} to {ranks[-1]} of {world.size} on {host}, {len(ranks)} × {names}")
    return lines
