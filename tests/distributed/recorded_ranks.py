"""What two processes do in turn for test_recorded_ranks.py: ``python recorded_ranks.py WORKPLACE``, started once a rank with RANK and so
on set.

Each scene leaves (kind of ending, sentence) in outcomes.<rank>.json. A tape of operators stands in for CUDA graphs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from two_ranks import configured, play, watched

sys.path.insert(0, str(Path(__file__).parents[1]))
from massl_fast.config import Config
from massl_fast.distributed.world import join_world, leave_world
from massl_fast.engine import trainer
from massl_fast.engine.graphed_step import GraphedStep
from massl_fast.engine.schedules import StepSettings
from operator_tape import OperatorTape

STEPS = 11


def settings(workplace: Path, folder: str, to: int = STEPS, **parallel: str) -> Config:
    return configured(
        workplace,
        folder,
        model={"drop_path": 0.2},
        optimizer={"name": "adamw_with_teacher"},
        train={"stop_at_step": to, "micro_batch": 2, "cuda_graph": folder.startswith("recorded")},
        evaluation={"train": str(workplace / "images"), "test": str(workplace / "images"), "every_epochs": 1, "ks": [5]},
        parallel=parallel,
    )


def with_tensors(run: trainer.Trainer) -> None:
    """Settings as tensors, as a recorded step has them: a temperature that is a number rounds otherwise."""
    step = run.train_step

    def take(micro_batches, values: StepSettings, number: int, stopping: torch.Tensor):
        on_device = StepSettings.of_vector(values.vector(run.world.device), list(values.own), values.frozen)
        return step(micro_batches, on_device, torch.tensor(number), stopping)

    run.take_step = take


def main(workplace: Path) -> None:
    world = join_world("cpu", timeout_seconds=120)
    tapes: list[OperatorTape] = []

    def tape() -> OperatorTape:
        tapes.append(OperatorTape())
        return tapes[-1]

    trainer.GraphedStep = lambda train_step: GraphedStep(train_step, tape)
    outcomes: dict = {
        "ddp": play(settings(workplace, "ddp"), world, with_tensors),
        "flat": play(settings(workplace, "flat", gradients="flat"), world, with_tensors),
        "recorded": play(settings(workplace, "recorded", to=6), world),
        "recorded on": play(settings(workplace, "recorded"), world),
    }
    pauses = [sum(not hasattr(call, "_schema") for call, *_ in tape.calls) for tape in tapes]

    def poison(run: trainer.Trainer) -> None:
        def hook(step: int, crops: list[torch.Tensor]) -> None:
            if step == 2 * 5 and world.rank == 1:
                crops[3][0, 0, 2, 2] = torch.nan

        watched(run, hook)

    def send(run: trainer.Trainer) -> None:
        def hook(step: int, crops: list[torch.Tensor]) -> None:
            if step == 2 * 5 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

        watched(run, hook)

    outcomes["nan"] = play(settings(workplace, "recorded-nan"), world, poison)
    outcomes["signal"] = play(settings(workplace, "recorded-signal"), world, send)
    outcomes["pauses"] = pauses
    (workplace / f"outcomes.{world.rank}.json").write_text(json.dumps(outcomes))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
