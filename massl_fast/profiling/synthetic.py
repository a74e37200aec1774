"""The model of a run without its data: the trainer's own step on random crops, on a device or in shapes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from massl_fast.config import Config
from massl_fast.data.loaders import views_of
from massl_fast.distributed.world import World
from massl_fast.engine.build import build_objective, build_pair, build_step, demand_residual
from massl_fast.engine.flops import step_flops
from massl_fast.engine.graphed_step import GraphedStep
from massl_fast.engine.phases import END, REST, Observer
from massl_fast.engine.placement import choose_kernels
from massl_fast.engine.schedules import Schedules, StepSettings
from massl_fast.engine.step import StepResult, TrainStep
from massl_fast.length import Length, in_micro_batches
from massl_fast.models.packed import Attend
from massl_fast.models.precision import Precision


@dataclass
class SyntheticRun:
    """Everything a step needs. ``crop_sets``: micro-batches of random crops, taken in turn so that no step finds the last one's in a
    cache; each is V tensors [N, 3, H, W], float32, channels-last."""

    config: Config
    train_step: TrainStep
    take_step: Callable[..., StepResult]
    """``train_step``, or its recording where the run is to be one CUDA graph a step."""
    crop_sets: list[list[list[Tensor]]]
    settings: StepSettings
    batch: int
    """Images of one step, all micro-batches."""
    fake: bool = False
    """Shapes without contents."""
    count: int = 0
    observe: Observer | None = None

    def step(self, crops: list[list[Tensor]] | None = None) -> StepResult:
        """The next step, as the trainer takes it, on micro-batches of its own or those given; one that is observed is never replayed from a
        recording."""
        crops = crops or self.crop_sets[self.count % len(self.crop_sets)]
        number: int | Tensor = self.count
        if self.fake and self.train_step.objective.needs_patches:
            # Masks of a number on the device are as large as masks become; of one on the host their values would tell.
            number = torch.full((), self.count)
        if self.observe is None:
            result = self.take_step(crops, self.settings, number)
        else:
            self.observe(REST)
            result = self.train_step(crops, self.settings, number)
            self.observe(END)
        self.count += 1
        return result

    @contextlib.contextmanager
    def observed(self, observe: Observer) -> Iterator[None]:
        """Inside, ``observe`` is called with the name of each of ``engine.phases.PHASES`` as it begins, and ``END`` after a step."""
        self.observe = observe
        try:
            with self.train_step.observed(observe):
                yield
        finally:
            self.observe = None

    @property
    def flops(self) -> float:
        """Operations of one step."""
        sizes = [view.size for view in views_of(self.config.crops)]
        return step_flops(self.train_step.pair, self.train_step.objective, crop_sizes=sizes, batch=self.batch)


def micro_batches_of(config: Config, world_size: int = 1) -> tuple[int, int]:
    """(micro-batches of a step, images of one) on one rank, as the trainer divides a global batch; the first may not divide evenly."""
    return in_micro_batches(max(1, config.train.global_batch // world_size), config.train.micro_batch)


def synthetic_run(
    config: Config,
    world: World,
    precision: Precision,
    *,
    device_batch: int,
    accumulation: int = 1,
    attention: Attend | None = None,
    crop_sets: int = 2,
) -> SyntheticRun:
    """Student, teacher, objective, optimizer and crops on ``world.device``. Inside a ``FakeTensorMode`` only shapes come to be.

    ``attention``: what the networks take in place of their own (see ``models.packed.PackedPass``).

    Raises ValueError as the trainer does for settings that do not fit the precision.
    """
    demand_residual(config, precision)
    objective = build_objective(config, precision, world.rank)
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    with contextlib.ExitStack() as outside:
        if fake:
            outside.enter_context(_disable_current_modes())
            outside.enter_context(torch.device("meta"))
        pair, _ = build_pair(config, objective, attention)
    if fake:
        _in_shapes_(pair)
    else:
        pair.to(world.device, memory_format=torch.channels_last)
        choose_kernels(pair, config, world.device, precision)
    if config.model.compile and not fake:
        # What was compiled for other shapes counts against Dynamo's limit (8 a function), beyond which steps run uncompiled.
        torch.compiler.reset()
        pair.compile_blocks()
    objective.to(world.device)
    train_step = build_step(config, pair, objective, world, precision)
    sizes = [view.size for view in views_of(config.crops)]
    generator = None if fake else torch.Generator(world.device).manual_seed(0)

    def crops() -> list[Tensor]:
        return [torch.randn(device_batch, size, size, 3, device=world.device, generator=generator).permute(0, 3, 1, 2) for size in sizes]

    sets = [[crops() for _ in range(accumulation)] for _ in range(1 if fake else crop_sets)]
    # Settings of the middle of a long run.
    length = Length(10**6, 10**3, device_batch * accumulation * world.size, accumulation, device_batch)
    settings = Schedules(config, length, objective).at(500_000)
    take_step = GraphedStep(train_step) if config.train.cuda_graph and not fake else train_step
    return SyntheticRun(config, train_step, take_step, sets, settings, device_batch * accumulation, fake is not None)


def _in_shapes_(module: nn.Module) -> None:
    """Tensors of the meta device, on which networks are built (timm reads some numbers while it builds), become fake ones of a CPU,
    which has fused attention and fused optimizers as a GPU has."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
                    shape = torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=layout)
                    tensors[name] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
