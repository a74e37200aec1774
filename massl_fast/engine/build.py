"""Student, teacher and objective as the settings describe them, still on the CPU; and the step of them, once they are where they train."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from massl_fast.config import Config
from massl_fast.distributed.world import World
from massl_fast.engine.optimizer import build_optimizer
from massl_fast.engine.step import TrainStep
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import DTYPES, Precision
from massl_fast.models.published import start_from
from massl_fast.objectives.massl import MasslObjective


def build_pair(config: Config) -> tuple[StudentTeacher, list[str]]:
    """Both encoders, and sentences about weights they start from. The weights depend on ``run.seed`` alone: the same on every device."""
    model, crops = config.model, config.crops
    torch.manual_seed(config.run.seed)

    def encoder(drop_path: float, recompute: str = "nothing") -> Encoder:
        backbone = build_backbone(
            model.architecture,
            image_size=crops.global_size,
            other_sizes=[crops.local_size] if crops.num_local else [],
            drop_path=drop_path,
            model_args=model.model_args,
        )
        head = ProjectionHead(
            backbone.feature_dim, hidden_dim=model.head_hidden_dim, out_dim=model.embedding_dim, num_layers=model.head_layers
        )
        return Encoder(backbone, head, crops_pass=model.crops_pass, recompute=recompute, residual=model.residual)

    student = encoder(model.drop_path, model.recompute)
    notes = start_from(student.backbone, Path(config.run.init_from)) if config.run.init_from else []
    return StudentTeacher(student, encoder(0.0)), notes


def build_objective(config: Config, precision: Precision, rank: int) -> MasslObjective:
    objective, seed = config.objective, config.run.seed
    shared = objective.partition_scope == "shared"
    return MasslObjective(
        objective.memory_size,
        config.model.embedding_dim,
        block_size=objective.block_size,
        student_temperature=objective.student_temperature,
        block_reduction=objective.block_reduction,
        enqueue_view=objective.enqueue_view,
        partition=objective.partition,
        seed=seed,
        partition_seed=seed if shared else zlib.crc32(f"{seed}/partition/{rank}".encode()),
        memory_dtype=precision.dtype if objective.memory_dtype == "auto" else DTYPES[objective.memory_dtype],
        backend=objective.backend,
    )


def demand_residual(config: Config, precision: Precision) -> None:
    """ValueError where 16-bit tokens between blocks are asked for in a step of another precision."""
    if config.model.residual == "bf16" and precision.name != "bf16":
        raise ValueError(
            f"model.residual is bf16, but the step's precision is {precision.name} ({precision.reason}). Choose "
            f"train.precision bf16, or model.residual fp32."
        )


def build_step(config: Config, pair: StudentTeacher, objective: MasslObjective, world: World, precision: Precision) -> TrainStep:
    """The step of ``pair`` and ``objective``, which lie on ``world.device``, with the optimizer and clipping of the settings.

    Raises ValueError for an optimizer that cannot run here.
    """
    return TrainStep(
        pair,
        objective,
        build_optimizer(pair.student, config.optimizer),
        world=world,
        precision=precision,
        clip=config.optimizer.clip,
        clip_mode=config.optimizer.clip_mode,
    )
