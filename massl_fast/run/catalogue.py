"""Runs as rows of a table: what each trains, how far it is, what it reached and whether it is alive. From run folders alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from massl_fast.run.lock import sign_of_life
from massl_fast.run.reading import RunFolder, is_number, read_run

EVALUATION = "evaluation"
"""Below a run's folder: results that `massl-fast eval --out` wrote there."""
OWN = ("run.folder",)
"""Settings in which all runs differ."""


@dataclass(frozen=True)
class Entry:
    """One run."""

    name: str
    objective: str
    network: str
    data: str
    step: int
    total_steps: int | None
    images_per_second: float | None
    """Median over the logged lines."""
    knn_percent: float | None
    """k-NN accuracy of the teacher at the last evaluation."""
    linear_percent: float | None
    state: str
    """complete, running, stopped as set, stopped or dead; the latter two with the last sign of life."""
    since: str = ""
    """ISO date of the last sign of life of a run that ended early; empty otherwise."""
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    """section.key: value."""


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Run folders at and below ``folders``, sorted; links to folders and hidden folders are not followed.

    Raises ValueError where a folder is missing.
    """
    found: set[Path] = set()
    for top in folders:
        if not top.is_dir():
            raise ValueError(f"There is no folder {top}. Name folders that hold runs; `massl-fast train` writes them into the folder runs.")
        for where, below, files in os.walk(top):
            if "config.yaml" in files and "metrics.jsonl" in files:
                found.add(Path(where))
                below.clear()
            below[:] = [name for name in below if not name.startswith(".")]
    return sorted(found)


def entry_of(path: Path) -> Entry:
    """The row of one run folder."""
    run = read_run(path)
    state, since = _state(run)
    knn = run.headline_knn("teacher")
    speeds = run.series("images_per_second")[1]
    return Entry(
        name=str(path),
        objective=str(run.summary.get("objective") or run.setting("objective", "name") or ""),
        network=str(run.setting("model", "architecture") or ""),
        data=str(run.setting("data", "train") or ""),
        step=run.last_step,
        total_steps=run.total_steps or _integer(run.summary.get("steps")),
        images_per_second=round(median(speeds), 1) if speeds else None,
        knn_percent=knn[2][-1] if knn else None,
        linear_percent=_linear(run),
        state=state,
        since=since,
        settings=settings_of(run),
    )


def settings_of(run: RunFolder) -> dict[str, Any]:
    """Settings as ``section.key``: value."""
    return {
        f"{section}.{key}": value
        for section, values in run.settings.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if f"{section}.{key}" not in OWN
    }


def differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, list[int]]]]:
    """{setting: [(value, positions of the runs that have it), …]} of the settings in which the runs differ; a dash where one has none."""
    found: dict[str, list[tuple[str, list[int]]]] = {}
    for key in dict.fromkeys(key for one in settings for key in one):
        values: dict[str, list[int]] = {}
        for position, one in enumerate(settings):
            values.setdefault(json.dumps(one[key]).strip('"') if key in one else "–", []).append(position)
        if len(values) > 1:
            found[key] = list(values.items())
    return found


def _state(run: RunFolder) -> tuple[str, str]:
    """(state, date of the last sign of life where the run ended early)."""
    sign = sign_of_life(run.path)
    if sign and sign[0]:
        return "running", ""
    if run.stopped:
        return "stopped as set", ""
    if is_number(run.summary.get("steps")) and run.last_step <= run.summary["steps"]:
        return "complete", ""
    last = sign[1] if sign else (run.path / "metrics.jsonl").stat().st_mtime
    # A lock that is left behind is that of a process that could not say goodbye.
    return ("dead" if sign else "stopped"), datetime.fromtimestamp(last).isoformat(timespec="minutes")


def _linear(run: RunFolder) -> float | None:
    """The teacher's linear probe: the last one within the run, or else the one that `massl-fast eval --out RUN/evaluation` wrote."""
    for key in ("linear_teacher_chosen_percent", "linear_teacher_best_percent"):
        if values := run.series(key)[1]:
            return values[-1]
    try:
        whole = json.loads((run.path / EVALUATION / "result.json").read_text(encoding="utf-8"))
        for one in whole.get("results", []) if "protocol" not in whole else [whole]:
            if one["protocol"] == "linear" and is_number(value := one["results"]["teacher"][one["headline"]]):
                return value
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # the report says what is wrong with the file
    return None


def _integer(value: Any) -> int | None:
    return int(value) if is_number(value) else None
