"""Objective, student and teacher as the settings describe them, still on the CPU; and the step of them, once they are where they train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from massl_fast.config import Config
from massl_fast.distributed.world import World, choose_exchange
from massl_fast.engine.optimizer import build_optimizer
from massl_fast.engine.step import TrainStep
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.packed import Attend
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import Precision
from massl_fast.models.published import start_from
from massl_fast.objectives import objective_class
from massl_fast.objectives.base import Objective


def build_objective(config: Config, precision: Precision, rank: int) -> Objective:
    """The objective that ``objective.name`` names."""
    return objective_class(config.objective.name).build(config, precision, rank)


def build_pair(config: Config, objective: Objective, attention: Attend | None = None) -> tuple[StudentTeacher, list[str]]:
    """Both encoders, and sentences about the weights they start from, which depend on ``run.seed`` alone, not on the device.

    ``attention``: see ``Encoder``.
    """
    model, crops = config.model, config.crops
    torch.manual_seed(config.run.seed)

    def backbone(drop_path: float) -> nn.Module:
        return build_backbone(
            model.architecture,
            image_size=crops.global_size,
            other_sizes=[crops.local_size] if crops.num_local else [],
            drop_path=drop_path,
            model_args=model.model_args,
            position_embedding=model.position_embedding,
        )

    student = backbone(model.drop_path)
    heads = objective.heads(student.feature_dim)
    notes = start_from(student, Path(config.run.init_from)) if config.run.init_from else []
    patch_views = objective.teacher_views if objective.needs_patches else 0
    student, teacher = (
        Encoder(
            network,
            head,
            crops_pass=model.crops_pass,
            recompute=recompute,
            residual=model.residual,
            patch_views=patch_views,
            attention=attention,
        )
        for network, head, recompute in zip((student, backbone(0.0)), heads, (model.recompute, "nothing"))
    )
    return StudentTeacher(student, teacher), notes


def demand_residual(config: Config, precision: Precision) -> None:
    """Raise ValueError where model.residual sets 16-bit tokens between blocks and the step has another precision."""
    if config.model.residual == "bf16" and precision.name != "bf16":
        raise ValueError(
            f"model.residual is bf16, but the step's precision is {precision.name} ({precision.reason}). Choose "
            f"train.precision bf16, or model.residual fp32."
        )


def build_step(
    config: Config,
    pair: StudentTeacher,
    objective: Objective,
    world: World,
    precision: Precision,
    before_exchange: Callable[[], None] = lambda: None,
) -> TrainStep:
    """The step of ``pair`` and ``objective``, which lie on ``world.device``, with the optimizer and clipping of the settings.

    Raises ValueError for an optimizer that cannot run here, or an exchange of gradients or an order of the teacher's move that does not
    fit the rest.
    """
    sharded = isinstance(pair.student, FSDPModule)
    exchange, _ = choose_exchange(config.parallel.gradients, recorded=config.train.cuda_graph, sharded=sharded, world_size=world.size)
    return TrainStep(
        pair,
        objective,
        build_optimizer(pair.student, config.optimizer),
        world=world,
        precision=precision,
        clip=config.optimizer.clip,
        clip_mode=config.optimizer.clip_mode,
        before_exchange=before_exchange,
        flat_gradients=exchange == "flat",
        teacher_first=config.teacher.moves == "before_student",
    )
