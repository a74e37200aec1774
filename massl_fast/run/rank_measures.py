"""RankMe and LiDAR of a run, from features that the student's last step has made anyway: nothing is computed twice, drawn or changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from massl_fast.distributed.world import World
from massl_fast.evaluation.metrics.rank import lidar, rankme
from massl_fast.objectives.base import Metric

RANK_METRICS = (
    Metric(
        "rankme",
        "RankMe of the student's features",
        note="Dimensions that the features of the step's global crops use; a fall towards 1 is collapse.",
    ),
    Metric(
        "lidar",
        "LiDAR of the student's features",
        note="Directions that tell images apart better than views of one image; at most the images of a micro-batch less one.",
    ),
)


class RankMeasures:
    """Watches what the student's head is given.

    Args:
        head: module whose first argument is [V·N, C], view-major.
        views: V.
        global_views: views that RankMe is taken of, the first ones.
    """

    def __init__(self, head: nn.Module, views: int, global_views: int) -> None:
        self.views, self.global_views = views, global_views
        self._last: Tensor | None = None
        head.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, arguments: tuple) -> None:
        if torch.is_grad_enabled():  # a training step, not an evaluation
            self._last = arguments[0].detach()

    def read(self, world: World) -> dict[str, float]:
        """{rankme, lidar} of the last micro-batch, means over ranks; nothing before the first step. With several ranks a collective
        call.
        """
        if self._last is None:
            return {}
        rows = self._last.float().cpu().unflatten(0, (self.views, -1))
        found = torch.tensor([rankme(rows[: self.global_views].flatten(0, 1)), lidar(rows)], device=world.device)
        return {metric.key: round(value, 3) for metric, value in zip(RANK_METRICS, world.mean(found).tolist())}
