"""Results of benchmarks and profiles as JSON lines, each with what it takes to judge and repeat them.

A record is one measured case: ``kind`` (kernels, objectives, loader, step, train, memory, trace), ``case`` (what was measured: the key by
which records are compared), ``figures`` (name → unit, which way is better, samples and their median), ``details`` (tables for pages), and
the circumstances: date, command, hardware with driver and load, versions, git commit. Files only grow: a case that is measured again adds a
line, and whoever reads puts the samples of equal cases together.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from massl_fast.hardware import git_state, machine, versions

SCHEMA = 1
REQUIRED = ("kind", "date", "command", "hardware", "versions", "git", "case", "figures")
DIGITS = 6  # significant, of a sample


def figure(samples: Sequence[float] | float, unit: str, better: str = "", *, exact: bool = False) -> dict[str, Any]:
    """A measured quantity. ``better`` is lower, higher or empty (told, never judged); ``exact`` marks what does not vary between runs."""
    samples = [samples] if isinstance(samples, int | float) else list(samples)
    if not samples or not all(math.isfinite(value) for value in samples):
        raise ValueError(f"A figure in {unit} needs finite samples; found {samples[:5]}.")
    if better not in ("", "lower", "higher"):
        raise ValueError(f"better is {better!r}; it can be lower, higher or empty.")
    values = [float(f"{value:.{DIGITS}g}") for value in samples]
    found = {"unit": unit, "better": better, "median": float(f"{median(values):.{DIGITS}g}"), "samples": values}
    return found | ({"exact": True} if exact else {})


def record(kind: str, case: dict[str, Any], figures: dict[str, Any], details: dict[str, Any] | None = None) -> dict[str, Any]:
    """A record of one case, measured just now by this process."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "hardware": machine() | {"load_1_minute": round(os.getloadavg()[0], 2)},
        "versions": versions(),
        "git": git_state(),
        "case": case,
        "figures": figures,
        "details": details or {},
    }


def check_writable(path: Path | str) -> None:
    """Raise ValueError where records cannot be written, before anything is measured for them."""
    path = Path(path)
    there = path.exists()
    append(path, [])
    if not there:
        path.unlink()


def append(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Add records to a file, one line each, at once, so that a run that is cut off keeps what it has."""
    path = Path(path)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"Records cannot be written to {path}: {error.strerror}. Name another file.") from None


def read(path: Path | str) -> list[dict[str, Any]]:
    """The records of a file, or of all .jsonl files of a folder. Raises ValueError for what is not a record of this schema."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.jsonl"))
        if not files:
            raise ValueError(f"The folder {path} holds no .jsonl file of records.")
        return [row for file in files for row in read(file)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Records cannot be read from {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}.") from None
    rows = [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no records.")
    return rows


def latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last record of each case, in order of first appearance."""
    last: dict[str, dict[str, Any]] = {}
    for row in rows:
        last[json.dumps([row["kind"], row["case"]], sort_keys=True)] = row
    return list(last.values())


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError(f"{place}: not a JSON object.") from None
    if not isinstance(row, dict) or row.get("schema") != SCHEMA:
        found = row.get("schema") if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{place}: a record of schema {found}; this program reads schema {SCHEMA}. Measure again, or use its version.")
    missing = [key for key in REQUIRED if key not in row]
    if missing:
        raise ValueError(f"{place}: the record lacks {', '.join(missing)}.")
    for name, value in row["figures"].items():
        if not isinstance(value, dict) or not value.get("samples"):
            raise ValueError(f"{place}: the figure {name} has no samples.")
    return row


def name_of_case(row: dict[str, Any]) -> str:
    return row["kind"] + ": " + ", ".join(f"{key} {_short(value)}" for key, value in row["case"].items() if value not in ("", None))


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# Circumstances


def command() -> str:
    """The command line as a user would type it."""
    program = Path(sys.argv[0]).name
    words = ["massl-fast" if program in ("__main__.py", "massl-fast", "massl_fast_here.py") else program, *sys.argv[1:]]
    return shlex.join(words)
