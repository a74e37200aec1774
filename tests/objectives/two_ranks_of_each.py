"""What two processes do in turn for test_two_ranks_of_each.py: ``python two_ranks_of_each.py WORKPLACE``, with RANK and so on set.

One start serves all objectives and strategies, because importing is most of what a start costs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from massl_fast.distributed.world import join_world, leave_world
from massl_fast.engine.trainer import Trainer
from small import AS_ONE, OBJECTIVES, STEPS, STRATEGIES, losses_as_one, settings_of


def main(workplace: Path) -> None:
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_seconds=120)
    for name in OBJECTIVES:
        for strategy in STRATEGIES:
            config = settings_of(name, workplace, parallel={"strategy": strategy}, train={"stop_at_step": STEPS, "steps": STEPS + 1})
            config.run.folder += f"-{strategy}"
            Trainer(config, world).run()
    torch.nn.BatchNorm1d = BatchNormOfAllRanks
    losses = {name: losses_as_one(name, world) for name in AS_ONE}
    if world.is_main:
        (workplace / "as_one.json").write_text(json.dumps(losses))
    leave_world()


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class BatchNormOfAllRanks(torch.nn.BatchNorm1d):
    """What SyncBatchNorm, which PyTorch has for GPUs alone, is in training: mean and variance of the rows of all ranks."""

    def forward(self, rows):
        assert self.training
        mean = SumOverRanks.apply(rows.mean(0)) / dist.get_world_size()
        variance = SumOverRanks.apply((rows - mean).square().mean(0)) / dist.get_world_size()
        normalised = (rows - mean) * (variance + self.eps).rsqrt()
        return normalised if self.weight is None else normalised * self.weight + self.bias


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]))
