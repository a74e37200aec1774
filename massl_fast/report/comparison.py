"""The curves of several runs on one page, and the settings in which they differ: from their folders alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from massl_fast.report.figures import Curve, curve_figure
from massl_fast.report.html import Drawing, render
from massl_fast.report.page import GRADIENT_NORM, LOSS, SCHEDULES
from massl_fast.run.catalogue import differing, entry_of, settings_of
from massl_fast.run.reading import Declared, RunFolder, read_run

LOOKS = [(colour, line) for line in ("-", "--", ":") for colour in ("--blue", "--orange", "--green", "--violet", "--muted")]
"""Colour and line of each run."""
SPEED = (
    Declared("images_per_second", "Images per second", "images/s"),
    Declared("data_wait_percent", "Waiting for data", "%"),
    Declared("memory_allocated_peak_gib", "Peak memory of the GPU, allocated", "GiB"),
    Declared("host_memory_peak_gib", "Peak memory of the host", "GiB"),
)


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write the page of the runs in ``folders`` to the file ``output``, whole or not at all; returns it.

    Raises ValueError for what is no run folder, for fewer than two runs, for more than there are kinds of lines, and where the file cannot
    be written.
    """
    if not 2 <= len(folders) <= len(LOOKS):
        raise ValueError(f"{len(folders)} run folders are named; between 2 and {len(LOOKS)} can be compared on one page.")
    page = comparison_page(folders)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise ValueError(f"The page cannot be written to {output}: {error.strerror}.") from None
    return output


def comparison_page(folders: Sequence[Path]) -> str:
    """The page as HTML."""
    runs = [read_run(folder) for folder in folders]
    names = _names(folders)
    entries = [entry_of(folder) for folder in folders]
    declared = {metric.key: metric for run in runs for metric in (*run.declared, GRADIENT_NORM)}
    schedules = {key: title for key, title, *_ in SCHEDULES}
    learning = [metric for key, metric in ({LOSS.key: LOSS} | declared).items() if key not in schedules]
    objectives = sorted({entry.objective for entry in entries})
    chapters = [
        ("k-NN accuracy", "Of the teacher, in percent.", _knn(runs, names)),
        (
            "Learning",
            f"Losses of different objectives ({', '.join(objectives)}) cannot be compared with each other." if len(objectives) > 1 else "",
            [drawn for metric in learning for drawn in _chart(runs, names, metric, logarithmic=metric is GRADIENT_NORM)],
        ),
        ("Schedules", "", [drawn for key, title in schedules.items() for drawn in _chart(runs, names, Declared(key, title))]),
        ("Speed and memory", "", [drawn for metric in SPEED for drawn in _chart(runs, names, metric)]),
    ]
    return render(
        "comparison.html",
        title="Runs compared",
        subject="",
        what=", ".join(names),
        rows=list(zip(names, entries)),
        differences={key: _by_run(values, len(runs)) for key, values in differing([settings_of(run) for run in runs]).items()},
        chapters=chapters,
        notices=[f"{name}: {note}" for name, run in zip(names, runs) for note in run.notes],
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    raise ValueError("One run folder is named twice. Name each once.")


def _by_run(values: list[tuple[str, list[int]]], count: int) -> list[str]:
    """The value of a setting for each run."""
    of_run = {position: value for value, positions in values for position in positions}
    return [of_run[position] for position in range(count)]


def _knn(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Drawing]:
    curves = []
    for run, name, (colour, line) in zip(runs, names, LOOKS):
        if found := run.headline_knn("teacher"):
            k, steps, values = found
            untrained = run.headline_knn("untrained")
            start = ([0], [untrained[2][0]]) if untrained and untrained[0] == k else ([], [])
            curves.append(Curve(f"{name}, k = {k}", start[0] + steps, start[1] + values, colour, markers=True, line=line))
    return [Drawing("Over training", curve_figure(curves, unit="%", named=True))] if curves else []


def _chart(runs: Sequence[RunFolder], names: Sequence[str], metric: Declared, logarithmic: bool = False) -> list[Drawing]:
    """One metric of all runs that have logged it; no figure where none has."""
    found = [(name, *run.series(metric.key), look) for run, name, look in zip(runs, names, LOOKS)]
    curves = [Curve(name, steps, values, colour, line=line) for name, steps, values, (colour, line) in found if values]
    title = metric.title if metric.figure.lower() in metric.title.lower() else f"{metric.figure}: {metric.title}"
    # Named even where one run alone has logged it, or nobody knew which.
    return [Drawing(title, curve_figure(curves, unit=metric.unit, logarithmic=logarithmic, named=True), metric.note)] if curves else []
