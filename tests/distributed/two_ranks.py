"""What two processes do in turn for test_two_ranks.py: ``python two_ranks.py WORKPLACE``, started once a rank with RANK and so on set.

One start serves all scenes, because importing is most of what a start costs. Each scene leaves (kind of ending, sentence) in
outcomes.<rank>.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from massl_fast.config import Config, validated
from massl_fast.distributed.world import World, join_world, leave_world
from massl_fast.engine.trainer import Trainer
from massl_fast.run.exits import Ended

SETTINGS = """
data: {num_workers: 0, loader: torchvision}
crops: {global_size: 16, local_size: 8, num_local: 2}
model:
  architecture: vit_tiny_patch16_224
  model_args: {patch_size: 4, depth: 2, num_heads: 2, embed_dim: 32}
  drop_path: 0.0
  head_hidden_dim: 32
  embedding_dim: 16
objective: {memory_size: 64, block_size: 16, teacher_temperature_warmup_epochs: 1}
optimizer: {learning_rate: 0.01}
teacher: {momentum: 0.9}
train: {steps: 24, stop_at_step: 20, global_batch: 8, device: cpu}  # no end, no report
logging: {every_steps: 1, tensorboard: false}
checkpoint: {every_steps: 5, keep_every_steps: 10}
parallel: {timeout_seconds: 120}
"""


def configured(workplace: Path, folder: str, **sections: dict) -> Config:
    settings = yaml.safe_load(SETTINGS)
    settings["run"] = {"folder": str(workplace / folder)}
    settings["data"]["train"] = str(workplace / "images")
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    return validated(settings, "test")


def watched(trainer: Trainer, hook: Callable[[int, list[torch.Tensor]], None]) -> None:
    """Call ``hook(step, crops)`` with each batch before its step."""
    batches = trainer.loader.batches

    def hooked(start: int):
        for step, batch in enumerate(batches(start), start):
            hook(step, batch.crops)
            yield batch

    trainer.loader.batches = hooked


def play(config: Config, world: World, prepare: Callable[[Trainer], None] = lambda trainer: None) -> tuple[str, str]:
    """(kind of ending, sentence) of a run."""
    trainer = Trainer(config, world)
    prepare(trainer)
    try:
        trainer.run()
        return "finished", ""
    except Ended as error:
        return f"{type(error).__name__} {error.exit_code}", str(error)


def main(workplace: Path) -> None:
    world = join_world("cpu", timeout_seconds=120)
    outcomes = {}

    outcomes["ddp"] = play(configured(workplace, "ddp"), world)

    def sharded(to: int) -> dict:
        return {"parallel": {"strategy": "fsdp2"}, "train": {"stop_at_step": to}}

    def checkpointing_activations(trainer: Trainer) -> None:
        trainer.pair.student.backbone.set_grad_checkpointing(True)

    outcomes["fsdp2"] = play(configured(workplace, "fsdp2", **sharded(10)), world, checkpointing_activations)
    if world.is_main:
        shutil.copytree(workplace / "fsdp2", workplace / "fsdp2-then-one")
    outcomes["fsdp2 then ddp"] = play(configured(workplace, "fsdp2"), world)
    outcomes["one then fsdp2"] = play(configured(workplace, "one-then-fsdp2", model={"crops_pass": "separate"}, **sharded(15)), world)

    def signal_rank_1(trainer: Trainer) -> None:
        def hook(step: int, crops: list[torch.Tensor]) -> None:
            if step == 3 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

        watched(trainer, hook)

    outcomes["signal"] = play(configured(workplace, "signal"), world, signal_rank_1)
    outcomes["after the signal"] = play(configured(workplace, "signal", train={"stop_at_step": 6}), world)

    def drift(trainer: Trainer) -> None:
        def hook(step: int, crops: list[torch.Tensor]) -> None:
            if step == 2 and world.rank == 1:
                trainer.objective.memory[40, 3] += 1e-6

        watched(trainer, hook)

    outcomes["drift"] = play(configured(workplace, "drift", parallel={"checksum_every_steps": 3}), world, drift)

    def poison(trainer: Trainer) -> None:
        def hook(step: int, crops: list[torch.Tensor]) -> None:
            if step == 2 and world.rank == 1:
                crops[3][0, 0, 2, 2] = torch.nan

        watched(trainer, hook)

    nan = configured(workplace, "nan", parallel={"strategy": "fsdp2"}, logging={"every_steps": 4})
    outcomes["nan"] = play(nan, world, poison)

    (workplace / f"outcomes.{world.rank}.json").write_text(json.dumps(outcomes))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
