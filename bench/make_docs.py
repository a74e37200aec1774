"""docs/benchmarks.md, its plots, and the table in the README, from the committed records: ``python bench/make_docs.py``.

No figure in them is typed by hand. ``--check`` writes nothing and ends with exit code 1 where a file is not what the records give. Of
plots it compares the words and numbers: another version of matplotlib draws the same with other strokes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from massl_fast import records
from massl_fast.benchmarks.chapters import Part, Row, chapters, estimate_errors, published_model, times_the_first
from massl_fast.benchmarks.page import device_of
from massl_fast.records import latest

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks: made by bench/make_docs.py -->", "<!-- /benchmarks -->"
# What the pages' style sheet gives on a light ground; a file of its own has no style sheet.
COLOURS = {"--ink": "#1c1d1f", "--muted": "#6b6f76", "--grid": "#e3e4e6", "--blue": "#1f6fb5", "--orange": "#c8560a"}
COLOURS |= {"--green": "#12805c", "--violet": "#8a4fb8"}
INTRODUCTION = """# Benchmarks

Made by `python bench/make_docs.py` from the records in `bench/results/`, where every sample, the hardware, versions, commit and command
stand; `massl-fast bench page bench/results/DEVICE` draws them all as one page. How they are taken and why the comparisons are fair:
[bench/README.md](../bench/README.md). What no record shows has not been measured."""


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
        for chapter in chapters(rows):
            parts += [f"### {chapter.heading}", *([chapter.note] if chapter.note else [])]
            for part in chapter.parts:
                parts.append(text_of(part, folder.name))
                named = [drawn for drawn in part.drawings if drawn.name]
                found |= {plots_of(root) / f"{folder.name}-{drawn.name}.svg": alone(drawn.svg) for drawn in named}
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


def dated(row: Row) -> str:
    return f"{row['date'][:10]}, torch {row['versions'].get('torch', 'unknown')}"


def taken(rows: list[Row]) -> str:
    """How records came about, a line per command and commit, with the loads under which they were taken."""
    loads: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        commit = (row["git"]["commit"][:7] or "unknown") + (" with changes" if row["git"]["dirty"] else "")
        key = (dated(row), commit, str(row["hardware"]["cores"]), row["command"])
        loads.setdefault(key, []).append(row["hardware"].get("load_1_minute", 0))
    lines = []
    for (date, commit, cores, command), found in loads.items():
        load = " to ".join(f"{value:g}" for value in sorted({min(found), max(found)}))
        lines.append(f"{date}, commit {commit}, {cores} cores, load {load}: `{command}`")
    return "\n\n".join(lines)


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def text_of(part: Part, device: str) -> str:
    """A part of a chapter as Markdown: its title, table, drawings that are files, sentences, and how its records came about."""
    drawn = [f"![{drawn.title}](plots/{device}-{drawn.name}.svg)" for drawn in part.drawings if drawn.name]
    title = [f"**{part.title}**"] if part.title else []
    return "\n\n".join([*title, table(part.head, part.lines), *part.sentences, *drawn, taken(part.rows)])


def headlines_of(rows: list[Row]) -> list[str]:
    """What the README shows: a whole step beside the published way, and how far the memory estimate is off."""
    lines = []
    for row in rows:
        if row["kind"] == "published step" and "objective" not in row["case"]:
            sides = row["details"]["sides"]
            ours = sides.get("massl-fast")
            if ours and "published" in sides:
                less = 100 * (1 - ours["peak_mib"] / sides["published"]["peak_mib"])
                what = f"{published_model(row)}; {row['case']['batch']} images, {row['case']['precision']}"
                times = f"{times_the_first(row, 'massl-fast'):.2f} times as fast as the published way"
                lines.append(f"a training step ({what}) is {times}, with {less:.0f} % less memory ({dated(row)})")
    measured = [row for row in rows if row["kind"] == "memory" and "estimate_error" in row["figures"]]
    if measured:
        worst, cases = max(estimate_errors(measured)), f"{len(measured)} cases ({dated(measured[-1])})"
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
