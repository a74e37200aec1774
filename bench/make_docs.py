"""docs/benchmarks.md, its plots, and the table in the README, from the committed records: ``python bench/make_docs.py``.

No figure in them is typed by hand. ``--check`` writes nothing and ends with exit code 1 where a file is not what the records give. Of
plots it compares the words and numbers: another version of matplotlib draws the same with other strokes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

from massl_fast.benchmarks import records
from massl_fast.benchmarks.charts import memory_timeline, split
from massl_fast.benchmarks.intervals import spread_percent
from massl_fast.benchmarks.page import (
    case_words,
    device_of,
    growth,
    kernel_bars,
    latest,
    published_model,
    shown_number,
    times_the_first,
    workers_of,
)
from massl_fast.profiling.sections import NAMES

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: made by bench/make_docs.py -->", "<!-- /benchmarks -->"
# What the pages' style sheet gives on a light ground; a file of its own has no style sheet.
COLOURS = {"--ink": "#1c1d1f", "--muted": "#6b6f76", "--grid": "#e3e4e6", "--blue": "#1f6fb5", "--orange": "#c8560a"}
COLOURS |= {"--green": "#12805c", "--violet": "#8a4fb8"}
INTRODUCTION = """# Benchmarks

Made by `python bench/make_docs.py` from the records in `bench/results/`, where every sample, the hardware, versions, commit and command
stand; `massl-fast bench page bench/results/DEVICE` draws them all as one page. How they are taken and why the comparisons are fair:
[bench/README.md](../bench/README.md). What no record shows has not been measured."""
KERNEL_HEAD = ["N", "K", "variant", "ms", "quartiles apart", "× first", "× by processor time", "error", "of matrix rate", "extra MiB"]
KERNEL_COLUMNS = """ms: median over the rounds, in which the variants take turns. × first: median of the ratio within a round, so that
it need not be the ratio of two medians where the machine was busy. Error: the largest against float64, relative to the largest value
(read-out or gradient; enqueue: absolute, of an entry). Of matrix rate: operations of the one pass a second, of those that a large matrix
product reached in the same rounds."""
RATIOS = """Images/s come from the median time of a step over the rounds; × is the ratio of these medians, so that both columns
say the same. × by processor time is the median over the rounds of the ratio within a round, of the seconds that the process computed:
what other work on the machine hardly changes. Where the two differ by more than a few percent, the machine was busy; trust the latter.
Neither counts what a loader needs."""
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the files are what the records give")
    args = parser.parse_args()
    try:
        wanted = files(ROOT)
    except ValueError as error:
        print(f"make_docs.py: {error}", file=sys.stderr)
        return 2
    stale, left_over = differences(ROOT, wanted)
    for path in stale:
        print(f"{'stale' if args.check else 'written'}: {path.relative_to(ROOT)}")
    if not args.check:
        for path, text in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in left_over:
        print(f"{'of no record' if args.check else 'removed'}: {path.relative_to(ROOT)}")
        if not args.check:
            path.unlink()
    return int(args.check and bool(stale or left_over))


def differences(root: Path, wanted: dict[Path, str]) -> tuple[list[Path], list[Path]]:
    """Files that are not what the records give, and plots that no record gives."""
    stale = [path for path, text in wanted.items() if not path.is_file() or not same(path, text)]
    return stale, sorted(set(plots_of(root).glob("*.svg")) - wanted.keys())


def same(path: Path, text: str) -> bool:
    found = path.read_text(encoding="utf-8")
    words = re.compile(r"<text[^>]*>([^<]*)</text>").findall
    return found == text or (path.suffix == ".svg" and words(found) == words(text))


def plots_of(root: Path) -> Path:
    return root / "docs" / "plots"


def files(root: Path) -> dict[Path, str]:
    """Every file of a repository that its records give, with its text."""
    found: dict[Path, str] = {}
    parts = [INTRODUCTION]
    headline: list[str] = []
    folders = sorted({path.parent for path in (root / "bench" / "results").glob("*/*.jsonl")})
    if not folders:
        raise ValueError("bench/results holds no DEVICE/*.jsonl of records. Run a benchmark first: massl-fast bench kernels --quick.")
    for folder in folders:
        rows = latest(records.read(folder))
        parts.append(f"## {machine_of(rows)}")
        for heading, kind, section in SECTIONS:
            of_kind = [row for row in rows if row["kind"] == kind]
            if of_kind:
                text, plots = section(of_kind, folder.name)
                parts.append(f"### {heading}\n\n{text}")
                found |= {plots_of(root) / name: alone(svg) for name, svg in plots.items()}
        headline += [f"{machine_of(rows)}: {line}" for line in headlines_of(rows)]
    found[root / "docs" / "benchmarks.md"] = "\n\n".join(parts) + "\n"
    found[root / "README.md"] = with_block((root / "README.md").read_text(encoding="utf-8"), headline)
    return found


def with_block(readme: str, headline: list[str]) -> str:
    """The README with what stands between its two marks replaced."""
    lines = "\n".join(f"- {line}" for line in headline)
    block = f"{BEGIN}\n{lines}\n\nAll of it: [docs/benchmarks.md](docs/benchmarks.md).\n{END}"
    text, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, readme, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md holds the marks {BEGIN} … {END} {count} times; they show, once, where the figures go.")
    return text


def machine_of(rows: list[Row]) -> str:
    """The GPU, or the processor with its cores."""
    cores = sorted({row["hardware"]["cores"] for row in rows if "gpu" not in row["hardware"]})
    return device_of(rows) + (f", {' or '.join(map(str, cores))} cores" if cores else "")


def circumstances(row: Row) -> str:
    hardware, git = row["hardware"], row["git"]
    commit = (git["commit"][:7] or "unknown") + (" with changes" if git["dirty"] else "")
    cores = f"{hardware['cores']} cores, load {hardware.get('load_1_minute', 0):g}"
    return f"{dated(row)}, commit {commit}, {cores}: `{row['command']}`"


def dated(row: Row) -> str:
    return f"{row['date'][:10]}, torch {row['versions'].get('torch', 'unknown')}"


def taken(rows: list[Row]) -> str:
    """How records came about, a line a command."""
    return "\n\n".join({row["command"]: circumstances(row) for row in rows}.values())


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def kernels(rows: list[Row], device: str) -> tuple[str, dict[str, str]]:
    """A table an operation, its first case drawn, and time against N and K where several were measured."""
    texts, plots = [KERNEL_COLUMNS], {}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        shape = {name: value for name, value in row["case"].items() if name not in ("N", "K", "variant", "device")}
        groups.setdefault(", ".join(f"{name} {value}" for name, value in shape.items()), []).append(row)
    for title, members in groups.items():
        lines = [kernel_line(row) for row in sorted(members, key=lambda row: (row["case"]["K"], row["case"]["N"]))]
        texts.append(f"**{title.removeprefix('operation ')}**\n\n{table(KERNEL_HEAD, lines)}")
        first = [row for row in members if all(row["case"][size] == members[0]["case"][size] for size in ("N", "K"))]
        stem = f"{device}-" + re.sub(r"[^a-z0-9]+", "-", title.removeprefix("operation ").lower())
        drawn = {"times": kernel_bars(first)} | {
            f"times-against-{size.lower()}": svg for size in ("N", "K") for _, svg in growth(members, size)
        }
        plots |= {f"{stem}-{name}.svg": svg for name, svg in drawn.items()}
        texts += [f"![{name} of {title.removeprefix('operation ')}](plots/{stem}-{name}.svg)" for name in drawn]
        texts.append(taken(members))
    return "\n\n".join(texts), plots


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


def published(rows: list[Row], device: str) -> tuple[str, dict[str, str]]:
    return sides_of(rows, "× published")


def ablation(rows: list[Row], device: str) -> tuple[str, dict[str, str]]:
    return sides_of(rows, "× first")


def sides_of(rows: list[Row], ratio: str) -> tuple[str, dict[str, str]]:
    """Ways of taking a step that took turns in one process."""
    lines = []
    for row in rows:
        case = row["case"]
        for side, result in row["details"]["sides"].items():
            low, high = (1000 * seconds for seconds in result["step_seconds_quartiles"])
            processor = result.get("times_the_first_side_by_processor_time")
            lines.append(
                [
                    f"{published_model(row)}, {case['batch']} images, {case['precision']}, K {case['memory_size']}",
                    side,
                    shown_number(result["images_per_second"]),
                    f"{low:.0f} to {high:.0f}",
                    f"{times_the_first(row, side):.2f}",
                    f"{processor:.2f}" if processor else "",
                    f"{result['peak_mib']:.0f}",
                ]
            )
    head = ["step", "side", "images/s", "ms a step, quartiles", ratio, "× by processor time", "peak MiB"]
    return "\n\n".join([table(head, lines), RATIOS, *map(circumstances, rows)]), {}


def step(rows: list[Row], device: str) -> tuple[str, dict[str, str]]:
    lines, plots, texts = [], {}, []
    for row in rows:
        case, f = row["case"], row["figures"]
        of = f.get("model_flops_utilization", f["utilization_of_measured_rate"])["median"]
        compiled = ", compiled" if case["compile"] else ""
        lines.append(
            [
                f"{case['architecture']}, {case['batch']} images, {case['crops']} px, {case['precision']}{compiled}",
                shown_number(f["images_per_second"]["median"]),
                f"{1000 * f['step_seconds']['median']:.1f}",
                f"{spread_percent(f['step_seconds']['samples']):.0f} %",
                f"{of:.1f} % of the {'data sheet' if 'model_flops_utilization' in f else 'measured matrix rate'}",
            ]
        )
        name = f"{device}-step-{case['recipe']}-{case['batch']}{'-compiled' if case['compile'] else ''}.svg"
        plots[name] = split({part: 1000 * f[f"part: {part}"]["median"] for part in NAMES}, "ms")
        texts.append(f"![parts of a step]({f'plots/{name}'})\n\n{circumstances(row)}")
    head = ["step, model alone", "images/s", "ms", "quartiles apart", "utilisation"]
    return table(head, lines) + "\n\n" + "\n\n".join(texts), plots


def search(rows: list[Row], device: str) -> tuple[str, dict[str, str]]:
    lines = []
    for row in rows:
        for batch, result in row["details"]["tried"]:
            rate = f"{result['images_per_second']:.1f}" if result else "out of memory"
            lines.append([row["case"]["architecture"], str(batch), rate, "best" if batch == row["details"]["best"] else ""])
    return f"{table(['model', 'images', 'images/s', ''], lines)}\n\n{taken(rows)}", {}


def trace(rows: list[Row], device: str) -> tuple[str, dict[str, str]]:
    texts = []
    for row in rows:
        operators = row["details"]["operators"][:8]
        lines = [[f"`{o['name']}`", f"{1000 * o['seconds']:.1f}", f"{o['share_percent']:.1f} %", f"{o['calls']:.0f}"] for o in operators]
        waits = f"The host waits for the device {row['figures']['waits_per_step']['median']:.0f} times a step."
        texts += [case_words(row["case"]), table(["operator, own time", "ms a step", "share", "calls"], lines), waits, circumstances(row)]
    return "\n\n".join(texts), {}


def train(rows: list[Row], device: str) -> tuple[str, dict[str, str]]:
    lines, texts = [], []
    for row in rows:
        f, case = row["figures"], row["case"]
        rates = [shown_number(f[f"{name}_images_per_second"]["median"]) for name in ("loader", "model", "together")]
        lines.append([f"{case['architecture']}, {case['batch']} images, {case['loader']}", *rates, f"{f['data_wait']['median']:.1f} %"])
        texts.append(f"{row['details']['verdict'][0]}\n\n{circumstances(row)}")
    head = ["loader and model, images/s", "loader alone", "model alone", "together", "data wait"]
    return table(head, lines) + "\n\n" + "\n\n".join(texts), {}


def loaders(rows: list[Row], device: str) -> tuple[str, dict[str, str]]:
    lines = []
    for row in rows:
        case, f = row["case"], row["figures"]
        crops = f"2×{case['global_size']} + {case['num_local']}×{case['local_size']} px"
        places = f", {case['decode']}/{case['augment']}" if case["loader"] == "dali" else ""
        lines.append(
            [
                f"{case['loader']}{places}, {workers_of(case)}, {crops}",
                shown_number(f["images_per_second"]["median"]),
                shown_number(f["images_per_core_second"]["median"]),
                f"{f['host_memory_mib']['median']:.0f}",
            ]
        )
    return f"{table(['loader', 'images/s', 'per core', 'host MiB'], lines)}\n\n{taken(rows)}", {}


def memory(rows: list[Row], device: str) -> tuple[str, dict[str, str]]:
    lines, plots = [], {}
    measured = [row for row in rows if "measured_peak" in row["figures"]]
    for row in measured:
        case, f = row["case"], {name: value["median"] for name, value in row["figures"].items()}
        lines.append(
            [
                f"{case['architecture']}, {case['batch']} images, {case['precision']}",
                f"{f['estimated_peak']:.1f}",
                f"{f['measured_peak']:.1f}",
                f"{f['estimate_error']:+.1f} %",
                row["details"]["peak_section"],
            ]
        )
    texts = [table(["step", "estimated MiB", "measured MiB", "off by", "peak in"], lines)]
    if measured:
        worst = max(abs(row["figures"]["estimate_error"]["median"]) for row in measured)
        texts.append(f"The estimate, from shapes alone, is at most {worst:.1f} % off; median {_median_error(measured):.1f} %.")
        name = f"{device}-memory.svg"
        plots[name] = memory_timeline(measured[0]["details"]["measured_timeline"], by_moment=False)
        first = measured[0]["case"]
        texts += [f"![memory over a step: {first['architecture']}, {first['batch']} images](plots/{name})", taken(measured)]
    return "\n\n".join(texts), plots


def _median_error(rows: list[Row]) -> float:
    return median(abs(row["figures"]["estimate_error"]["median"]) for row in rows)


SECTIONS = (
    ("Kernels", "kernels", kernels),
    ("A step beside the published way", "published step", published),
    ("A step with one thing taken back or added", "ablation", ablation),
    ("A step, model alone", "step", step),
    ("Rate against the batch", "batch search", search),
    ("Loader and model", "train", train),
    ("Loaders alone", "loader", loaders),
    ("Memory of a step", "memory", memory),
    ("Operators of a step", "trace", trace),
)


def headlines_of(rows: list[Row]) -> list[str]:
    """What the README shows: a whole step beside the published way, and how far the memory estimate is off."""
    lines = []
    for row in rows:
        if row["kind"] == "published step":
            sides = row["details"]["sides"]
            ours = sides.get("massl-fast")
            if ours and "published" in sides:
                less = 100 * (1 - ours["peak_mib"] / sides["published"]["peak_mib"])
                what = f"{published_model(row)}; {row['case']['batch']} images, {row['case']['precision']}"
                times = f"{times_the_first(row, 'massl-fast'):.2f} times as fast as the published way"
                lines.append(f"a training step ({what}) is {times}, with {less:.0f} % less memory ({dated(row)})")
    measured = [row for row in rows if row["kind"] == "memory" and "measured_peak" in row["figures"]]
    if measured:
        worst = max(abs(row["figures"]["estimate_error"]["median"]) for row in measured)
        cases = f"{len(measured)} cases ({dated(measured[-1])})"
        lines.append(f"the memory of a step, estimated from shapes before it runs, is at most {worst:.1f} % off in {cases}")
    return lines


def alone(svg: str) -> str:
    """An SVG for a file of its own: colours in place of the page's, on a ground that reads in dark viewers, too."""
    for name, colour in COLOURS.items():
        svg = svg.replace(f"var({name})", colour)
    # Tenths of a pixel are enough: a third of the size.
    svg = re.sub(r' d="[^"]*"', lambda strokes: re.sub(r"(\.\d)\d+", r"\1", strokes[0]), svg)
    opening, rest = svg.split(">", 1)
    # Sizes that a page gives by its grid; text needs a family where no page gives one.
    opening += f' font-family="sans-serif" width="{4 / 3 * float(opening.split("viewBox=")[1].split()[2]):.0f}"'
    return f'{opening}><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'


if __name__ == "__main__":
    sys.exit(main())
