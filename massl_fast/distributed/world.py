"""Processes and devices: who this rank is, how ranks talk, and how the student is spread over them."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
import warnings
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from massl_fast.distributed.listening import LISTENER
from massl_fast.hardware import demand_code, keep_freed_memory

# NCCL's own watchdog tears a process down without a word; it gets this much longer, so that the heartbeat speaks first.
NCCL_EXTRA_SECONDS = 60
MAX_RANK_LINES = 16
POLL_SECONDS = 0.05
OF_SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
OF_MPIRUN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where Open MPI and MPICH say how many processes they started."""
KNOCK_SECONDS = 5


def _at_once(collective: Callable[[], Any]) -> None:
    collective()


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    round: int = 1
    """How many times the ranks have met at this store: 2 and more after torchrun has started them again."""
    meeting: str = ""
    """A name of the store at which they met, of this one alone; empty for one process."""
    exchange: Callable[[Callable[[], Any]], None] = field(default=_at_once, compare=False)
    """Calls what exchanges tensors within a step: at once, or between two recordings where a step is recorded."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows [n, D] of every rank, in rank order: [size·n, D]."""
        if self.size == 1:
            return rows
        rows = rows.contiguous()
        gathered = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        self.exchange(lambda: dist.all_gather_into_tensor(gathered, rows))
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over ranks; stays on the device."""
        if self.size == 1:
            return values
        values = values.clone()
        self.exchange(lambda: dist.all_reduce(values))
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

    def store(self, timeout_seconds: float) -> dist.Store:
        """A connection of its own to the store at which the ranks met, with keys of this round. ``timeout_seconds``: for one answer."""
        return _of_round(_connect(timeout_seconds), self.round)

    def cores(self) -> float:
        """Cores that this rank may use, of those that ranks of its host share its part. A collective call."""
        own = sorted(os.sched_getaffinity(0))
        places = [(socket.gethostname(), own)] * self.size
        if self.size > 1:
            dist.all_gather_object(places, places[self.rank])
        return share_of(own, [cores for host, cores in places if host == socket.gethostname()])

    def describe(self) -> tuple[str, str]:
        """(host, device) of this rank."""
        return socket.gethostname(), device_name(self.device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' if threads > 1 else ''})"


def join_world(device: str = "auto", timeout_seconds: float = 600) -> World:
    """Join the processes started by torchrun or srun; without either, be the only one.

    ``device``: auto, cuda or cpu. NCCL joins GPUs, gloo joins CPUs. ValueError names what the environment lacks or contradicts.
    """
    rank, size, local_rank, by_srun = _place_of(os.environ)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is cuda, but PyTorch finds no GPU here. Choose auto or cpu.")
    if device != "cpu" and torch.cuda.is_available():
        visible = torch.cuda.device_count()
        # With a GPU bound to each task (srun --gpus-per-task 1) every process sees its own as number 0.
        index = 0 if by_srun and visible == 1 else local_rank
        if index >= visible:
            raise ValueError(
                f"This host runs at least {local_rank + 1} processes but has {visible} GPUs. "
                f"Start one process per GPU (torchrun --nproc-per-node {visible})."
            )
        chosen = torch.device("cuda", index)
        demand_code(chosen)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
        keep_freed_memory()
    number, meeting = 1, ""
    if size > 1:
        # torchrun serves a store of its own, which outlives the ranks.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = _connect(timeout_seconds, serve=rank == 0 and not served)
        number = agree_on_round(store, rank, size, timeout_seconds)
        meeting = store.compare_set("massl_fast/meeting/name", "", uuid.uuid4().hex).decode()
        if chosen.type == "cuda":
            backend, timeout = {"backend": "nccl", "device_id": chosen}, timeout_seconds + NCCL_EXTRA_SECONDS
        else:
            backend, timeout = {"backend": "gloo"}, timeout_seconds
        store = _of_round(store, number)
        dist.init_process_group(**backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    return World(rank, size, local_rank, chosen, number, meeting)


def _place_of(environment: MutableMapping[str, str]) -> tuple[int, int, int, bool]:
    """(rank, number of ranks, rank on its host, whether srun started it) of this process, by what its launcher left in ``environment``.

    srun's numbers are copied to where torchrun writes its own. ValueError where some are missing or make no sense.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    by_srun = names[0] not in environment and environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environment
    if by_srun:
        _demand_srun(environment)
        environment.setdefault("MASTER_PORT", "29500")
        environment.update({name: environment.get(slurms, "") for name, slurms in zip(names, OF_SRUN)})
    elif names[0] not in environment:
        started = next((environment[name] for name in OF_MPIRUN if environment.get(name, "1") != "1"), None)
        if started:
            raise ValueError(
                f"mpirun started {started} processes, and each would train alone, because massl-fast takes no places from MPI. Start them "
                f"with torchrun or srun."
            )
        return 0, 1, 0, False
    rank, size, local_rank = (_number(environment, name) for name in names)
    if rank >= size:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {size} in the environment; ranks count from 0 to {size - 1}.")
    if size > 1:
        _number(environment, "MASTER_PORT")
        _demand_set(environment, "MASTER_ADDR")
    return rank, size, local_rank, by_srun


def _demand_srun(environment: MutableMapping[str, str]) -> None:
    if "SLURM_STEP_ID" not in environment:
        raise ValueError(
            f"This job has {environment['SLURM_NTASKS']} tasks, but srun did not start this process, which would wait for others in vain. "
            f"Write srun before the command, as in docs/slurm, or SLURM_NTASKS=1 for one process alone."
        )
    if "MASTER_ADDR" not in environment:
        raise ValueError(
            "srun started several tasks, but MASTER_ADDR is not set. Set it to the first host's name (and MASTER_PORT to a free port) "
            "in the job script, as in docs/cluster.md."
        )


def _demand_set(environment: MutableMapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ValueError(
            f"RANK is set in the environment, but {name} is not. A launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT "
            f"together: start with torchrun or srun, or unset RANK to run one process."
        )
    return environment[name]


def _number(environment: MutableMapping[str, str], name: str) -> int:
    value = _demand_set(environment, name)
    if not value.isdecimal():
        raise ValueError(f"{name} is {value!r} in the environment, where a launcher writes a number from 0 on.")
    return int(value)


class RanksDidNotMeet(RuntimeError):
    """Some rank did not come to the store at which all meet, the store is out of reach, or a signal asked to stop meanwhile."""

    def __init__(self, sentence: str, *, stopped: bool = False):
        super().__init__(sentence)
        self.stopped = stopped


def _connect(timeout_seconds: float, *, serve: bool = False) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT; with ``serve`` opened by this process."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout_seconds
    while not serve:
        # Knocked at from here, because within TCPStore a signal would not be heard until somebody opens.
        try:
            socket.create_connection((host, port), timeout=KNOCK_SECONDS).close()
            break
        except OSError as error:
            _pause(deadline, f"The store at {host}:{port} (MASTER_ADDR and MASTER_PORT), where the ranks meet, is out of reach: {error}")
    try:
        return dist.TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds))
    except dist.DistError as error:
        verb = "open" if serve else "reach"
        raise RanksDidNotMeet(
            f"This rank could not {verb} the store at {host}:{port} (MASTER_ADDR and MASTER_PORT), where the ranks meet: "
            f"{str(error).splitlines()[0]}"
        ) from None


def _of_round(store: dist.Store, number: int) -> dist.Store:
    return dist.PrefixStore(f"massl_fast/round_{number}", store)


def agree_on_round(store: dist.Store, rank: int, size: int, timeout_seconds: float) -> int:
    """The number of this meeting of ``size`` ranks, the same on each of them. Waits for all; RanksDidNotMeet where some do not come.

    torchrun's store outlives the processes, and ranks that find addresses of those before them try to connect to the dead (seen with
    PyTorch 2.15; pytorch#135712 tells of the same). So the keys of each round are kept apart. Its count of restarts cannot name the round:
    each host's agent counts its own, and a host that joins later begins at 0. Instead every rank leaves a name of its own, drawn anew at
    each start; rank 0 collects them, publishes the list under the next number, and all answer. A name of an earlier start gets no answer,
    and the list is published again once its successor has come.
    """
    store = dist.PrefixStore("massl_fast/meeting", store)
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    store.set(f"name/{rank}", name)
    return _collect(store, size, deadline) if rank == 0 else _answer(store, name, rank, deadline)


def _collect(store: dist.Store, size: int, deadline: float) -> int:
    keys = [f"name/{rank}" for rank in range(size)]
    while True:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        if missing:
            _pause(deadline, f"The ranks did not meet: rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} of {size} did not come")
            continue
        names = [value.decode() for value in store.multi_get(keys)]
        number = store.add("count", 1)
        store.set("list", json.dumps([number, names]))
        answers = [f"answer/{number}/{rank}" for rank in range(1, size)]
        while [value.decode() for value in store.multi_get(keys)] == names:
            if store.check(answers):
                store.set(f"complete/{number}", "")
                return number
            silent = [str(rank) for rank in range(1, size) if not store.check([f"answer/{number}/{rank}"])]
            _pause(deadline, f"The ranks did not meet: rank{'s' if len(silent) > 1 else ''} {', '.join(silent)} of {size} came and left")


def _answer(store: dist.Store, own_name: str, rank: int, deadline: float) -> int:
    answered = 0
    while True:
        if store.check(["list"]):
            number, names = json.loads(store.get("list"))
            if number != answered and names[rank : rank + 1] == [own_name]:
                store.set(f"answer/{number}/{rank}", "")
                answered = number
            if number == answered and store.check([f"complete/{number}"]):
                return number
        _pause(deadline, "The ranks did not meet: rank 0, which collects them, was not heard of, or not all came")


def _pause(deadline: float, problem: str) -> None:
    if LISTENER.noted:
        raise RanksDidNotMeet(f"Ended by {LISTENER.noted.name} before the ranks had met; the same command starts again.", stopped=True)
    if time.monotonic() > deadline:
        raise RanksDidNotMeet(f"{problem}, for as long as parallel.timeout_seconds.")
    time.sleep(POLL_SECONDS)


def share_of(own: list[int], of_all: list[list[int]]) -> float:
    """Cores of ``own``, each counted in as many parts as there are lists of ``of_all`` (all ranks of the host) that hold it."""
    return sum(1 / max(1, sum(core in cores for cores in of_all)) for core in own)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def restarted(world: World) -> bool:
    """Whether torchrun or Slurm started these processes again after a failure or a preemption."""
    counted = any(int(os.environ.get(name, 0)) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return counted or world.round > 1


def choose_strategy(asked: str, world_size: int) -> tuple[str, str]:
    """(none, ddp or fsdp2, reason) for a setting of auto, none, ddp or fsdp2."""
    if world_size == 1:
        return "none", "one process" if asked in ("auto", "none") else f"one process has no other to share with, which {asked} needs"
    if asked == "none":
        raise ValueError(
            f"parallel.strategy is none, but {world_size} processes were started: each would train alone. "
            f"Choose auto, ddp or fsdp2, or start one process."
        )
    return ("ddp", f"{world_size} processes") if asked == "auto" else (asked, "as set")


def choose_exchange(asked: str, *, recorded: bool, sharded: bool, world_size: int) -> tuple[str, str]:
    """(none, sharded, overlapped or flat, reason) for a ``parallel.gradients`` of auto, overlapped or flat.

    ``recorded``: ``train.cuda_graph``. Raises ValueError where the settings exclude each other.
    """
    if world_size == 1:
        return "none", "one process"
    if sharded:
        if asked == "flat":
            raise ValueError("parallel.gradients is flat, but parallel.strategy fsdp2 reduces gradients to shards. Leave it at auto.")
        return "sharded", "parallel.strategy is fsdp2"
    if recorded and asked == "overlapped":
        raise ValueError(
            "train.cuda_graph is on, and parallel.gradients is overlapped, which happens in hooks that are not recorded. Choose "
            "parallel.gradients auto, or leave train.cuda_graph off where the network between hosts is slow."
        )
    if asked == "flat":
        return "flat", "as set"
    if recorded:
        return "flat", (
            "train.cuda_graph: one buffer between two recordings; where the network between hosts is slow, train.cuda_graph false lets the "
            "exchange overlap with the backward pass instead"
        )
    return "overlapped", "as set" if asked == "overlapped" else "DistributedDataParallel exchanges while the backward pass computes"


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
    """Where each rank runs and on what: one line per rank, or one per host where there are many."""
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
