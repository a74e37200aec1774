"""What a run folder holds, read for reports and tables: whole, cut off at any moment, or from another version."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from massl_fast.config import parsed_yaml
from massl_fast.objectives.base import COLLAPSED_SPREAD
from massl_fast.run.checkpoint import CheckpointFolder, read_state
from massl_fast.run.outputs import DECLARATIONS, warnings_of

HEADLINE_K = 20
KNN_KEY = re.compile(r"knn_(untrained|teacher|student)_k(\d+)_percent")


@dataclass(frozen=True)
class Declared:
    """A metric as the run's objective declared it (``objectives.base.Metric``)."""

    key: str
    title: str
    unit: str = ""
    note: str = ""
    figure: str = ""
    """Metrics of one figure are drawn in one plot."""
    level: tuple[str, float] | None = None
    """A dashed line: its name and where."""
    collapsed: tuple[str, float] | None = None
    """below or above, and from where on the representation has collapsed."""


@dataclass
class RunFolder:
    path: Path
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """config.yaml; empty if there is none."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl, one entry per step, ascending; of two lines for the same step the later one counts."""
    declared: list[Declared] = field(default_factory=list)
    """What the objective says of its metrics, in the order in which they are drawn."""
    summary: dict[str, Any] = field(default_factory=dict)
    """summary.json; empty if the run has not ended."""
    warnings: list[str] = field(default_factory=list)
    """What the run has warned of, from its start on."""
    advice: list[str] = field(default_factory=list)
    """Those of the warnings that say which settings to change."""
    bad_files: list[str] = field(default_factory=list)
    """Lines of bad_files.txt."""
    stopped: str = ""
    """"stopped at step N of M, as set" where train.stop_at_step ended the run before its end; otherwise empty."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what is missing or damaged."""

    def setting(self, section: str, name: str) -> Any:
        values = self.settings.get(section)
        return values.get(name) if isinstance(values, dict) else None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the rows that hold a number under `key`."""
        found = [(row["step"], row[key]) for row in self.rows if is_number(row.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    def knn(self) -> dict[str, dict[int, tuple[list[float], list[float]]]]:
        """{network: {k: (steps, percentages)}}."""
        found: dict[str, dict[int, tuple[list[float], list[float]]]] = {}
        for key in sorted({key for row in self.rows for key in row}):
            if match := KNN_KEY.fullmatch(key):
                steps, values = self.series(key)
                if values:
                    found.setdefault(match[1], {})[int(match[2])] = (steps, values)
        return found

    def headline_knn(self, network: str) -> tuple[int, list[float], list[float]] | None:
        """(k, steps, percentages) of a network at k = 20, or at the smallest k where 20 was not evaluated; None without k-NN."""
        by_k = self.knn().get(network)
        if not by_k:
            return None
        k = HEADLINE_K if HEADLINE_K in by_k else min(by_k)
        return k, *by_k[k]

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def total_steps(self) -> int | None:
        """How long the run is; None where neither its settings nor a checkpoint say."""
        steps, epochs = (self.setting("train", name) for name in ("steps", "epochs"))
        if is_number(steps) and steps:
            return int(steps)
        steps_per_epoch = self.checkpoint_state().get("steps_per_epoch")
        return max(1, round(epochs * steps_per_epoch)) if is_number(epochs) and is_number(steps_per_epoch) else None

    def checkpoint_state(self) -> dict[str, Any]:
        """``state.json`` of the last checkpoint; empty where there is none or it is damaged."""
        try:
            checkpoint = CheckpointFolder(self.path / "checkpoints").last()
            return read_state(checkpoint) if checkpoint else {}
        except ValueError:
            return {}


def read_run(path: Path | str) -> RunFolder:
    """Read a run folder.

    Raises:
        ValueError: there is no such folder, or it holds neither config.yaml nor metrics.jsonl.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}. Name the folder that `massl-fast train` writes, for example runs/demo.")
    if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        raise ValueError(
            f"{path} is not a run folder: it holds neither config.yaml nor metrics.jsonl. Name a folder written by `massl-fast train`."
        )
    run = RunFolder(path)
    run.settings = _settings(run)
    run.rows = _rows(run)
    run.declared = _declared(run)
    run.summary = _summary(run)
    warned = warnings_of(path)
    run.warnings = [one["sentence"] for one in warned] or _sentences(run.summary.get("warnings"))
    run.advice = [one["sentence"] for one in warned if one["advice"]]
    bad_files = path / "bad_files.txt"
    if bad_files.is_file():
        run.bad_files = [line for line in bad_files.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    run.stopped = _stopped(run)
    if run.stopped:
        run.notes.append(f"The run {run.stopped} (train.stop_at_step); the same command without it continues.")
    elif not run.summary:
        run.notes.append(f"There is no summary.json: the run has not reached its end. Its last logged step is {run.last_step}.")
    elif is_number(run.summary.get("steps")) and run.last_step > run.summary["steps"]:
        run.notes.append(
            f"summary.json is of an earlier end at step {run.summary['steps']}; the run was continued and has logged step {run.last_step}."
        )
    return run


def _stopped(run: RunFolder) -> str:
    stop, steps = run.setting("train", "stop_at_step"), run.total_steps
    if not is_number(stop) or not 0 < stop <= run.last_step:
        return ""
    # A run that is killed in its last step has logged it and has no checkpoint of it.
    if run.checkpoint_state().get("step") != run.last_step or steps is None or run.last_step >= steps:
        return ""
    return f"stopped at step {run.last_step} of {steps}, as set"


def _settings(run: RunFolder) -> dict[str, dict[str, Any]]:
    try:
        settings = parsed_yaml((run.path / "config.yaml").read_text(encoding="utf-8"), "the file")
    except FileNotFoundError:
        run.notes.append("There is no config.yaml: the settings of the run are not known.")
        return {}
    except ValueError as error:
        run.notes.append(f"config.yaml cannot be read: {error}")
        return {}
    return settings if isinstance(settings, dict) else {}


def _rows(run: RunFolder) -> list[dict[str, Any]]:
    try:
        lines = (run.path / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        run.notes.append("There is no metrics.jsonl: no step has been logged.")
        return []
    rows: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        run.notes.append(f"{damaged} of {len(lines)} lines of metrics.jsonl are cut off or damaged and were left out.")
    return [rows[step] for step in sorted(rows)]


def _summary(run: RunFolder) -> dict[str, Any]:
    try:
        summary = json.loads((run.path / "summary.json").read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        run.notes.append(f"summary.json cannot be read: {error}")
        return {}
    return summary if isinstance(summary, dict) else {}


def _sentences(found: Any) -> list[str]:
    """Warnings as summary.json has them, those of runs from before ``WARNINGS`` among them."""
    return [str(one) for one in (found if isinstance(found, list) else [found])] if found else []


def _declared(run: RunFolder) -> list[Declared]:
    """The declarations that the run stored; of a run from before there were any, those of MaSSL, which all such runs trained."""
    try:
        found = json.loads((run.path / DECLARATIONS).read_bytes())
        return [_metric(entry) for entry in found]
    except FileNotFoundError:
        return _before_declarations(run)
    except (ValueError, TypeError, KeyError) as error:
        run.notes.append(f"{DECLARATIONS} cannot be read: {error}. Metrics of the objective are not drawn.")
        return []


def _metric(entry: dict[str, Any]) -> Declared:
    words = {name: str(entry.get(name) or "") for name in ("unit", "note", "figure")}
    level = entry.get("level")
    marked = (str(level[0]), float(level[1])) if level else None
    side, limit = entry.get("collapsed") or ("", 0.0)
    collapsed = (str(side), float(limit)) if side in ("below", "above") else None
    return Declared(str(entry["key"]), str(entry["title"]), **words, level=marked, collapsed=collapsed)


def _before_declarations(run: RunFolder) -> list[Declared]:
    block = run.setting("objective", "block_size")
    level = (f"ln(block size) = {math.log(block):.2f}", math.log(block)) if is_number(block) and block > 0 else None
    entropy = {"unit": "nats", "figure": "Entropy over a block", "level": level}
    collapse = "Collapse shows at either end: 0, all weight on one entry; ln(block size), the same weight on all."
    spread = {"note": "1 − ‖mean‖²: 1 if spread evenly over the sphere, 0 if all are equal.", "figure": "Spread of unit vectors"}
    size = run.setting("objective", "memory_size")
    return [
        Declared("loss", "Loss", "nats", "Cross-entropy of student views against teacher views over blocks of the memory."),
        Declared("student_entropy_nats", "student", note=collapse, **entropy),
        Declared("teacher_entropy_nats", "teacher", **entropy),
        Declared("kl_nats", "KL divergence, teacher to student", "nats", "The loss without the teacher's entropy."),
        Declared("embedding_spread", "embeddings", **spread, collapsed=("below", COLLAPSED_SPREAD)),
        Declared("memory_spread", "memory", **spread, collapsed=("below", COLLAPSED_SPREAD)),
        Declared("memory_age_steps", "Age of the oldest memory entry", "steps", f"The memory holds {size} embeddings." if size else ""),
    ]


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
