"""What a person sees of a run: progress bar, metrics.jsonl, TensorBoard, Weights & Biases, summary.json.

Rates are taken over the steps since the line before. ``data_wait_percent`` is the share of that time in which the host waited for a batch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from massl_fast.extras import needs
from massl_fast.objectives.base import Metric
from massl_fast.run.rows import write_json

CLOCK_KEYS = (
    "images_per_second",
    "images_per_second_per_device",
    "step_seconds",
    "step_seconds_slowest",
    "step_seconds_fastest",
    "slowest_rank",
    "data_wait_percent",
    "model_flops_utilization_percent",
    "memory_allocated_peak_gib",
    "memory_reserved_peak_gib",
    "host_memory_peak_gib",
)
GIB = 2**30
NONE: Mapping[str, str] = MappingProxyType({})
DECLARATIONS = "metrics.schema.json"
"""What the objective says of its metrics, in the run's folder for whoever reads it later."""
WARNINGS = "warnings.json"
"""What the run has warned of: objects with ``sentence``, ``step`` (null for what a start of the run says of its settings) and ``advice``
(true where the sentence says which settings to change)."""


def warnings_of(folder: Path) -> list[dict[str, Any]]:
    """The entries of ``WARNINGS`` in a run's folder; none where the file is missing, damaged or of another form."""
    try:
        found = json.loads((folder / WARNINGS).read_bytes())
    except (OSError, ValueError):
        return []
    entries = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return [
        {
            "step": step if isinstance(step := one.get("step"), int) else None,
            "sentence": one["sentence"],
            "advice": one.get("advice") is True,
        }
        for one in entries
        if isinstance(one.get("sentence"), str)
    ]


class WindowClock:
    """Time since the last logged line, and how much of it went by waiting for data. ``now`` gives seconds."""

    def __init__(self, now=time.perf_counter):
        self.now = now
        self.restart()

    def restart(self) -> None:
        self.started, self.waited, self.steps = self.now(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside counts as waiting."""
        before = self.now()
        yield
        self.waited += self.now() - before

    def step_done(self) -> None:
        self.steps += 1

    def read(self) -> tuple[float, float]:
        """(seconds per step, share of the time spent waiting for data) since the restart."""
        elapsed = self.now() - self.started
        return elapsed / max(self.steps, 1), self.waited / elapsed if elapsed > 0 else 0.0


def memory_peaks_gib(device: torch.device) -> dict[str, float | None]:
    """Peaks since the last call on a GPU (None on the CPU), and the host's since the process began."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    if device.type != "cuda":
        return {"memory_allocated_peak_gib": None, "memory_reserved_peak_gib": None, "host_memory_peak_gib": round(host, 3)}
    peaks = {
        "memory_allocated_peak_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 3),
        "memory_reserved_peak_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 3),
        "host_memory_peak_gib": round(host, 3),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return peaks


class Rate(ProgressColumn):
    """Loss, throughput and data wait beside the bar."""

    def render(self, task) -> Text:
        fields = task.fields
        if "loss" not in fields:
            return Text("")
        return Text(f"loss {fields['loss']:.3f}  {fields['images_per_second']:.0f} images/s  data wait {fields['data_wait_percent']:.0f}%")


class Telemetry:
    """The outputs of the main rank. Other ranks make one with ``active=False``, whose calls do nothing."""

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        metrics: Sequence[Metric],
        tensorboard: bool,
        wandb_project: str,
        config: dict[str, Any],
        active: bool,
        headlines: Mapping[str, str] = NONE,
    ):
        """``headlines``: keys of evaluations' figures that the console shows, each with its unit. Raises ValueError without wandb, where
        that is set."""
        self.headlines = headlines
        if wandb_project:  # on every rank, so that none waits for another
            needs("wandb", "logging.wandb", "wandb")
        self.folder, self.total_steps, self.declared, self.active = folder, total_steps, tuple(metrics), active
        self.console = Console(quiet=not active, highlight=False)
        self.config, self.tensorboard, self.wandb_project = config, tensorboard, wandb_project
        self.warned: list[dict[str, Any]] = []
        self.metrics = self.events = self.wandb_run = self.progress = None
        self.unwritten = b""

    def say(self, sentence: str) -> None:
        self.console.print(sentence, markup=False, soft_wrap=True)

    @property
    def warnings(self) -> list[str]:
        """All warnings of the run, those before an interruption included."""
        return [warning["sentence"] for warning in self.warned]

    @property
    def advice(self) -> list[str]:
        """Those of them that say which settings to change."""
        return [warning["sentence"] for warning in self.warned if warning["advice"]]

    def warn(self, sentence: str, step: int | None = None, *, advice: bool = False) -> None:
        """Print a warning and keep it in the run's folder. ``step``: None for what a start of the run says of its settings."""
        self.console.print(f"Warning: {sentence}", style="yellow", markup=False, soft_wrap=True)
        if sentence not in self.warnings:
            self.warned.append({"step": step, "sentence": sentence, "advice": advice})
        if self.metrics:
            self._keep_warnings()

    def _keep_warnings(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, of which metrics.jsonl and the checkpoints warn
            write_json(self.warned, self.folder / WARNINGS)

    def start(self, step: int) -> None:
        """Open the outputs; lines that an interrupted run wrote after ``step``, the one it resumes from, are taken back."""
        if not self.active:
            return
        # What an earlier start said of the settings, this one has said again where it still holds.
        earlier = warnings_of(self.folder) if step else []
        self.warned = [one for one in earlier if one["step"] is not None and one["step"] <= step] + self.warned
        self._keep_warnings()
        write_json([asdict(metric) for metric in self.declared], self.folder / DECLARATIONS)
        path = self.folder / "metrics.jsonl"
        # A run that starts over at step 0 evaluates the untrained network again.
        kept = rows_up_to(path, step) if step else []
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self.metrics = path.open("ab", buffering=0)
        if self.tensorboard:
            try:
                writer = needs("torch.utils.tensorboard", "logging.tensorboard", "tensorboard").SummaryWriter
                self.events = writer(self.folder / "tensorboard", purge_step=step + 1 if step else None)
            except ValueError as missing:  # a default, and metrics.jsonl has all that it would hold
                self.warn(f"{missing} No events are written.")
        if self.wandb_project:
            self.wandb_run = needs("wandb", "logging.wandb", "wandb").init(
                project=self.wandb_project, dir=self.folder, config=self.config, id=self.folder.name, resume="allow"
            )
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=self.console)
            self.progress.start()
            self.task = self.progress.add_task("training", total=self.total_steps, completed=step)

    def advance(self) -> None:
        if self.progress:
            self.progress.advance(self.task)

    def log(self, row: dict[str, Any]) -> None:
        """One object of metrics.jsonl. Values that are not finite become null, so that the file stays JSON."""
        if not self.active:
            return
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self._write(json.dumps(row) + "\n")
        if self.events:
            with contextlib.suppress(OSError):  # of a full disk, which the metrics file has told
                for key, value in row.items():
                    if key != "step" and value is not None:
                        self.events.add_scalar(key, value, row["step"])
        if self.wandb_run:
            self.wandb_run.log({key: value for key, value in row.items() if value is not None}, step=row["step"])
        if self.progress and "loss" in row:
            self.progress.update(self.task, **{key: row[key] or 0.0 for key in ("loss", "images_per_second", "data_wait_percent")})
        elif not self.progress:
            self.say(line_of(row, self.total_steps, self.declared, self.headlines))

    def _write(self, line: str) -> None:
        """Append to metrics.jsonl. What a full disk refuses waits for the next line; nothing is left half written."""
        self.unwritten += line.encode()
        end = os.fstat(self.metrics.fileno()).st_size
        try:
            if self.metrics.write(self.unwritten) < len(self.unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.unwritten = b""
        except OSError as error:
            self.metrics.truncate(end)
            sentence = f"{self.metrics.name} could not be written ({error.strerror}); its rows wait in memory."
            if sentence not in self.warnings:
                self.warn(sentence)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
        if self.metrics:
            self._write("")
            self.metrics.close()
        if self.events:
            with contextlib.suppress(OSError):
                self.events.close()
        if self.wandb_run:
            self.wandb_run.finish()


def line_of(row: dict[str, Any], total_steps: int, metrics: Sequence[Metric] = (), headlines: Mapping[str, str] = NONE) -> str:
    """A logged row as one line, where there is no terminal for a progress bar. ``headlines``: see ``Telemetry``."""
    line = f"step {row['step']}/{total_steps}"
    if row.get("loss") is not None:
        remaining = (total_steps - row["step"]) * row["step_seconds"]
        line += f"  loss {row['loss']:.4f}"
        shown = [metric for metric in metrics if metric.console and row.get(metric.key) is not None]
        for name, members in groupby(shown, key=lambda metric: metric.console):
            together = list(members)
            line += f"  {name} {'/'.join(f'{row[metric.key]:.3f}' for metric in together)} {together[0].unit}".rstrip()
        line += f"  {row['images_per_second']:.0f} images/s  data wait {row['data_wait_percent']:.0f}%  {remaining / 60:.1f} min left"
    figures = {key: value for key, value in row.items() if key in headlines and value is not None}
    return line + "".join(
        f"  {key.removesuffix('_percent')} {value:.1f}%" if headlines[key] == "%" else f"  {key} {value:.4g} {headlines[key]}".rstrip()
        for key, value in figures.items()
    )


def rows_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """Rows of a metrics file whose step is at most ``step``; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            rows.append(row)
    return rows
