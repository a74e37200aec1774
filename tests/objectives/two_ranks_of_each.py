"""What two processes do in turn for test_two_ranks_of_each.py: ``python two_ranks_of_each.py WORKPLACE``, with RANK and so on set.

One start serves all objectives and strategies, because importing is most of what a start costs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from massl_fast.distributed.world import join_world, leave_world
from massl_fast.engine.trainer import Trainer
from small import OBJECTIVES, settings_of


def main(workplace: Path) -> None:
    torch.set_num_threads(1)
    world = join_world("cpu", timeout_seconds=120)
    for name in OBJECTIVES:
        for strategy in ("ddp", "fsdp2"):
            config = settings_of(name, workplace, parallel={"strategy": strategy}, train={"stop_at_step": 20, "steps": 21})
            config.run.folder += f"-{strategy}"
            Trainer(config, world).run()
    leave_world()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]))
