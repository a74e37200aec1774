"""A whole step recorded once as CUDA graphs and replayed: both passes, clipping, AdamW, teacher, partition and enqueue in one launch.

A ViT-S step is some thousands of kernels; below about 100 images a device the GPU is done with each before Python has launched the next.
What changes from step to step reaches the recorded kernels through tensors that stay where they are: crops, settings, the step's number and
the request to stop. Drop path draws from PyTorch's generator, whose seed a replay takes from ``torch.manual_seed`` as an eager step does.

Of several processes a recording pauses where they exchange tensors (``World.exchange``), and a replay calls the same exchange there,
eagerly and on the same tensors: a graph of both passes, the gradients as one flat buffer with the votes behind them, a graph of clipping,
optimizer and teacher, and for MaSSL the rows that enter the memory and a last small graph. Objectives that exchange in their forward pass
have one graph more per exchange. DistributedDataParallel's hooks are not recorded, so it takes no part.

The first steps are taken as ever, on the stream that will record: kernels are compiled and optimizer states made there. Recording itself
computes nothing, so no step is taken twice or lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from massl_fast.engine.fused_update import AdamWWithTeacher
from massl_fast.engine.schedules import StepSettings
from massl_fast.engine.step import StepResult, TrainStep

WARM_UP = 3


class Tape(Protocol):
    """Records the work of a function and does it again. Tests bring one that works on a CPU."""

    def warm_up(self, function: Callable[[], StepResult]) -> StepResult:
        """Call ``function`` where it will be recorded."""

    def record(self, function: Callable[[], StepResult]) -> StepResult:
        """Record what ``function`` does, without doing it; returns the tensors that every replay fills."""

    def between(self, exchange: Callable[[], None]) -> None:
        """While recording: call ``exchange``, without noting what it does, and have every replay call it in this place."""

    def replay(self) -> None:
        """Do it."""


class CudaTape:
    """CUDA graphs that share their memory, and what is called between them."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.parts: list[Callable[[], None]] = []
        self.recording: torch.cuda.graph | None = None

    def warm_up(self, function: Callable[[], StepResult]) -> StepResult:
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            result = function()
        outside.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], StepResult]) -> StepResult:
        # The stream is put back where a recording fails, which that of PyTorch 2.11 does not.
        with torch.cuda.stream(self.stream):
            self._begin()
            try:
                result = function()
            except BaseException:
                self._end(*sys.exc_info())
                raise
            self._end()
        return result

    def between(self, exchange: Callable[[], None]) -> None:
        self._end()
        exchange()
        self.parts.append(exchange)
        self._begin()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Threads of loaders allocate and query events meanwhile, which ends a recording unless errors are this thread's alone.
        self.recording = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        self.recording.__enter__()
        self.parts.append(graph.replay)

    def _end(self, *raised: Any) -> None:
        assert self.recording is not None
        self.recording.__exit__(*(raised or (None, None, None)))

    def replay(self) -> None:
        for part in self.parts:
            part()


class GraphedStep:
    """``TrainStep`` with the same arguments and the same effects, replayed from its fourth call on, and recorded anew after three more
    where other parameters begin to move. ``new_tape`` makes what records; by default a ``CudaTape``.

    Raises ValueError where a step cannot be recorded: on a CPU, where gradients are not exchanged as one flat buffer or batch norms
    exchange statistics, for optimizers that take settings from the host.
    """

    def __init__(self, train_step: TrainStep, new_tape: Callable[[], Tape] | None = None):
        world = train_step.world
        if new_tape is None and world.device.type != "cuda":
            raise ValueError("train.cuda_graph is on, but the run is on a CPU, which has no CUDA graphs. Leave it off.")
        if world.size > 1 and train_step.flat is None:
            raise ValueError(
                f"train.cuda_graph is on for {world.size} processes whose gradients are not exchanged as one flat buffer; the exchange of "
                f"DistributedDataParallel or fsdp2 is not recorded. Choose parallel.strategy ddp with parallel.gradients auto or flat."
            )
        if world.size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in train_step.pair.modules()):
            raise ValueError(
                f"train.cuda_graph is on for {world.size} processes of a network with batch norms, which exchange their statistics within "
                f"both passes, and that is not recorded. Leave it off."
            )
        if not isinstance(train_step.optimizer, AdamWWithTeacher):
            raise ValueError(
                "train.cuda_graph is on, and a recorded step needs an optimizer that reads its settings on the device. "
                "Choose optimizer.name adamw_with_teacher, or leave train.cuda_graph off."
            )
        self.train_step = train_step
        train_step.exchange_by(self._exchange)
        self.recording = False
        self.new_tape = new_tape or partial(CudaTape, world.device)
        self.tape = self.new_tape()
        self.settings: Tensor | None = None
        self.names: tuple[str, ...] = ()
        self.frozen: tuple[str, ...] = ()
        self.step = torch.zeros((), dtype=torch.int64, device=world.device)
        self.stopping = torch.zeros((), device=world.device)
        self.micro_batches: list[list[Tensor]] = []
        self.warm_ups_left = WARM_UP
        self.result: StepResult | None = None

    def __call__(
        self, micro_batches: Sequence[list[Tensor]], settings: StepSettings, step: int, stopping: Tensor | None = None
    ) -> StepResult:
        """See ``TrainStep``. The next call overwrites the tensors that this one returns."""
        self._take_in(micro_batches, settings, step, stopping)
        if self.warm_ups_left:
            self.warm_ups_left -= 1
            return self.tape.warm_up(self._step)
        if self.result is None:
            self.recording = True
            try:
                self.result = self.tape.record(self._step)
            except RuntimeError as error:
                # A recording that breaks off fails once more as it ends, and says less then.
                first = error
                while isinstance(first.__context__, RuntimeError):
                    first = first.__context__
                if isinstance(first, torch.OutOfMemoryError):
                    raise first from None
                raise ValueError(
                    f"train.cuda_graph is on, but the step could not be recorded: {str(first).splitlines()[0]} Leave it off."
                ) from error
            finally:
                self.recording = False
        self.tape.replay()
        return self.result

    def _exchange(self, collective: Callable[[], Any]) -> None:
        if self.recording:
            self.tape.between(collective)
        else:
            collective()

    def _take_in(self, micro_batches: Sequence[list[Tensor]], settings: StepSettings, step: int, stopping: Tensor | None) -> None:
        values = settings.vector(self.step.device)
        if self.settings is None:
            self.settings, self.frozen = torch.empty_like(values), settings.frozen
            self.micro_batches = [[torch.empty_like(crop) for crop in crops] for crops in micro_batches]
        for ours, crops in zip(self.micro_batches, micro_batches, strict=True):
            for own, crop in zip(ours, crops, strict=True):
                assert own.shape == crop.shape, f"a recorded step takes crops of {tuple(own.shape)}, not of {tuple(crop.shape)}"
                own.copy_(crop, non_blocking=True)
        self.settings.copy_(values)
        if settings.frozen != self.frozen:
            self.warm_ups_left, self.result, self.tape = WARM_UP, None, self.new_tape()
        self.names, self.frozen = tuple(settings.own), settings.frozen
        self.step.fill_(step)
        if stopping is not None:
            self.stopping.copy_(stopping)

    def _step(self) -> StepResult:
        return self.train_step(self.micro_batches, StepSettings.of_vector(self.settings, self.names, self.frozen), self.step, self.stopping)
