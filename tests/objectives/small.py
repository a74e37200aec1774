"""One small run per objective, for tests that hold for all of them."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor

from massl_fast.config import Config, validated
from massl_fast.distributed.world import World
from massl_fast.engine.build import build_objective, build_pair, build_step
from massl_fast.engine.schedules import StepSettings
from massl_fast.engine.step import TrainStep
from massl_fast.models.precision import Precision

CPU = torch.device("cpu")
COMMON = """
data: {num_workers: 0, loader: torchvision}
crops: {global_size: 16, local_size: 8, num_local: 2}
model:
  architecture: vit_tiny_patch16_224
  model_args: {patch_size: 4, depth: 2, num_heads: 2, embed_dim: 32}
  drop_path: 0.0
  head_hidden_dim: 24
  embedding_dim: 12
teacher: {momentum: 0.9}
train: {steps: 20, global_batch: 8, device: cpu}
logging: {every_steps: 1, tensorboard: false}
checkpoint: {every_steps: 5}
parallel: {timeout_seconds: 120}
"""
OBJECTIVES = {
    "massl": "objective: {name: massl, memory_size: 64, block_size: 16, teacher_temperature_warmup_epochs: 1}",
    "dino": "objective: {name: dino, prototypes: 40, freeze_norm: false, freeze_last_layer_epochs: 0.5}",
    "dino-sinkhorn": "objective: {name: dino, prototypes: 40, centering: sinkhorn, freeze_last_layer_epochs: 0}",
    "ibot": "objective: {name: ibot, prototypes: 40, masked_share: 0.8, freeze_last_layer_epochs: 0.5, shared_head: false}",
    "carp": "objective: {name: carp, prototypes: 40, block_size: 16}",
    "mmc": "{objective: {name: mmc}, crops: {num_local: 0}}",
    "moco_v3": "{objective: {name: moco_v3}, crops: {num_local: 0}}",
}

STRATEGIES = ("ddp", "fsdp2")
STEPS = 20
AS_ONE = {
    "carp-as-one": OBJECTIVES["carp"],
    "moco_v3-as-one": OBJECTIVES["moco_v3"],
    "mmc-classes": "{objective: {name: mmc, patch_weight: 0, pixel_weight: 0, alien_ratio: 0}, crops: {num_local: 0}}",
    "mmc-patches": "{objective: {name: mmc, class_weight: 0}, crops: {num_local: 0}}",
}
"""What two replicas train as one where batch norms see both, as on GPUs (``BatchNormOfAllRanks``). mmc in two parts: its contrast of
class tokens meets the keys of all ranks, that of patches and the alien ones stay within a rank's images, as within a micro-batch."""
AS_MICRO_BATCHES = ("mmc-patches",)
"""What two processes train as one does that takes the halves of its batch as two micro-batches."""


def settings_of(name: str, workplace: Path | None = None, **sections: dict) -> Config:
    """The run of an objective of ``OBJECTIVES`` or ``AS_ONE``; with ``workplace`` in its folder ``name`` on its folder ``images``."""
    settings = yaml.safe_load(COMMON)
    more = [yaml.safe_load((OBJECTIVES | AS_ONE)[name]), sections]
    if workplace is not None:
        more.append({"run": {"folder": str(workplace / name)}, "data": {"train": str(workplace / "images")}})
    for part in more:
        for section, values in part.items():
            settings.setdefault(section, {}).update(values)
    return validated(settings, "test")


def small_step(config: Config, dtype: torch.dtype = torch.float32, world: World | None = None, precision_name: str = "fp32") -> TrainStep:
    precision = Precision(precision_name, "test")
    objective = build_objective(config, precision, rank=0)
    pair, _ = build_pair(config, objective)
    return build_step(config, pair.to(dtype), objective.to(dtype), world or World(0, 1, 0, CPU), precision)


def crops_of(config: Config, images: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [config.crops.global_size] * 2 + [config.crops.local_size] * config.crops.num_local
    return [torch.randn(images, 3, size, size, generator=generator, dtype=dtype) for size in sizes]


def step_settings(number: int, own: dict[str, float] | None = None, frozen: tuple[str, ...] = ()) -> StepSettings:
    return StepSettings(
        1e-3 * (1 + number),
        0.05,
        0.9 + 0.01 * number,
        {"teacher_temperature": 0.05, "patch_teacher_temperature": 0.06, "masking": 1.0, **(own or {})},
        frozen,
    )


def losses_as_one(name: str, world: World) -> list[float]:
    """Of STEPS steps on 8 images, which ranks share; in float64, as batch norms of a handful of images magnify what rounding leaves."""
    config = settings_of(name)
    step = small_step(config, torch.float64, world)
    losses = []
    for number in range(STEPS):
        crops = [crop.chunk(world.size)[world.rank] for crop in crops_of(config, 8, number, torch.float64)]
        parts = 2 if name in AS_MICRO_BATCHES and world.size == 1 else 1
        micro_batches = [list(part) for part in zip(*(crop.chunk(parts) for crop in crops))]
        losses.append(world.mean(step(micro_batches, step_settings(number % 5), number).loss).item())
    return losses
