"""Replay a stored trajectory of the published code through the trainer's own step: ``python tests/replay.py FILE.npz``.

Prints JSON with the largest relative errors of losses, weights and memory. The file holds initial and final weights, the memory before and
after, all crops and permutations, the schedules' values, and the losses (float64, no drop path, no autocast).
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from torch import Tensor

from massl_fast.config import OptimizerSection
from massl_fast.distributed.world import World
from massl_fast.engine.optimizer import build_optimizer
from massl_fast.engine.schedules import StepSettings
from massl_fast.engine.step import TrainStep
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import Precision
from massl_fast.objectives.massl import MasslObjective
from massl_fast.run.checkpoint import load_strictly


def replay(path: str, *, crops_pass: str = "auto", backend: str = "auto", accumulation: int = 1) -> dict[str, float]:
    """Relative errors of a replay in float64 on the CPU. ``accumulation`` splits each step's images into micro-batches."""
    with np.load(path, allow_pickle=False) as file:
        stored = {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}

    def number(name: str) -> int:
        return int(stored[name])

    def encoder() -> Encoder:
        arguments = {"patch_size": number("patch_size"), "depth": number("depth"), "num_heads": number("num_heads")}
        backbone = build_backbone(
            "vit_tiny_patch16_224", image_size=number("image_size"), model_args={**arguments, "embed_dim": number("embed_dim")}
        )
        head = ProjectionHead(backbone.feature_dim, hidden_dim=number("head_hidden"), out_dim=number("head_out"))
        return Encoder(backbone, head, crops_pass=crops_pass).double()

    def weights(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value.double() for name, value in stored.items() if name.startswith(prefix)}

    pair = StudentTeacher(encoder(), encoder())
    with torch.no_grad():
        for network in (pair.student, pair.teacher):
            load_strictly("student", network.state_dict(), weights("init/"))
    permutations = stored["permutations"]
    objective = MasslObjective(
        *stored["memory_init"].shape,
        block_size=number("block_size"),
        student_temperature=float(stored["student_temp"]),
        partition_of_step=lambda step: permutations[step],
        memory_dtype=torch.float64,
        backend=backend,
    )
    objective.memory.copy_(stored["memory_init"])
    train_step = TrainStep(
        pair,
        objective,
        build_optimizer(pair.student, OptimizerSection()),
        world=World(rank=0, size=1, local_rank=0, device=torch.device("cpu")),
        precision=Precision("fp32", "stands for no autocast; the weights are float64"),
        clip=float(stored["clip_grad"]),
        clip_mode="parameter",
    )
    losses = []
    for step, crops in enumerate(stored["crops"].double()):
        settings = StepSettings(
            learning_rate=float(stored["lr"][step]),
            weight_decay=float(stored["weight_decay"][step]),
            teacher_momentum=float(stored["teacher_momentum"][step]),
            own={"teacher_temperature": float(stored["teacher_temp"])},
        )
        micro_batches = [list(part.unbind(0)) for part in crops.chunk(accumulation, dim=1)]
        losses.append(train_step(micro_batches, settings, step).loss)
    assert train_step.failure() is None

    def worst(network: Encoder, prefix: str) -> float:
        return max(relative_error(network.state_dict()[name], value) for name, value in weights(prefix).items())

    return {
        "max_loss_error": ((torch.stack(losses) - stored["losses"]).abs() / stored["losses"].abs()).max().item(),
        "max_student_error": worst(pair.student, "final_student/"),
        "max_teacher_error": worst(pair.teacher, "final_teacher/"),
        "max_memory_error": relative_error(objective.memory, stored["memory_final"].double()),
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/replay.py FILE.npz")
    print(json.dumps(replay(sys.argv[1]), indent=1))
