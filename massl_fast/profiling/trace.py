"""Steps under PyTorch's profiler, with the parts of a step as named ranges.

Written are ``trace.json.gz`` (for Perfetto, ui.perfetto.dev, or chrome://tracing) and ``trace.jsonl``, the record of what is printed: the
operators that take most time, for a GPU the gaps in which it idles and what the host did meanwhile, and every line of the program that
makes the host wait for the device. Lines that wait are found in a further step, without the profiler (profiling.waits).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from massl_fast.engine.phases import END, PHASES
from massl_fast.hardware import synchronize
from massl_fast.profiling import profiler as quiet_profiler  # noqa: F401  sets the profiler's log level
from massl_fast.profiling.synthetic import SyntheticRun
from massl_fast.profiling.waits import Wait

STEP = "step"
MIN_GAP, MOST_GAPS = 10e-6, 10  # seconds; those that are named


@dataclass(frozen=True)
class Operator:
    """An operator or a kernel over all traced steps; seconds per step, that of its parts not counted in."""

    name: str
    seconds: float
    calls: float
    """Calls per step."""
    share_percent: float


@dataclass(frozen=True)
class Gap:
    """A time in which the device had nothing to do."""

    seconds: float
    part: str
    """Part of the step in which the host was."""
    meanwhile: str
    """The outermost operator in which the host was then; empty: in none, that is in Python."""


@dataclass(frozen=True)
class Gaps:
    idle_share: float
    largest: list[Gap]


@dataclass(frozen=True)
class Traced:
    operators: list[Operator]
    """Kernels of the device where there is one, otherwise operators of the host; most time first."""
    parts: dict[str, float]
    """Seconds per step that the host spends in each part."""
    gaps: Gaps | None
    """None on a CPU, which computes where it launches."""


class Ranges:
    """An observer that opens a named range in the trace for each part of a step."""

    def __init__(self):
        self.open = contextlib.ExitStack()

    def __call__(self, name: str) -> None:
        self.open.close()
        if name != END:
            self.open.enter_context(record_function(name))


def trace_steps(run: SyntheticRun, steps: int, path: Path) -> Traced:
    """Trace some steps, write the trace to ``path`` and sum it up."""
    device = run.train_step.world.device
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    ranges = Ranges()
    with run.observed(ranges), profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                run.step()
        synchronize(device)
    profiler.export_chrome_trace(str(path))
    events = profiler.profiler.kineto_results.events()
    host, kernels = split_events(events)
    parts = {name: sum(stop - start for start, stop, label in host if label == name) / steps for name in PHASES}
    return Traced(top_operators(profiler, on_gpu, steps), parts, find_gaps(kernels, host) if on_gpu else None)


Interval = tuple[float, float, str]
"""Begin and end in seconds, name."""


def split_events(events: Iterable[Any]) -> tuple[list[Interval], list[Interval]]:
    """(what the host did, what the device did), each in order of its begin. Ranges that the profiler mirrors on the device are left out."""
    host: list[Interval] = []
    kernels: list[Interval] = []
    for event in events:
        interval = (event.start_ns() / 1e9, (event.start_ns() + event.duration_ns()) / 1e9, event.name())
        if event.device_type() == DeviceType.CPU:
            if event.name() != "[memory]":
                host.append(interval)
        elif event.name() not in PHASES and event.name() != STEP:
            kernels.append(interval)
    return sorted(host), sorted(kernels)


def top_operators(profiler: profile, on_gpu: bool, steps: int) -> list[Operator]:
    """Kernels of the device, or operators of the host, by the time spent in themselves."""
    rows = [row for row in profiler.key_averages() if row.key not in PHASES and row.key not in (STEP, "[memory]")]
    if on_gpu:
        rows = [row for row in rows if row.device_type != DeviceType.CPU]
    micros = {row.key: (row.self_device_time_total if on_gpu else row.self_cpu_time_total) for row in rows}
    total = sum(micros.values()) or 1
    found = [Operator(row.key, micros[row.key] / 1e6 / steps, row.count / steps, 100 * micros[row.key] / total) for row in rows]
    return sorted((row for row in found if row.seconds > 0), key=lambda row: -row.seconds)


def find_gaps(kernels: Sequence[Interval], host: Sequence[Interval]) -> Gaps:
    """Times between the first and the last kernel in which none runs, with what the host did when each began.

    Kernels may overlap; gaps below ``MIN_GAP`` are what lies between any two kernels and are counted as work.
    """
    if not kernels:
        return Gaps(1.0, [])
    begin, busy_until = kernels[0][0], kernels[0][1]
    gaps: list[tuple[float, float]] = []
    for start, stop, _ in kernels:
        if start - busy_until >= MIN_GAP:
            gaps.append((busy_until, start))
        busy_until = max(busy_until, stop)
    parts = [interval for interval in host if interval[2] in PHASES]
    others = [interval for interval in host if interval[2] not in PHASES and interval[2] != STEP]
    found = [Gap(stop - start, _innermost(parts, stop) or "between steps", _outermost(others, start, stop)) for start, stop in gaps]
    idle, span = sum(stop - start for start, stop in gaps), busy_until - begin
    return Gaps(idle / span if span else 0.0, sorted(found, key=lambda gap: -gap.seconds)[:MOST_GAPS])


def _innermost(intervals: Sequence[Interval], at: float) -> str:
    """The part that the host was in: it orders the kernel that ends a gap at or before the gap's end."""
    return next((name for start, stop, name in reversed(intervals) if start <= at <= stop), "")


def _outermost(intervals: Sequence[Interval], start: float, stop: float) -> str:
    """What took the host longest between ``start`` and ``stop``; of equals the one that began first."""
    best, longest = "", 0.0
    for begin, end, name in intervals:
        if begin >= stop:
            break
        overlap = min(end, stop) - max(begin, start)
        if overlap > longest:
            best, longest = name, overlap
    return best


def lines_of(found: Traced, waits: list[Wait], top: int) -> list[str]:
    total = sum(found.parts.values())
    lines = ["Parts of a step, time of the host:"]
    lines += [f"  {name:<20}{1000 * s:>9.2f} ms {100 * s / total if total else 0:>5.1f} %" for name, s in found.parts.items()]
    lines.append(f"{'Kernels of the device' if found.gaps else 'Operators'}, own time per step:")
    for row in found.operators[:top]:
        lines.append(f"  {1000 * row.seconds:>9.3f} ms {row.share_percent:>5.1f} %  {row.calls:>6.0f} ×  {row.name[:80]}")
    if found.gaps:
        gaps = found.gaps
        lines.append(f"The device idles {100 * gaps.idle_share:.1f} % of the time (gaps of at least {1e6 * MIN_GAP:.0f} µs).")
        for gap in gaps.largest[:5]:
            doing = f"in {gap.meanwhile}" if gap.meanwhile else "in Python"
            lines.append(f"  {1e6 * gap.seconds:>9.0f} µs  in '{gap.part}', the host {doing}")
    else:
        lines.append("A CPU has no gaps: it computes where it launches.")
    if not waits:
        lines.append("Nothing in a step makes the host wait for the device.")
    else:
        lines.append("The host waits for the device (or would, on a GPU) at:")
        lines += [f"  {wait.count:>4} × per step  {wait.operator:<22}{wait.line}" for wait in waits[:10]]
    return lines
