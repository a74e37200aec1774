"""What the start of a run says: everything that was chosen, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from massl_fast.distributed.world import rank_map
from massl_fast.engine.advice import known_to_fail

if TYPE_CHECKING:
    from massl_fast.engine.trainer import Trainer


def announce(trainer: Trainer) -> None:
    """Say it through the run's telemetry. A collective call: ranks tell where they are."""
    for line in _choices(trainer):
        trainer.telemetry.say(line)
    for sentence in [*trainer.source.notes, *trainer.loader.notes, *trainer.build_notes, *trainer.evaluation.notes]:
        trainer.telemetry.say(sentence)
    for sentence in known_to_fail(trainer.config, trainer.total_steps, len(trainer.source)) + trainer.checkpoints.passed_over():
        trainer.telemetry.warn(sentence)


def _choices(trainer: Trainer) -> list[str]:
    config, world, student = trainer.config, trainer.world, trainer.pair.student
    model, train, objective = config.model, config.train, config.objective
    processes = f"{world.size} process{'es' if world.size > 1 else ''}"
    micro_batches = f"{trainer.accumulation} micro-batch{'es' if trainer.accumulation > 1 else ''}"
    blocks = "compiled" if model.compile else "as PyTorch's own kernels"
    taken = "recorded once as a CUDA graph" if train.cuda_graph else "launched from Python"
    kept = "" if model.recompute == "nothing" else f"; the backward pass recomputes {model.recompute}"
    tokens = ", bf16 tokens between blocks" if model.residual == "bf16" else ""
    scope = f", the same on all {world.size} ranks" if objective.partition_scope == "shared" else ", another on each rank"
    return [
        f"Run       {trainer.folder}: {trainer.total_steps} steps, {trainer.total_steps / trainer.steps_per_epoch:.1f} epochs of "
        f"{trainer.steps_per_epoch} steps over {len(trainer.source)} images",
        *(f"Device    {line}" for line in rank_map(world)),
        f"Batch     {train.global_batch} images = {processes} × {micro_batches} × {trainer.device_batch}",
        f"Strategy  {trainer.strategy} ({trainer.strategy_reason})",
        f"Precision {trainer.precision.name} ({trainer.precision.reason})",
        f"Loader    {trainer.loader.name} ({trainer.loader.reason})",
        f"Model     {model.architecture}, crops pass: {student.pass_name} ({student.pass_reason})",
        f"Step      blocks {blocks}, {taken}; optimizer {config.optimizer.name}{kept}{tokens}",
        f"Loss      backend {trainer.backend}; memory {objective.memory_size} × {model.embedding_dim}, "
        f"blocks of {objective.block_size}, {objective.partition}{scope if world.size > 1 else ''}",
        f"Rates     peak learning rate {trainer.schedules.peak_learning_rate:.3g}; "
        f"{trainer.flops_per_step / train.global_batch / 1e9:.3g} GFLOP an image",
    ]
