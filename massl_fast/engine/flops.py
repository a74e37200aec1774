"""Operations of a training step: networks from shapes, loss and heads as the objective counts them.

Model-FLOPs utilisation = ``step_flops(...)`` / (seconds per step · devices · ``hardware.peak_flops(...)``).
"""

from __future__ import annotations

from collections.abc import Sequence

from massl_fast.models.flops import backbone_flops
from massl_fast.models.pair import StudentTeacher
from massl_fast.objectives.base import Objective


def step_flops(
    pair: StudentTeacher, objective: Objective, *, crop_sizes: Sequence[int], batch: int, whole_last_block: bool = False
) -> float:
    """Operations of one training step over ``batch`` images.

    ``crop_sizes``: sides in pixels of the V student views, of which the teacher sees the first T. ``whole_last_block``: see
    ``models.flops``; an objective that needs patch tokens computes it whole.
    """
    whole = whole_last_block or objective.needs_patches
    found = {size: backbone_flops(pair.student.backbone, size, whole_last_block=whole) for size in set(crop_sizes)}
    student = sum(sum(found[size]) for size in crop_sizes)
    teacher = sum(found[size][0] for size in crop_sizes[: objective.teacher_views])
    views = len(crop_sizes)
    heads = objective.head_flops(pair.student.head, pair.teacher.head, views)
    return batch * (student + teacher + heads + objective.loss_flops(views))
