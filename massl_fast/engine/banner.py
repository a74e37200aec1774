"""What the start of a run says: everything that was chosen, and why."""

from __future__ import annotations

from massl_fast.config import Config
from massl_fast.data.loaders import Loader
from massl_fast.distributed.world import World, rank_map
from massl_fast.length import Length
from massl_fast.models.backbone import Encoder
from massl_fast.models.precision import Precision


def banner(
    config: Config,
    world: World,
    length: Length,
    *,
    num_images: int,
    strategy: str,
    precision: Precision,
    loader: Loader,
    student: Encoder,
    objective: str,
    peak_learning_rate: float,
    flops_per_image: float,
) -> list[str]:
    """One line per choice. ``strategy``: its name and reason; ``objective``: ``Objective.line``. A collective call."""
    model, train = config.model, config.train
    processes = f"{world.size} process{'es' if world.size > 1 else ''}"
    micro_batches = f"{length.accumulation} micro-batch{'es' if length.accumulation > 1 else ''}"
    blocks = "compiled" if model.compile else "as PyTorch's own kernels"
    taken = "recorded once as a CUDA graph" if train.cuda_graph else "launched from Python"
    kept = "" if model.recompute == "nothing" else f"; the backward pass recomputes {model.recompute}"
    tokens = ", bf16 tokens between blocks" if model.residual == "bf16" else ""
    return [
        f"Run       {config.run.folder}: {length.total_steps} steps, {length.epoch(length.total_steps):.1f} epochs of "
        f"{length.steps_per_epoch} step{'s' if length.steps_per_epoch > 1 else ''} over {num_images} images",
        *(f"Device    {line}" for line in rank_map(world)),
        f"Batch     {length.global_batch} images = {processes} × {micro_batches} × {length.micro_batch}",
        f"Strategy  {strategy}",
        f"Precision {precision.name} ({precision.reason})",
        f"Loader    {loader.name} ({loader.reason})",
        f"Model     {model.architecture}, crops pass: {student.pass_name} ({student.pass_reason}); attention "
        f"{student.attention_name} ({student.attention_reason})",
        f"Step      blocks {blocks}, {taken}; optimizer {config.optimizer.name}{kept}{tokens}",
        f"Loss      {objective}",
        f"Rates     peak learning rate {peak_learning_rate:.3g}; {flops_per_image / 1e9:.3g} GFLOP per image",
    ]
