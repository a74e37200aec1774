"""Asked to stop: signals that one process notes and all ranks heed after the same step.

A scheduler may signal one process only. Each step carries "was I asked to stop" in the sum that ranks take anyway (engine.step), so it
costs no message of its own. On a GPU the host reads a sum ``LAG`` steps late, out of pinned memory: by then it has long been computed, the
host does not wait, and every rank reads the same sum before the same step.
"""

from __future__ import annotations

import contextlib
import signal
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from massl_fast.distributed.listening import LISTENER, WARNINGS
from massl_fast.distributed.world import World

LAG = 2


class StopRequest:
    """SIGTERM, SIGUSR1 (a scheduler's warning), SIGHUP and Ctrl-C let the step finish; a second Ctrl-C, a second later, ends at once."""

    def __init__(self, world: World):
        self._alone = world.size == 1
        self._lag = LAG if world.device.type == "cuda" else 0
        self._flag = torch.zeros((), device=world.device)
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    @property
    def noted(self) -> signal.Signals | None:
        """The signal that this process received."""
        return LISTENER.noted

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        with LISTENER.listening(*WARNINGS, signal.SIGINT):
            yield

    def vote(self) -> Tensor:
        """0-d tensor on the device: 1 where this process was asked to stop."""
        if self.noted:
            self._flag.fill_(1)
        return self._flag

    def granted(self, votes: Tensor) -> bool:
        """Whether to stop now; the same answer on every rank. To be called once per step with that step's sum of votes."""
        if self._alone:
            return self.noted is not None
        if votes.device.type == "cuda":
            host = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=True)
            host.copy_(votes, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        else:
            host, copied = votes.clone(), None
        self._pending.append((host, copied))
        if len(self._pending) <= self._lag:
            return False
        host, copied = self._pending.popleft()
        if copied is not None:
            copied.synchronize()
        return host.item() > 0

    def at_start(self, world: World) -> bool:
        """Whether any process of the run was asked to stop so far: before there is a step to finish. A collective call."""
        return world.sum(self.vote()).item() > 0

    @property
    def name(self) -> str:
        return self.noted.name if self.noted else "a signal to another rank"
