"""Student, teacher and objective as the settings describe them, still on the CPU."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from massl_fast.config import Config
from massl_fast.engine.precision import DTYPES, Precision
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from massl_fast.models.pair import StudentTeacher
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
