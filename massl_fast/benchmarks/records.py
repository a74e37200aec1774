"""Results of benchmarks and profiles as JSON lines, each with what it takes to judge and repeat them.

A record is one measured case: ``kind`` (kernels, loader, step, train, memory, trace), ``case`` (what was measured: the key by which
records are compared), ``figures`` (name → unit, which way is better, samples and their median), ``details`` (tables for pages), and the
circumstances: date, command, hardware with driver and load, versions, git commit. Files only grow: a case that is measured again adds a
line, and whoever reads puts the samples of equal cases together.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
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
        "hardware": hardware() | {"load_1_minute": round(os.getloadavg()[0], 2)},
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


@functools.cache
def hardware() -> dict[str, Any]:
    found: dict[str, Any] = {"processor": processor_name(), "cores": os.cpu_count(), "memory_gib": _memory_gib()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["gpu_multiprocessors"] = properties.multi_processor_count
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found |= _driver()
    return found


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _driver() -> dict[str, str]:
    """Driver and clock and power limits, where nvidia-smi tells them."""
    if not shutil.which("nvidia-smi"):
        return {}
    keys = {"driver_version": "driver", "clocks.max.sm": "max_clock", "power.limit": "power_limit"}
    query = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode:
        return {}
    return dict(zip(keys.values(), (value.strip() for value in answer.stdout.strip().split(","))))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit and whether tracked files other than records differ from it. Where the files came without git, MASSL_FAST_COMMIT names it."""
    if named := os.environ.get("MASSL_FAST_COMMIT"):
        return {"commit": named, "dirty": None}
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return {"commit": commit, "dirty": bool(changed) if commit else None}


def _git(*arguments: str) -> str:
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def device_slug(found: dict[str, Any] | None = None) -> str:
    """Name of the folder under bench/results for a device: its GPU's, or cpu (records tell which)."""
    return re.sub(r"[^a-z0-9]+", "-", (found or hardware()).get("gpu", "cpu").lower()).strip("-")
