"""What pages and documents show of records: a chapter per kind of record, its tables, drawings and sentences, each decided once.

``benchmarks.page`` lays them out as HTML, ``bench/make_docs.py`` as Markdown. Words between backticks are code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from massl_fast.benchmarks.charts import MIB, Bar, Line, bars, memory_timeline, over_sizes, roofline, split, waterfall
from massl_fast.benchmarks.intervals import spread_percent
from massl_fast.engine.phases import PHASES
from massl_fast.report.html import Drawing

Row = dict[str, Any]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OURS = {"triton": "--blue", "streaming": "--green", "enqueue_": "--blue", "partition_indices": "--blue"}
PEERS = ("--orange", "--violet", "--muted")
KERNEL_HEAD = ["N", "K", "variant", "ms", "quartiles apart", "× first", "× by processor time", "error", "of matrix rate", "extra MiB"]
KERNEL_COLUMNS = """ms: median over the rounds, in which the variants take turns. × first: median of the ratio within a round, so that
it need not be the ratio of two medians where the machine was busy. Error: the largest against float64, relative to the largest value
(read-out or gradient; enqueue: absolute, of an entry). Of matrix rate: operations of the one pass per second, of those that a large matrix
product reached in the same rounds."""
RATIOS = """Images/s come from the median time of a step over the rounds; × is the ratio of these medians, so that both columns
say the same. × by processor time is the median over the rounds of the ratio within a round, of the seconds that the process computed:
what other work on the machine hardly changes. Where the two differ by more than a few percent, the machine was busy; trust the latter.
Neither counts what a loader needs."""


@dataclass
class Part:
    """One table with what belongs to it."""

    rows: Sequence[Row]
    """The records that it shows."""
    head: list[str]
    lines: list[list[str]]
    title: str = ""
    drawings: list[Drawing] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    """Sentences in pages and documents."""
    further: list[str] = field(default_factory=list)
    """Sentences in pages alone."""


@dataclass
class Chapter:
    heading: str
    parts: list[Part]
    note: str = ""


def chapters(rows: Sequence[Row]) -> list[Chapter]:
    """Every kind that there are records of, in the order of the page."""
    found = []
    for heading, kind, note, parts_of in KINDS:
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            found.append(Chapter(heading, parts_of(of_kind), note))
    return found


def medians(row: Row) -> dict[str, float]:
    return {name: value["median"] for name, value in row["figures"].items()}


def shown_number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def case_words(case: dict[str, Any]) -> str:
    compiled = ", compiled" if case.get("compile") else ""
    images = "" if case["batch"] == "search" else f", {case['batch']} images"
    return f"{case['architecture']}{images}, {case['crops']} px, memory {case['memory']}, {case['precision']}{compiled}"


def file_name(words: str) -> str:
    """Words as a part of a file's name."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in words.lower()).split())


# Kernels


def by_shape(rows: Sequence[Row], *beside: str) -> dict[str, list[Row]]:
    """Records of equal cases but for the variant and what is named, by the rest in words."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        shape = [f"{name} {value}" for name, value in row["case"].items() if value and name not in ("variant", "device", *beside)]
        groups.setdefault(", ".join(shape).removeprefix("operation ").removeprefix("loss "), []).append(row)
    return groups


def kernels(rows: Sequence[Row]) -> list[Part]:
    """A part per operation and shape but for N and K: its first case drawn, and time against N and K where several were measured."""
    parts = []
    for title, members in by_shape(rows, "N", "K").items():
        of = members[0]["case"]
        members = sorted(members, key=lambda row: (row["case"]["K"], row["case"]["N"]))
        first = [row for row in members if all(row["case"][size] == of[size] for size in ("N", "K"))]
        stem = file_name(title)
        drawn = [Drawing(f"times of {title}", kernel_bars(first), name=f"{stem}-times")]
        drawn += [
            Drawing(f"times-against-{size.lower()} of {title}", svg, name=f"{stem}-times-against-{size.lower()}")
            for size in ("N", "K")
            for svg in growth(members, of, size)
        ]
        parts.append(Part(members, KERNEL_HEAD, [kernel_line(row) for row in members], title, drawn))
    parts[0].drawings[:0] = roofline_of(rows)
    return parts


def kernel_line(row: Row) -> list[str]:
    figures = row["figures"]

    def cell(name: str, form: str) -> str:
        return form.format(figures[name]["median"]) if name in figures else ""

    return [
        str(row["case"]["N"]),
        str(row["case"]["K"]),
        row["case"]["variant"],
        shown_number(figures["time"]["median"]),
        f"{spread_percent(figures['time']['samples']):.0f} %" if len(figures["time"]["samples"]) > 3 else "",
        cell("time ratio", "{:.3g}"),
        cell("processor time ratio", "{:.3g}"),
        cell("error", "{:.1e}"),
        cell("share of the matrix rate", "{:.0f} %"),
        cell("extra memory", "{:.1f}"),
    ]


def kernel_bars(rows: Sequence[Row]) -> str:
    """Times of the variants of one case, each with its error."""
    items = []
    for row in rows:
        figures, name = medians(row), row["case"]["variant"]
        notes = [f"error {figures['error']:.1e}"]
        if "extra memory" in figures:
            notes.append(f"{shown_number(figures['extra memory'])} MiB extra")
        if "share of the matrix rate" in figures:
            notes.append(f"{figures['share of the matrix rate']:.0f} % of the matrix rate")
        items.append(Bar(name, row["figures"]["time"]["samples"], OURS.get(name.split(",")[0], "--muted"), " · ".join(notes)))
    return bars(items, "ms", wide=True)


def growth(rows: Sequence[Row], first: dict[str, Any], size: str) -> list[str]:
    """Time against N or K, everything else as in the case ``first``; nothing where one size alone was measured."""
    rest = [name for name in ("V", "T", "N", "D", "K", "block", "dtype") if name != size]
    fitting = [row for row in rows if all(row["case"][name] == first[name] for name in rest)]
    lines = lines_by_variant(rows, fitting, lambda row: (row["case"][size], row["figures"]["time"]["median"]))
    drawable = [line for line in lines if len(line.points) > 1]
    return [over_sizes(drawable, {"N": "N, images", "K": "K, entries"}[size], "ms")] if drawable else []


def roofline_of(rows: Sequence[Row]) -> list[Drawing]:
    measured = [row for row in rows if "rate" in row["figures"]]
    if not measured:
        return []
    rate = 1e12 * median(row["figures"]["matrix product"]["median"] for row in measured)
    bandwidth = 1e9 * median(row["figures"]["copy"]["median"] for row in measured)
    dots = lines_by_variant(rows, measured, lambda row: (intensity(row["case"]), 1e12 * row["figures"]["rate"]["median"]))
    note = (
        "Both roofs were measured in the same run. Least traffic: the memory once, rows in, read-outs or gradient out; operations are the "
        "4·D·(V+T)·N·K of the one pass, also for variants that do more."
    )
    return [Drawing("Roofline", roofline(dots, rate, bandwidth), note)]


def lines_by_variant(rows: Sequence[Row], shown: Sequence[Row], point: Callable[[Row], tuple[float, float]]) -> list[Line]:
    """The points of the records shown, a line per variant: ours in colours of their own, peers in one by their order among all ``rows``."""
    peers = [name for name in dict.fromkeys(row["case"]["variant"] for row in rows) if name not in OURS]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in shown:
        points.setdefault(row["case"]["variant"], []).append(point(row))
    colours = OURS | {name: PEERS[number % len(PEERS)] for number, name in enumerate(peers)}
    return [Line(name, of, colours[name], name in peers) for name, of in points.items()]


def intensity(case: dict[str, Any]) -> float:
    """Operations per byte of a kernel case's least traffic."""
    rows, kept = (case["V"] + case["T"]) * case["N"], case["K"] // case["block"] * case["block"]
    size = BYTES[case["dtype"]]
    traffic = kept * case["D"] * size + rows * case["D"] * (size + 4)
    return 4 * case["D"] * rows * kept / traffic


OBJECTIVE_HEAD = ["way", "ms", "quartiles apart", "× published", "× by processor time", "errors", "of matrix rate", "extra MiB"]
OBJECTIVE_HEAD += ["results MiB"]
OBJECTIVE_COLUMNS = """Loss and gradients of rows and prototypes (sinkhorn: the bias, or the published way's assignment). The published way
is plain PyTorch that holds logits as the losses' published code does; the reference makes each logit once and of masked rows alone.
Errors: loss, and the largest of a gradient relative to its largest value, against float64. Extra memory is what a call needs beyond its
inputs, and results are what of it the call returns: no way can do without them. Of matrix rate: operations of the way itself per second."""


def objectives(rows: Sequence[Row]) -> list[Part]:
    """A part per loss and shape."""
    parts = []
    for title, members in by_shape(rows).items():
        drawing = Drawing(f"times of {title}", kernel_bars(members), name=f"{file_name(title)}-times")
        parts.append(Part(members, OBJECTIVE_HEAD, [objective_line(row) for row in members], title, [drawing]))
    return parts


def objective_line(row: Row) -> list[str]:
    name, ms, spread, ratio, processor, _, rate, extra = kernel_line(row)[2:]
    figures = medians(row)
    errors = " / ".join(f"{figures[key]:.1e}" for key in ("error", "error of gradients") if key in figures)
    return [name, ms, spread, ratio, processor, errors, rate, extra, f"{figures['results']:.1f}"]


# Steps


def sides(ratio: str, rows: Sequence[Row]) -> list[Part]:
    """Ways of taking a step that took turns in one process, compared with the first of them."""
    lines, drawn = [], []
    for row in rows:
        case, found = row["case"], row["details"]["sides"]
        objective = case.get("objective") or f"K {case['memory_size']}"
        what = f"{published_model(row)}, {case['batch']} images, {case['precision']}, {objective}"
        items = []
        for side, result in found.items():
            quartiles = " to ".join(f"{1000 * seconds:.0f}" for seconds in result.get("step_seconds_quartiles", ()))
            processor = result.get("times_the_first_side_by_processor_time")
            times, memory = f"{times_the_first(row, side):.2f}", f"{result['peak_mib']:.0f}"
            rate = result["images_per_second"]
            lines.append([what, side, shown_number(rate), quartiles, times, f"{processor:.2f}" if processor else "", memory])
            items.append(Bar(side, [rate], "--blue" if items else "--muted", f"× {times}"))
        drawn.append(Drawing(f"Images per second: {what}", bars(items, "images/s")))
    head = ["step", "side", "images/s", "ms per step, quartiles", ratio, "× by processor time", "peak MiB"]
    return [Part(rows, head, lines, drawings=drawn, sentences=[RATIOS])]


def published_model(row: Row) -> str:
    """The model and crops of a step beside the published way."""
    case, changed = row["case"], row["details"]["case"]["model_args"]
    words = "".join(f", {name} {value}" for name, value in changed.items())
    return f"{case['architecture']}{words}, 2×{case['global_size']} + {case['num_local']}×{case['local_size']} px"


def times_the_first(row: Row, side: str) -> float:
    """How many times as fast as the first side, by the medians that stand beside it."""
    found = row["details"]["sides"]
    return next(iter(found.values()))["step_seconds_median"] / found[side]["step_seconds_median"]


def step(rows: Sequence[Row]) -> list[Part]:
    lines, drawn = [], []
    for row in rows:
        case, f = row["case"], medians(row)
        samples = row["figures"]["step_seconds"]["samples"]
        of = f.get("model_flops_utilization", f["utilization_of_measured_rate"])
        compiled = ", compiled" if case.get("compile") else ""
        lines.append(
            [
                f"{case['architecture']}, {case['batch']} images, {case['crops']} px, {case['precision']}{compiled}",
                shown_number(f["images_per_second"]),
                f"{1000 * f['step_seconds']:.1f}",
                f"{spread_percent(samples):.0f} %",
                f"{of:.1f} % of the {'data sheet' if 'model_flops_utilization' in f else 'measured matrix rate'}",
            ]
        )
        phases = {name: 1000 * f[f"part: {name}"] for name in PHASES}
        ratios = [b / a for a, b in zip(samples, row["figures"]["watched_step_seconds"]["samples"])]
        note = f"{lines[-1][0]}. Marking the parts changed a step's time by {100 * (median(ratios) - 1):+.1f} %."
        name = f"step-{case.get('recipe', '')}-{case['batch']}{'-compiled' if compiled else ''}"
        drawn.append(Drawing("parts of a step", split(phases, "ms"), note, name))
    return [Part(rows, ["step, model alone", "images/s", "ms", "quartiles apart", "utilisation"], lines, drawings=drawn)]


def search(rows: Sequence[Row]) -> list[Part]:
    lines, drawn, sentences = [], [], []
    for row in rows:
        details, name = row["details"], row["case"]["architecture"]
        for batch, result in details["tried"]:
            peak = f"{result['peak_bytes'] / MIB:.0f}" if result and result["peak_bytes"] else ""
            rate = f"{result['images_per_second']:.1f}" if result else "out of memory"
            lines.append([name, str(batch), rate, peak, "best" if batch == details["best"] else ""])
        points = [(batch, result["images_per_second"]) for batch, result in details["tried"] if result]
        drawn.append(Drawing(f"Images per second: {name}", over_sizes([Line("images/s", points, "--blue")], "images", "images/s")))
        if "largest" in details:
            sentences.append(f"{name}: {details['largest']} images are the most that fit; predicted from shapes: {details['predicted']}.")
    return [Part(rows, ["model", "images", "images/s", "peak MiB", ""], lines, drawings=drawn, sentences=sentences)]


def train(rows: Sequence[Row]) -> list[Part]:
    lines, drawn, sentences, advice = [], [], [], []
    labels = {"loader": "--green", "model": "--orange", "together": "--blue"}
    for row in rows:
        case, f = row["case"], row["figures"]
        rates = [f[f"{name}_images_per_second"] for name in labels]
        what = f"{case['architecture']}, {case['batch']} images, {case['loader']}"
        lines.append([what, *(shown_number(rate["median"]) for rate in rates), f"{f['data_wait']['median']:.1f} %"])
        items = [Bar(name, rate["samples"], colour) for (name, colour), rate in zip(labels.items(), rates)]
        drawn.append(Drawing(f"Images per second: {what}", bars(items, "images/s")))
        sentences.append(row["details"]["verdict"][0])
        advice += row["details"]["verdict"][1:]
    head = ["loader and model, images/s", "loader alone", "model alone", "together", "data wait"]
    return [Part(rows, head, lines, drawings=drawn, sentences=sentences, further=advice)]


def loaders(rows: Sequence[Row]) -> list[Part]:
    colours = {"published": "--muted", "torchvision": "--blue", "dali": "--green"}
    lines, items = [], []
    for row in rows:
        case, f = row["case"], row["figures"]
        places = f", {case['decode']}/{case['augment']}" if case["loader"] == "dali" else ""
        name = f"{case['loader']}{places}, {case['workers']} worker{'s' if case['workers'] != 1 else ''}"
        memory = f"{f['host_memory_mib']['median']:.0f}" if "host_memory_mib" in f else ""
        rates = [shown_number(f[key]["median"]) for key in ("images_per_second", "images_per_core_second")]
        lines.append([f"{name}, 2×{case['global_size']} + {case['num_local']}×{case['local_size']} px", *rates, memory])
        items.append(Bar(name, f["images_per_second"]["samples"], colours[case["loader"]]))
    drawn = [Drawing("Images per second", bars(items, "images/s"))]
    return [Part(rows, ["loader", "images/s", "per core", "host MiB"], lines, drawings=drawn)]


# Memory and traces


def memory(rows: Sequence[Row]) -> list[Part]:
    lines, drawn, further = [], [], []
    named = False
    for row in rows:
        case, f, details = row["case"], medians(row), row["details"]
        what = f"{case['architecture']}, {case['batch']} images, {case['precision']}"
        measured = details.get("measured")
        if measured is None:
            words, line, by_moment = "From shapes alone, before running.", details["estimated_timeline"], True
        else:
            words = f"Filled: measured; outlined: estimated from shapes alone, {f['estimate_error']:+.1f} % off the measured peak."
            line, by_moment = details["measured_timeline"], False
        cells = [f"{f[key]:.1f}" if key in f else "" for key in ("estimated_peak", "measured_peak")]
        off = f"{f['estimate_error']:+.1f} %" if "estimate_error" in f else ""
        lines.append([what, *cells, off, details.get("peak_section", details.get("estimated_peak_section", ""))])
        drawn.append(Drawing(f"The peak, piece by piece: {what}", waterfall(details["estimated"], measured), words))
        title = f"memory over a step: {case['architecture']}, {case['batch']} images"
        drawn.append(Drawing(title, memory_timeline(line, by_moment), name="" if named or by_moment else "memory"))
        named = named or not by_moment
        further += [f"{what}: {' '.join(text.split())}" for text in details.get("largest", [])[:3]]
        further += details.get("leaks", [])
        further += [details["prediction"]["sentence"]] if "prediction" in details else []
        further += [f"Beside the step: {name} {size / MIB:.0f} MiB" for name, size in details.get("rest", {}).items()]
    sentences = []
    if errors := estimate_errors(rows):
        sentences.append(f"The estimate, from shapes alone, is at most {max(errors):.1f} % off; median {median(errors):.1f} %.")
    head = ["step", "estimated MiB", "measured MiB", "off by", "peak in"]
    return [Part(rows, head, lines, drawings=drawn, sentences=sentences, further=further)]


def estimate_errors(rows: Sequence[Row]) -> list[float]:
    """How far estimates of memory were off, in percent."""
    return [abs(row["figures"]["estimate_error"]["median"]) for row in rows if "estimate_error" in row["figures"]]


def trace(rows: Sequence[Row]) -> list[Part]:
    parts = []
    for row in rows:
        details = row["details"]
        lines = [
            [f"`{o['name'][:80]}`", f"{1000 * o['seconds']:.1f}", f"{o['share_percent']:.1f} %", f"{o['calls']:.0f}"]
            for o in details["operators"][:8]
        ]
        further = [f"The host waits {w['count']} times per step at {w['line']} ({w['operator']})." for w in details["waits"]]
        if gaps := details["gaps"]:
            further.append(f"The device idles {100 * gaps['idle_share']:.1f} % of the time.")
            for g in gaps["largest"][:5]:
                further.append(f"{1e6 * g['seconds']:.0f} µs in '{g['part']}', the host in {g['meanwhile'] or 'Python'}")
        waits = f"The host waits for the device {row['figures']['waits_per_step']['median']:.0f} times per step."
        head = ["operator, own time", "ms per step", "share", "calls"]
        parts.append(Part([row], head, lines, case_words(row["case"]), sentences=[waits], further=further))
    return parts


KINDS: tuple[tuple[str, str, str, Callable[[Sequence[Row]], list[Part]]], ...] = (
    ("Kernels", "kernels", KERNEL_COLUMNS, kernels),
    ("Losses beside the published way", "objectives", OBJECTIVE_COLUMNS, objectives),
    ("A step beside the published way", "published step", "", functools.partial(sides, "× published")),
    ("A step with one thing taken back or added", "ablation", "", functools.partial(sides, "× first")),
    ("A step, model alone", "step", "", step),
    ("Rate against the batch", "batch search", "", search),
    ("Loader and model", "train", "", train),
    ("Loaders alone", "loader", "", loaders),
    ("Memory of a step", "memory", "", memory),
    ("Operators of a step", "trace", "", trace),
)
