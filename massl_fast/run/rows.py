"""What a run writes down about itself: the rows of metrics.jsonl, and summary.json."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from massl_fast.distributed.stragglers import StragglerClock
from massl_fast.distributed.world import device_name
from massl_fast.engine.schedules import StepSettings
from massl_fast.run.outputs import memory_peaks_gib, rows_up_to, versions

if TYPE_CHECKING:
    from massl_fast.engine.trainer import Trainer


def learning_of(trainer: Trainer, means: list[float], settings: StepSettings) -> dict[str, Any]:
    """What two equal runs share of a row. ``means``: a ``StepResult`` as numbers, means over all ranks."""
    loss, student_entropy, teacher_entropy, kl, gradient_norm, embedding_spread = means
    step, batch = trainer.step, trainer.config.train.global_batch
    row = {
        "step": step,
        "epoch": round(step / trainer.steps_per_epoch, 4),
        "images_seen": step * batch,
        "loss": loss,
        "student_entropy_nats": student_entropy,
        "teacher_entropy_nats": teacher_entropy,
        "kl_nats": kl,
        "gradient_norm": gradient_norm,
        "embedding_spread": embedding_spread,
        "memory_spread": trainer.objective.spread().item(),
        "memory_age_steps": round(trainer.objective.oldest_entry_steps(step, batch), 2),
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "teacher_momentum": settings.teacher_momentum,
        "teacher_temperature": settings.teacher_temperature,
    }
    if trainer.train_step.scaler.enabled:
        row["loss_scale"] = trainer.train_step.scaler.scale.item()
    return row


def speed_of(trainer: Trainer, seconds: float, waited: float, stragglers: StragglerClock) -> dict[str, Any]:
    """What the clock says (``telemetry.CLOCK_KEYS``), of steps that took ``seconds`` each, a share ``waited`` of it waiting for data.

    With several ranks a collective call.
    """
    batch, size = trainer.config.train.global_batch, trainer.world.size
    utilization = trainer.flops_per_step / (seconds * size * trainer.peak_flops) if trainer.peak_flops else None
    return {
        "images_per_second": round(batch / seconds, 2),
        "images_per_second_per_device": round(batch / seconds / size, 2),
        "step_seconds": round(seconds, 5),
        **(stragglers.spread(seconds) if size > 1 else {}),
        "data_wait_percent": round(100 * waited, 2),
        "model_flops_utilization_percent": round(100 * utilization, 2) if utilization else None,
        **memory_peaks_gib(trainer.world.device),
    }


def summary_of(trainer: Trainer) -> dict[str, Any]:
    """What a run that has come to its end was and used."""
    # A run that was killed between its last checkpoint and its summary has no row of its own.
    last = trainer.last_row or next(reversed(rows_up_to(trainer.folder / "metrics.jsonl", trainer.step)), {})
    return {
        "loss": last.get("loss"),
        "knn_untrained_percent": trainer.evaluation.headline("untrained"),
        "knn_percent": trainer.evaluation.headline("teacher"),
        "images_per_second": last.get("images_per_second"),
        "steps": trainer.step,
        "bad_files": trainer.loader.num_bad,
        "device": device_name(trainer.world.device),
        "world_size": trainer.world.size,
        "strategy": trainer.strategy,
        "precision": trainer.precision.name,
        "backend": trainer.backend,
        "loader": trainer.loader.name,
        "crops_pass": trainer.pair.student.pass_name,
        "warnings": trainer.telemetry.warnings,
        "versions": versions(),
    }


def write_summary(trainer: Trainer, summary: dict[str, Any]) -> None:
    temporary = trainer.folder / ".summary.json.partial"
    temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, trainer.folder / "summary.json")
