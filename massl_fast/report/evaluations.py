"""report.html of evaluations: the table of every protocol, what it departs from, and one honest picture, from their JSON objects alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from massl_fast.report.figures import STAND_INS, Curve, curve_figure, drawing, legend_columns, plain
from massl_fast.report.html import Drawing, render
from massl_fast.run.reading import is_number

COLOURS = ("--blue", "--orange", "--green", "--violet", "--muted")
FOLDER = "evaluation"
"""Below a run's folder: evaluations that its report shows."""


@dataclass
class Block:
    """One protocol on one set of data, of one checkpoint or several."""

    title: str
    about: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    departures: list[str]
    notes: list[str]
    published: list[dict[str, Any]]
    drawings: list[Drawing] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)


def evaluations_page(found: Sequence[Mapping[str, Any]], unfinished: Sequence[str] = ()) -> str:
    """The page as HTML. ``found``: objects as ``massl-fast eval --json`` prints them; ``unfinished``: what was not evaluated, sentences."""
    checkpoints = list(dict.fromkeys(str(one["checkpoint"]) for one in found))
    return render(
        "evaluations.html",
        title="Evaluations",
        subject="",
        what=", ".join(checkpoints),
        blocks=blocks_of(found),
        unfinished=list(unfinished),
        ran=[(str(one["title"]), f"{one['seconds']} s") for one in found],
    )


def blocks_of(found: Sequence[Mapping[str, Any]]) -> list[Block]:
    """One block per protocol and settings, checkpoints side by side."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        groups.setdefault(json.dumps([one["protocol"], one["settings"]], sort_keys=True), []).append(one)
    return [_block(group) for group in groups.values()]


def results_in(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """(objects of ``folder``/result.json, a sentence where the file is damaged)."""
    path = folder / "result.json"
    if not path.is_file():
        return [], ""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        found = whole["results"] if "protocol" not in whole else [whole]
        blocks_of(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [], f"{path} cannot be read ({type(error).__name__}: {error}); massl-fast eval --out {folder} writes it anew."
    return found, ""


def _block(group: Sequence[Mapping[str, Any]]) -> Block:
    first, several = group[0], len(group) > 1
    figures = first["figures"]
    rows = []
    for one in group:
        prefix = f"{Path(one['checkpoint']).name}, " if several else ""
        rows += [(prefix + name, [_number(values.get(f["key"])) for f in figures]) for name, values in one["results"].items()]
    sizes = sorted({one["image_size"] for one in group})
    block = Block(
        title=f"{first['title']}: {first['architecture']} at {', '.join(map(str, sizes))} px, features {first['features']}",
        about=first["about"],
        columns=[f["title"] for f in figures],
        rows=rows,
        departures=list(dict.fromkeys(sentence for one in group for sentence in one["departures"])),
        notes=list(dict.fromkeys(sentence for one in group for sentence in one["notes"])),
        published=first["published"],
        pictures=[picture for one in group for picture in one["pictures"]],
    )
    if several:
        block.drawings += _over_training(group)
    elif first["protocol"] in SWEEPS:
        block.drawings += _over_sweep(first, *SWEEPS[first["protocol"]])
    elif first["protocol"] in DRAWN:
        block.drawings += DRAWN[first["protocol"]](first)
    return block


def _over_training(group: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """The headline of every network over training steps, where two checkpoints or more say their step."""
    with_step = sorted((one for one in group if is_number(one["step"])), key=lambda one: one["step"])
    if len({one["step"] for one in with_step}) < 2:
        return []
    key = group[0]["headline"]
    figure = next(f for f in group[0]["figures"] if f["key"] == key)
    curves = []
    for colour, name in zip(COLOURS, with_step[0]["results"]):
        points = [(one["step"], _number(one["results"].get(name, {}).get(key))) for one in with_step]
        points = [(step, value) for step, value in points if value is not None]
        if points:
            curves.append(Curve(name, [step for step, _ in points], [value for _, value in points], colour, markers=True))
    return [Drawing(f"Over training: {figure['title']}", curve_figure(curves, unit=figure["unit"]))]


# Protocol: key of the list of what was tried, of the tried value in it, and its name.
SWEEPS = {"linear": ("by_head", "rate", "learning rate"), "logistic": ("by_lambda", "lambda", "λ")}


def _over_sweep(one: Mapping[str, Any], tried: str, key: str, name: str) -> list[Drawing]:
    """Accuracy over what was tried; a ring marks what was chosen on held-out training images."""
    with drawing() as (axes, finish):
        for colour, (network, values) in zip(COLOURS, one["results"].items()):
            points = [(row[key], row["percent"]) for row in values[tried] if row["percent"] is not None]
            axes.plot(*zip(*points), color=STAND_INS[colour], marker="o", markersize=2.5, linewidth=1.2, label=network) if points else None
            chosen = values.get("chosen") or {key: values.get(f"chosen_{key}")}
            for rate, percent in points:
                if rate == chosen.get(key):
                    axes.plot([rate], [percent], color=STAND_INS[colour], marker="o", markersize=9, fillstyle="none")
        axes.set_xscale("log")
        _finish_axes(axes, name)
        return [Drawing(f"Accuracy over {name}", finish(), "After the last epoch. Rings: chosen on held-out training images.")]


def _over_shots(one: Mapping[str, Any]) -> list[Drawing]:
    """Accuracy over images per class, one drawing per kind of head, with every draw."""
    drawings = []
    for head in one["settings"]["heads"]:
        with drawing() as (axes, finish):
            for colour, (network, values) in zip(COLOURS, one["results"].items()):
                counts = one["settings"]["per_class"]
                draws = [values["by_draw"][f"{head}_n{count}"] for count in counts]
                axes.plot(counts, [sum(of) / len(of) for of in draws], color=STAND_INS[colour], linewidth=1.4, label=network)
                for count, of in zip(counts, draws):
                    axes.plot([count] * len(of), of, color=STAND_INS[colour], marker="o", markersize=2.5, linestyle="none")
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            _finish_axes(axes, "images per class")
            drawings.append(Drawing(f"{head}: mean of draws, and every draw", finish()))
    return drawings


def _over_classes(one: Mapping[str, Any]) -> list[Drawing]:
    """Average precision of every class, as published, from the first network's best to its worst."""
    by_class = one["average_precision_percent"]
    first = next(iter(by_class.values()))
    order = sorted(first, key=lambda name: -first[name])
    return [Drawing("Average precision of every class", _bars(order, {name: [of[c] for c in order] for name, of in by_class.items()}))]


def _over_figures(one: Mapping[str, Any], ending: str, title: str) -> list[Drawing]:
    """Bars of those figures of a result whose keys end so, in the order of the table."""
    keys = [figure["key"] for figure in one["figures"] if figure["key"].endswith(ending)]
    names = [figure["title"] for figure in one["figures"] if figure["key"] in keys]
    found = {network: [_number(values.get(key)) for key in keys] for network, values in one["results"].items()}
    there = [i for i in range(len(keys)) if any(values[i] is not None for values in found.values())]
    return [Drawing(title, _bars([names[i] for i in there], {name: [values[i] for i in there] for name, values in found.items()}))]


def _over_variants(one: Mapping[str, Any]) -> list[Drawing]:
    """Accuracy on every variant of ImageNet-9; the gap and the challenge stay in the table."""
    variants = {**one, "figures": [f for f in one["figures"] if f["key"] not in ("background_gap_percent", "challenge_percent")]}
    return _over_figures(variants, "_percent", "Accuracy on every variant")


def _over_sets(one: Mapping[str, Any]) -> list[Drawing]:
    """Accuracy on every set; means over sets stay in the table."""
    sets = {**one, "figures": [f for f in one["figures"] if not f["key"].startswith("mean_")]}
    return _over_figures(sets, "_percent", "Accuracy on every set")


def _overlaps(one: Mapping[str, Any]) -> list[Drawing]:
    """Densities of similarities within and between categories, one drawing per network; what both have in common is the overlap."""
    drawings = []
    for network, counts in one["histograms"].items():
        with drawing() as (axes, finish):
            for colour, (name, kind) in zip(COLOURS, (("within a category", "intra"), ("between categories", "inter"))):
                total, bins = sum(counts[kind]) or 1, len(counts[kind])
                centres = [-1 + (2 * i + 1) / bins for i in range(bins)]
                density = [count / total * bins / 2 for count in counts[kind]]
                axes.fill_between(centres, density, color=STAND_INS[colour], alpha=0.35, linewidth=0, label=name)
            _finish_axes(axes, "cosine similarity of two patches", unit="density")
            overlap = _number(one["results"][network].get("overlap"))
            drawings.append(Drawing(f"{network}: overlap {'–' if overlap is None else f'{overlap:.2f}'}", finish()))
    return drawings


def _bars(names: Sequence[str], found: Mapping[str, Sequence[float | None]]) -> str:
    """Groups of bars, one per name, a bar per network."""
    width = 0.8 / max(1, len(found))
    with drawing() as (axes, finish):
        for number, (colour, (network, values)) in enumerate(zip(COLOURS, found.items())):
            places = [i - 0.4 + (number + 0.5) * width for i, value in enumerate(values) if value is not None]
            axes.bar(places, [value for value in values if value is not None], 0.9 * width, color=STAND_INS[colour], label=network)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        _finish_axes(axes, "")
        return finish()


DRAWN = {
    "fewshot": _over_shots,
    "multilabel": _over_classes,
    "similarity": _overlaps,
    "backgrounds": _over_variants,
    "transfer": _over_sets,
}


def _finish_axes(axes: Any, name: str, unit: str = "%") -> None:
    plain(axes, grid=True)
    axes.set_xlabel(name, color=STAND_INS["--muted"], loc="right")
    axes.set_ylabel(unit, color=STAND_INS["--muted"])
    columns = legend_columns(axes.get_legend_handles_labels()[1], axes.figure.get_figwidth())
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, labelcolor=STAND_INS["--ink"])


def _number(value: Any) -> float | None:
    return value if is_number(value) else None
