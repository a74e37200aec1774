"""Whether a checkpoint is of this run: settings that make another run are refused by name, others may change at a checkpoint.

A difference that changes the training from here on (a lower learning rate, a longer run) is announced; one that does not change it is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ANOTHER_RUN = ("crops", "model", "objective", "run.seed", "run.init_from", "train.global_batch")
"""Sections and settings that make another run."""
ANOTHER_WAY = (
    *("model.residual", "objective.backend", "objective.memory_dtype", "model.crops_pass", "model.attention", "model.compile"),
    "model.recompute",
)
"""Settings of those sections that say how the same is computed."""
NOT_TOLD = (
    "run.folder",
    "run.resume",
    "run.plugins",
    "data.train",  # images may lie elsewhere; whether they are the same is seen by their names
    "data.num_workers",
    "model.crops_pass",
    "model.attention",
    "model.compile",
    "model.recompute",
    "data.max_bad_percent",
    "train.stop_at_step",
    "train.device",
    "train.micro_batch",
    "train.cpu_products",
    "train.cuda_graph",
    "parallel",
    "evaluation",
    "logging",
    "checkpoint",
)
# The same step, computed in other ways.
OPTIMIZER_FAMILIES = {"adamw_with_teacher": "adamw", "adamw_apex": "adamw"}


def demand_same_run(path: Path, state: dict[str, Any], settings: dict[str, dict[str, Any]], num_images: int, images: str) -> list[str]:
    """Sentences about what differs and may. ``state``: of the checkpoint at ``path``; ``settings``: the configuration as plain values;
    ``images``: ``Source.names_checksum`` of the images that the loader draws from.

    ValueError naming every setting that makes another run. Settings that only one side knows, as after an update, are not compared.
    """
    stored = state["config"]
    differing = {
        f"{section}.{name}": (stored[section][name], value)
        for section, values in settings.items()
        for name, value in values.items()
        if name in stored.get(section, {}) and stored[section][name] != value
    }
    another = {name: pair for name, pair in differing.items() if _is_one_of(name, ANOTHER_RUN) and name not in ANOTHER_WAY}
    if "optimizer.name" in differing and len({OPTIMIZER_FAMILIES.get(value, value) for value in differing["optimizer.name"]}) == 2:
        another["optimizer.name"] = differing["optimizer.name"]
    problems = [f"{name} {was} (here {now})" for name, (was, now) in another.items()]
    if state["num_images"] != num_images:
        problems.append(f"{state['num_images']} images in data.train (here {num_images})")
    elif state.get("images", images) != images:
        problems.append(f"as many images in data.train under other names (or another data.bad_files), here {settings['data']['train']}")
    if problems:
        raise ValueError(
            f"The checkpoint {path} is of another run. It was made with {'; '.join(problems)}. Use the settings it was made with to go on, "
            f"name another run.folder, start over in this one with run.resume never (the old run is moved aside), or start a new run from "
            f"its weights with run.init_from."
        )
    told = [f"{name} {was} → {now}" for name, (was, now) in differing.items() if not _is_one_of(name, NOT_TOLD)]
    return [f"From this checkpoint on with other settings than before: {', '.join(told)}."] if told else []


def _is_one_of(name: str, listed: tuple[str, ...]) -> bool:
    """Whether a setting, or its section, is listed."""
    return name in listed or name.split(".")[0] in listed
