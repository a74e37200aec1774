"""Saving while training goes on: weights are copied to the host at once, and a thread writes them to disk.

The copy is all that training waits for: on a GPU it is queued behind the step, into page-locked memory, and the host goes on. The next
save waits until the last one is on the disk. Sharded tensors are put together tensor by tensor and kept by rank 0 alone, which writes.

Why not torch.distributed.checkpoint, which reads checkpoints here, for writing, too: its own format keeps metadata in a pickle; its
safetensors writer leaves either shards that no other program can load, or puts them together afterwards, which fails on integer tensors
(PyTorch 2.15: TypeError from torch.finfo) such as the memory's pointer.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from massl_fast.distributed.world import World
from massl_fast.run.checkpoint import CheckpointFolder


class BackgroundSaver:
    """Writes checkpoints of the whole run from rank 0, one at a time. Every rank calls ``save``; on others than rank 0 there is never a
    problem to tell.
    """

    def __init__(self, folder: CheckpointFolder, world: World):
        self.folder, self.world = folder, world
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._writing_step = 0
        self._host: dict[str, Tensor] = {}

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, best: bool = False) -> str | None:
        """Start writing; returns the problem of the save before, if there was one. A collective call where tensors are sharded."""
        problem = self.wait()
        self._stage(tensors)
        if self.world.is_main:
            copied = None
            if self.world.device.type == "cuda":
                copied = torch.cuda.Event()
                copied.record()
            self._writing_step = step
            self._writing = self._thread.submit(self._write, step, dict(self._host), state, best, copied)
        return problem

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: bool, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self.folder.save(step, tensors, state, best=best)

    @torch.no_grad()
    def _stage(self, tensors: dict[str, Tensor]) -> None:
        """Copy everything to buffers on the host, which are kept for the next time."""
        if not self.world.is_main:
            for tensor in tensors.values():
                if isinstance(tensor, DTensor):
                    tensor.full_tensor()  # rank 0 asks for it
            return
        pinned = self.world.device.type == "cuda"
        self._host = {name: buffer for name, buffer in self._host.items() if name in tensors}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            buffer = self._host.get(name)
            if buffer is None:
                buffer = self._host[name] = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=pinned)
            buffer.copy_(whole, non_blocking=True)

    def wait(self) -> str | None:
        """Until nothing is being written; returns why the last save failed, once, or None."""
        if self._writing is None:
            return None
        error, self._writing = self._writing.exception(), None
        if error is None:
            return None
        if not isinstance(error, OSError):
            raise error
        return f"The checkpoint of step {self._writing_step} could not be written ({error.strerror or error})"

    def problem(self) -> str | None:
        """The same without waiting: None while the writing goes on."""
        return self.wait() if self._writing is not None and self._writing.done() else None

    def close(self) -> None:
        self._thread.shutdown()
