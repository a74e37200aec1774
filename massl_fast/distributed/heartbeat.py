"""Signs of life, so that a rank that is gone can be named.

A thread of every rank counts up a key of its own in the store that the ranks met at (torchrun's, or that of rank 0), with the step and what
the rank is doing. A rank whose count stands still is gone; counts are compared with themselves only, so clocks may differ between hosts.
Rank 0 watches all of them and publishes who is gone, the others watch rank 0, so the store answers O(ranks) requests a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from massl_fast.distributed.world import World

BEAT_SECONDS = 1.0
SILENT_BEATS = 3


class Heartbeat:
    """The signs of life of this rank, and what those of the others say. A context manager."""

    def __init__(self, world: World, timeout_seconds: float, store: dist.Store, on_loss: Callable[[str], None]):
        """``on_loss`` is called in the thread with a sentence once a rank has been silent for ``timeout_seconds``."""
        self.world, self.timeout, self.on_loss = world, timeout_seconds, on_loss
        self.store = dist.PrefixStore("heartbeat", store)
        self.step, self.doing = 0, "starting"
        self._beats = 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._over = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:
            self.note(self.step, "finished")
            with contextlib.suppress(RuntimeError):  # the store may have gone with rank 0, which had finished, too
                self._beat()

    def note(self, step: int, doing: str) -> None:
        """What this rank does from now on."""
        self.step, self.doing = step, doing

    def _beat(self) -> None:
        self._beats += 1
        self.store.set(str(self.world.rank), json.dumps([self._beats, self.step, self.doing]))

    def _run(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._beat()
                lost = self._lost()
                sentence = f"{self._named(lost)} for {self.timeout:g} s (parallel.timeout_seconds)." if lost else None
            except RuntimeError as error:
                sentence = f"{_store_lost(error)}."
            if sentence and not self._over.is_set():
                self.on_loss(sentence)
                return

    def _lost(self) -> list[int]:
        """Ranks that have been silent for longer than the time-out, in the eyes of rank 0."""
        if self.world.is_main:
            lost = self._silent_for(range(1, self.world.size), self.timeout)
            if lost:
                self.store.set("lost", json.dumps(lost))
            return lost
        if self.store.check(["lost"]):
            return json.loads(self.store.get("lost"))
        return self._silent_for([0], self.timeout)

    def _silent_for(self, ranks: Sequence[int], seconds: float) -> list[int]:
        now, silent = time.monotonic(), []
        for rank, (beats, _, doing) in self._read(ranks).items():
            if rank not in self._seen or self._seen[rank][0] != beats:
                self._seen[rank] = (beats, now)
            if doing != "finished" and now - self._seen[rank][1] > seconds:
                silent.append(rank)
        return silent

    def _read(self, ranks: Sequence[int]) -> dict[int, tuple[int, int, str]]:
        """(count, step, doing) of ranks."""
        return {rank: tuple(json.loads(value)) for rank, value in zip(ranks, self.store.multi_get([str(rank) for rank in ranks]))}

    def diagnose(self) -> str | None:
        """After a failed exchange: which ranks are gone, as a sentence; takes a few seconds. None where all are alive."""
        try:
            before = self._read(range(self.world.size))
            time.sleep(SILENT_BEATS * BEAT_SECONDS)
            after = self._read(range(self.world.size))
        except RuntimeError as error:
            return _store_lost(error)
        gone = [rank for rank in after if after[rank][0] == before[rank][0] and rank != self.world.rank]
        return self._named(gone, after) if gone else None

    def whereabouts(self) -> str:
        """What each rank was doing, ranks of equal state together: for an exchange that timed out though all are alive."""
        states: dict[tuple[int, str], list[str]] = {}
        for rank, (_, step, doing) in self._read(range(self.world.size)).items():
            states.setdefault((step, doing), []).append(str(rank))
        rarest_first = sorted(states.items(), key=lambda item: len(item[1]))
        return "; ".join(
            f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}: {doing}, step {step}" for (step, doing), ranks in rarest_first
        )

    def _named(self, ranks: list[int], states: dict[int, tuple[int, int, str]] | None = None) -> str:
        names = ", ".join(str(rank) for rank in ranks)
        try:
            _, step, doing = (states or self._read(ranks))[ranks[0]]
            last = f" (last seen {doing}, step {step})"
        except RuntimeError:
            last = ""
        return f"Rank{'s' if len(ranks) > 1 else ''} {names} of {self.world.size} {'do' if len(ranks) > 1 else 'does'} not answer{last}"


def _store_lost(error: RuntimeError) -> str:
    """What is known where the store fails instead of answering."""
    if not isinstance(error, dist.DistNetworkError):
        return f"The store at which the ranks met does not answer ({str(error).splitlines()[0]})"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "The torchrun that served the store at which the ranks met has ended"
    return "Rank 0 does not answer, and with it went the store at which the ranks met"


def end_process(sentence: str) -> None:
    """End at once: the main thread may be waiting for a rank that will never answer, where no exception reaches it."""
    print(f"massl-fast train: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
