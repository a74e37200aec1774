"""What a run writes down about itself: the rows of metrics.jsonl, and summary.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from massl_fast.length import Length


def learning_row(step: int, length: Length, means: Mapping[str, float], settings: Mapping[str, float]) -> dict[str, Any]:
    """What two equal runs share of a row. ``means``: loss and metrics over all ranks; ``settings``: what the step was taken with."""
    return {"step": step, "epoch": round(length.epoch(step), 4), "images_seen": step * length.global_batch, **means, **settings}


def clock_row(
    seconds: float, waited: float, *, length: Length, world_size: int, flops_per_step: float, peak_flops: float | None
) -> dict[str, float | None]:
    """Rates of steps that took ``seconds`` each, a share ``waited`` of it waiting for data.

    ``model_flops_utilization_percent`` = operations that a step needs (nothing recomputed counted) / (seconds per step × devices × dense
    peak of one device in the step's precision); None where no peak is known.
    """
    utilization = flops_per_step / (seconds * world_size * peak_flops) if peak_flops else None
    return {
        "images_per_second": round(length.global_batch / seconds, 2),
        "images_per_second_per_device": round(length.global_batch / seconds / world_size, 2),
        "step_seconds": round(seconds, 5),
        "data_wait_percent": round(100 * waited, 2),
        "model_flops_utilization_percent": round(100 * utilization, 2) if utilization else None,
    }


def write_json(value: Any, path: Path) -> None:
    """Whole or absent."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
