"""``massl-fast bench page``: records as one HTML page that needs nothing but itself.

What a section shows comes from the records of its kind; of a case that was measured several times, the latest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from massl_fast.benchmarks import records
from massl_fast.benchmarks.charts import MIB, Bar, Dot, Line, bars, memory_timeline, over_sizes, roofline, split, waterfall
from massl_fast.benchmarks.intervals import spread_percent
from massl_fast.engine.phases import PHASES
from massl_fast.report.html import document, figure, grid, section, table

Row = dict[str, Any]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OURS = {"triton": "--blue", "streaming": "--green", "enqueue_": "--blue", "partition_indices": "--blue"}
# Tables whose last line is one like the others.
STYLE = (
    "<style>.plain td, .plain th { padding-left: 16px; white-space: nowrap; }"
    " .plain th:first-child { padding-left: 0; white-space: normal; }"
    " .plain tr:last-child > * { font-weight: 400; } .plain tr:last-child th { color: var(--muted); }</style>"
)
PEERS = ("--orange", "--violet", "--muted")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", help="files of records, or folders of them")
    parser.add_argument("--output", default="", help="the page (default: benchmarks.html beside the first record)")


def run(args: argparse.Namespace) -> int:
    rows = [row for path in args.records for row in records.read(path)]
    first = Path(args.records[0])
    output = Path(args.output) if args.output else (first if first.is_dir() else first.parent) / "benchmarks.html"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page_of(rows), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The page cannot be written to {output}: {error.strerror}. Name another place with --output.") from None
    print(output)
    return 0


def page_of(rows: Sequence[Row]) -> str:
    """The page of some records as HTML."""
    rows = latest(rows)
    of = lambda kind: [row for row in rows if row["kind"] == kind]  # noqa: E731
    sections = [
        header(rows),
        kernels_section(of("kernels")),
        *(step_section(row) for row in of("step")),
        *(sides_section(row) for kind in ("published step", "ablation") for row in of(kind)),
        *(search_section(row) for row in of("batch search")),
        *(train_section(row) for row in of("train")),
        loader_section(of("loader")),
        *(memory_section(row) for row in of("memory")),
        *(trace_section(row) for row in of("trace")),
        circumstances(rows),
    ]
    return document(f"{device_of(rows)} · massl-fast benchmarks", sections)


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last record of each case, in order of first appearance."""
    last: dict[str, Row] = {}
    for row in rows:
        last[json.dumps([row["kind"], row["case"]], sort_keys=True)] = row
    return list(last.values())


def device_of(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(row["hardware"].get("gpu") or row["hardware"]["processor"] for row in rows)
    return ", ".join(names)


def header(rows: Sequence[Row]) -> str:
    dates = sorted(row["date"][:10] for row in rows)
    commits = dict.fromkeys(row["git"]["commit"][:10] + (" with changes" if row["git"]["dirty"] else "") for row in rows)
    load = max(row["hardware"].get("load_1_minute", 0) for row in rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    words = f"{when} · commit {', '.join(commits)} · load up to {load:g} on {rows[0]['hardware']['cores']} cores"
    return f"{STYLE}<header><h1>{escape(device_of(rows))}</h1><p>{escape(words)}</p></header>"


def shown_number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# Kernels


def kernels_section(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        key = {name: value for name, value in row["case"].items() if name != "variant"}
        shapes.setdefault(json.dumps(key), []).append(row)
    parts = [_roofline(rows), grid([figure(title, drawn) for size in ("N", "K") for title, drawn in growth(rows, size)])]
    parts += [_shape(json.loads(key), members) for key, members in shapes.items()]
    note = (
        "Times are medians over rounds in which all variants of a case take turns; whiskers are 99 % intervals of the median. Beside each "
        "time stands its largest error against float64, relative to the largest value."
    )
    return section("Kernels", "".join(parts), note)


def _roofline(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "rate" in row["figures"]]
    if not measured:
        return ""
    rate = 1e12 * median(row["figures"]["matrix product"]["median"] for row in measured)
    bandwidth = 1e9 * median(row["figures"]["copy"]["median"] for row in measured)
    looks = variant_looks(rows)
    dots = [
        Dot(name, intensity(row["case"]), 1e12 * row["figures"]["rate"]["median"], *looks[name])
        for row in measured
        for name in [row["case"]["variant"]]
    ]
    note = (
        "Both roofs were measured in the same run. Least traffic: the memory once, rows in, read-outs or gradient out; operations are the "
        "4·D·(V+T)·N·K of the one pass, also for variants that do more."
    )
    return figure("Roofline", roofline(dots, rate, bandwidth), note)


def variant_looks(rows: Sequence[Row]) -> dict[str, tuple[str, bool]]:
    """(colour, whether hollow or dashed) of each variant: ours in colours of their own, peers hollow."""
    peers = [name for name in dict.fromkeys(row["case"]["variant"] for row in rows) if name not in OURS]
    return {name: (colour, False) for name, colour in OURS.items()} | {
        name: (PEERS[number % len(PEERS)], True) for number, name in enumerate(peers)
    }


def intensity(case: dict[str, Any]) -> float:
    """Operations a byte of a kernel case's least traffic."""
    rows, kept = (case["V"] + case["T"]) * case["N"], case["K"] // case["block"] * case["block"]
    size = BYTES[case["dtype"]]
    traffic = kept * case["D"] * size + rows * case["D"] * (size + 4)
    return 4 * case["D"] * rows * kept / traffic


def growth(rows: Sequence[Row], size: str) -> list[tuple[str, str]]:
    """(title, drawing) of time against N or K for each operation measured at several, everything else as in the first record."""
    figures = []
    for operation in dict.fromkeys(row["case"]["operation"] for row in rows):
        of_operation = [row for row in rows if row["case"]["operation"] == operation]
        rest = [name for name in ("V", "T", "N", "D", "K", "block", "dtype") if name != size]
        first = of_operation[0]["case"]
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in of_operation:
            if all(row["case"][name] == first[name] for name in rest):
                lines.setdefault(row["case"]["variant"], []).append((row["case"][size], row["figures"]["time"]["median"]))
        looks = variant_looks(rows)
        drawable = [Line(name, points, *looks[name]) for name, points in lines.items() if len(points) > 1]
        if drawable:
            fixed = f"{'K' if size == 'N' else 'N'} = {first['K' if size == 'N' else 'N']}"
            drawn = over_sizes(drawable, {"N": "N, images", "K": "K, entries"}[size], "ms")
            figures.append((f"{operation}: time against {size}, {fixed}", drawn))
    return figures


def _shape(case: dict[str, Any], rows: Sequence[Row]) -> str:
    title = f"{case['operation']}: " + ", ".join(f"{name} {value}" for name, value in case.items() if name not in ("operation", "device"))
    return figure(title, kernel_bars(rows))


def kernel_bars(rows: Sequence[Row]) -> str:
    """Times of the variants of one case, each with its error."""
    items = []
    for row in rows:
        figures, name = row["figures"], row["case"]["variant"]
        notes = [f"error {figures['error']['median']:.1e}"]
        if "extra memory" in figures:
            notes.append(f"{shown_number(figures['extra memory']['median'])} MiB extra")
        if "share of the matrix rate" in figures:
            notes.append(f"{figures['share of the matrix rate']['median']:.0f} % of the matrix rate")
        items.append(Bar(name, figures["time"]["samples"], OURS.get(name.split(",")[0], "--muted"), " · ".join(notes)))
    return bars(items, "ms", wide=True)


# Steps


def case_words(case: dict[str, Any]) -> str:
    compiled = ", compiled" if case.get("compile") else ""
    images = "" if case["batch"] == "search" else f", {case['batch']} images"
    return f"{case['architecture']}{images}, {case['crops']} px, memory {case['memory']}, {case['precision']}{compiled}"


def step_section(row: Row) -> str:
    figures, details = row["figures"], row["details"]
    step, images = figures["step_seconds"], figures["images_per_second"]
    rate = f"{1000 * step['median']:.1f} ms a step, quartiles {spread_percent(step['samples']):.0f} % apart"
    tiles = [
        ("Images per second", shown_number(images["median"]), rate),
        (
            "Of the measured matrix rate",
            f"{figures['utilization_of_measured_rate']['median']:.1f} %",
            f"{details['gflop_per_image']:.3g} GFLOP an image; {shown_number(details['matrix_tflops_measured'])} TFLOP/s",
        ),
    ]
    if "model_flops_utilization" in figures:
        sheet = f"of the data sheet's {details['matrix_tflops_data_sheet']:.4g} TFLOP/s"
        tiles.append(("Model FLOPs utilisation", f"{figures['model_flops_utilization']['median']:.1f} %", sheet))
    if "peak_memory" in figures:
        tiles.append(("Peak memory", f"{figures['peak_memory']['median'] / 1024:.2f} GiB", "allocated"))
    cells = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><dd>{escape(c)}</dd></div>" for a, b, c in tiles)
    parts = {name: 1000 * figures[f"part: {name}"]["median"] for name in PHASES}
    ratios = [b / a for a, b in zip(step["samples"], figures["watched_step_seconds"]["samples"])]
    drawn = figure(
        "Parts of a step", split(parts, "ms"), f"Marking the parts changed a step's time by {100 * (median(ratios) - 1):+.1f} %."
    )
    return section("A step, model alone", f'<dl class="tiles">{cells}</dl><p></p>{drawn}', case_words(row["case"]))


SIDES_TITLES = {"published step": "A step beside the published way", "ablation": "A step with one thing taken back or added"}


def sides_section(row: Row) -> str:
    """Ways of taking a step that took turns in one process."""
    sides = row["details"]["sides"]
    colours = dict.fromkeys(sides, "--blue") | {next(iter(sides)): "--muted"}
    rates = [
        Bar(side, [result["images_per_second"]], colours[side], f"× {times_the_first(row, side):.2f}") for side, result in sides.items()
    ]
    peaks = [Bar(side, [result["peak_mib"] / 1024], colours[side]) for side, result in sides.items()]
    words = (
        f"{published_model(row)}, {row['case']['batch']} images, {row['case']['precision']}, memory of {row['case']['memory_size']}; "
        f"a step of each in turn, {row['details']['rounds']} rounds"
    )
    drawn = [figure("Images per second", bars(rates, "images/s")), figure("Peak memory", bars(peaks, "GiB"))]
    return section(SIDES_TITLES[row["kind"]], grid(drawn), words)


def published_model(row: Row) -> str:
    """The model and crops of a step beside the published way."""
    case, changed = row["case"], row["details"]["case"]["model_args"]
    words = "".join(f", {name} {value}" for name, value in changed.items())
    return f"{case['architecture']}{words}, 2×{case['global_size']} + {case['num_local']}×{case['local_size']} px"


def times_the_first(row: Row, side: str) -> float:
    """How many times as fast as the first side, by the medians that stand beside it."""
    sides = row["details"]["sides"]
    return next(iter(sides.values()))["step_seconds_median"] / sides[side]["step_seconds_median"]


def search_section(row: Row) -> str:
    tried = [(batch, result) for batch, result in row["details"]["tried"] if result]
    lines = [Line("images/s", [(batch, result["images_per_second"]) for batch, result in tried], "--blue")]
    words = [f"Best: {row['details']['best']} images."]
    if "largest" in row["details"]:
        words.append(f"Largest that fits: {row['details']['largest']}; predicted from shapes alone: {row['details']['predicted']}.")
    head = "<tr><th>images</th><th>images/s</th><th>ms a step</th><th>peak MiB</th></tr>"
    body = "".join(
        f"<tr><th>{batch}</th>"
        + (
            f"<td>{result['images_per_second']:.1f}</td><td>{1000 * result['step_seconds']:.1f}</td>"
            f"<td>{'–' if not result['peak_bytes'] else format(result['peak_bytes'] / MIB, '.0f')}</td></tr>"
            if result
            else '<td colspan="3">out of memory</td></tr>'
        )
        for batch, result in row["details"]["tried"]
    )
    card = f'<div class="card"><h3>Tried</h3><table class="numbers plain">{head}{body}</table></div>'
    drawn = figure("Images per second", over_sizes(lines, "images", "images/s"), " ".join(words))
    return section("Rate against the batch", grid([drawn, card]), case_words(row["case"]))


def train_section(row: Row) -> str:
    labels = {"loader": "loader alone", "model": "model alone", "together": "together"}
    items = [
        Bar(label, row["figures"][f"{name}_images_per_second"]["samples"], colour)
        for (name, label), colour in zip(labels.items(), ("--green", "--orange", "--blue"))
    ]
    wait = row["figures"]["data_wait"]["median"]
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in row["details"]["verdict"])
    card = f'<div class="card"><h3>What bounds this run</h3>{sentences}</div>'
    drawn = figure("Images per second", bars(items, "images/s"), f"Together, steps wait for images {wait:.1f} % of the time.")
    return section(
        "Loader and model", grid([drawn, card]), f"{case_words(row['case'])}; {row['case']['loader']} with {workers_of(row['case'])}"
    )


def workers_of(case: dict[str, Any]) -> str:
    return f"{case['workers']} worker{'s' if case['workers'] != 1 else ''}"


def loader_section(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    colours = {"published": "--muted", "torchvision": "--blue", "dali": "--green"}

    def items(name: str) -> list[Bar]:
        found = []
        for row in rows:
            case = row["case"]
            label = f"{case['loader']}, {workers_of(case)}" + (f", {case['decode']}/{case['augment']}" if case["loader"] == "dali" else "")
            found.append(Bar(label, row["figures"][name]["samples"], colours[case["loader"]]))
        return found

    case = rows[0]["case"]
    note = f"2×{case['global_size']} + {case['num_local']}×{case['local_size']} px crops of {case['images']} images, batch {case['batch']}"
    drawn = [
        figure("Images per second", bars(items("images_per_second"), "images/s")),
        figure("Images per second of processor time", bars(items("images_per_core_second"), "images/s")),
    ]
    return section("Loaders alone", grid(drawn), note)


# Memory and traces


def memory_section(row: Row) -> str:
    details, figures = row["details"], row["figures"]
    measured = details.get("measured")
    words = "From shapes alone, before running." if measured is None else ""
    if measured is not None:
        error = figures["estimate_error"]["median"]
        words = f"Filled: measured; outlined: estimated from shapes alone, {error:+.1f} % off the measured peak."
    parts = [figure("The peak, piece by piece", waterfall(details["estimated"], measured), words)]
    if "measured_timeline" in details:
        peak = f"The peak comes in '{details['peak_section']}'."
        parts.append(figure("Memory over a step", memory_timeline(details["measured_timeline"], by_moment=False), peak))
    else:
        parts.append(figure("Memory over a step", memory_timeline(details["estimated_timeline"], by_moment=True)))
    lines = [*details.get("leaks", []), details.get("prediction", {}).get("sentence", "")]
    lines += [f"Beside the step: {name} {size / MIB:.0f} MiB" for name, size in details.get("rest", {}).items()]
    largest = "".join(f"<li>{escape(' '.join(line.split()))}</li>" for line in details.get("largest", []))
    text = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    parts.append(f'<div class="card"><h3>Largest storages at the peak</h3><ul>{largest}</ul>{text}</div>' if largest else "")
    case = row["case"]
    words = f"{case['architecture']}, {case['batch']} images, {case['precision']}, {case['device']}"
    return section("Memory of a step", "".join(parts), words)


def trace_section(row: Row) -> str:
    details = row["details"]
    head = "<tr><th>operator</th><th>ms a step</th><th>share</th><th>calls</th></tr>"
    body = "".join(
        f"<tr><th><code>{escape(o['name'][:80])}</code></th><td>{1000 * o['seconds']:.3f}</td><td>{o['share_percent']:.1f} %</td>"
        f"<td>{o['calls']:.0f}</td></tr>"
        for o in details["operators"]
    )
    parts = [f'<div class="card"><h3>Most time, own</h3><table class="numbers plain">{head}{body}</table></div>']
    lines = []
    if details["gaps"]:
        gaps = details["gaps"]
        lines.append(f"The device idles {100 * gaps['idle_share']:.1f} % of the time.")
        lines += [f"{1e6 * g['seconds']:.0f} µs in '{g['part']}', the host in {g['meanwhile'] or 'Python'}" for g in gaps["largest"][:5]]
    else:
        lines.append("A CPU has no gaps: it computes where it gives the orders.")
    if details["waits"]:
        lines += [f"The host waits {w['count']} × a step at {w['line']} ({w['operator']})" for w in details["waits"]]
    else:
        lines.append("Nothing in a step makes the host wait for the device.")
    parts.append(f'<div class="card"><h3>Gaps and waits</h3>{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>')
    return section("Trace", "".join(parts), case_words(row["case"]))


def circumstances(rows: Sequence[Row]) -> str:
    found: dict[str, str] = {}
    for part in ("hardware", "versions"):
        for row in rows:
            for key, value in row[part].items():
                if key != "load_1_minute":
                    values = found.get(key, "").split(", ") if key in found else []
                    if str(value) not in values:
                        found[key] = ", ".join([*values, str(value)])
    commands = "".join(f"<li><code>{escape(command)}</code></li>" for command in dict.fromkeys(row["command"] for row in rows))
    cards = [f'<div class="card">{table(found.items())}</div>', f'<div class="card"><h3>Commands</h3><ul>{commands}</ul></div>']
    return section("How this was measured", grid(cards))
