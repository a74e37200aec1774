"""Floating-point operations of a training step: those of the networks and those of the loss.

Model-FLOPs utilisation = ``step_flops(...)`` / (seconds per step · devices · ``hardware.peak_flops(...)``).
"""

from __future__ import annotations

from collections.abc import Sequence

from massl_fast.config import Config
from massl_fast.data.loaders import views_of
from massl_fast.engine.step import NUM_TEACHER_VIEWS
from massl_fast.models.backbone import Encoder
from massl_fast.models.flops import pair_flops


def step_flops(
    encoder: Encoder,
    *,
    crop_sizes: Sequence[int],
    num_teacher_views: int,
    batch: int,
    memory_size: int,
    whole_last_block: bool = False,
) -> float:
    """Operations of one training step over ``batch`` images.

    ``crop_sizes``: sides in pixels of the V student views, of which the teacher sees the first ``num_teacher_views`` (T).
    ``memory_size``: entries of the memory that take part (whole blocks). The loss is 4·D·(V+T)·K operations per image: two
    products with the memory per view, gradient included.
    """
    networks = pair_flops(encoder, crop_sizes=crop_sizes, num_teacher_views=num_teacher_views, whole_last_block=whole_last_block)
    memory = 4 * encoder.head.mlp[-1].out_features * (len(crop_sizes) + num_teacher_views) * memory_size
    return batch * (networks + memory)


def flops_of_run(config: Config, encoder: Encoder, batch: int) -> float:
    """Operations of one step of the run that ``config`` describes, over ``batch`` images."""
    return step_flops(
        encoder,
        crop_sizes=[view.size for view in views_of(config.crops)],
        num_teacher_views=NUM_TEACHER_VIEWS,
        batch=batch,
        memory_size=config.objective.entries_in_blocks,
    )
