"""The tests that only a GPU can run, then every benchmark and profile: each part in a process of its own, with a limit in seconds.

The parts stand in everything.ini, most telling first: what decides something comes before what rounds it off. They are independent: what
one loses, by an error, by its limit or for want of a package, is lost to that part alone. Limits are hard, and those of the parts that are
always given their time add up to less than eight minutes; what they leave over goes to the further parts, in their order. Records come into
``records.jsonl`` as they are made, what a part says into ``logs/``, and at the end a line per part and the figures that one looks for first
into ``summary.md``.

Nothing here or in the parts that time kernels imports more than PyTorch, Triton, NumPy and Jinja. On a CPU every part has a stand-in in
small, so that all of it can be rehearsed where there is no GPU. Not make targets with ``timeout``: limits add up, parts run beside each
other, and their process groups end with them.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from massl_fast import records
from massl_fast.extras import importable
from massl_fast.hardware import ROOT

LAUNCHERS = ("massl-fast", "massl_fast_here.py")
SHORTEST = 10.0  # seconds that a part must still have to be started
OF_ALL_PARTS = 8 * 60 - 40
"""Seconds of the parts that are always given their time; the rest of eight minutes is for starting, stopping and the page."""

IN_A_REHEARSAL = 10.0
"""How many times their limits parts have on a CPU, which other programs may share, and which nobody rents by the minute."""

# What a command's first word stands for, where it is not a sub-command of massl-fast.
BENCH_STEP = ROOT / "bench" / "bench_step.py"
PROGRAMS = {"pytest": ("-m", "pytest"), "bench_step.py": (str(BENCH_STEP),)}
OF_THE_REPOSITORY = {"pytest": ROOT / "tests", "bench_step.py": BENCH_STEP}
SETTINGS = ("pydantic", "yaml", "timm", "psutil", "rich")
"""Packages without which no part runs that takes the settings of a training run."""


@dataclass(frozen=True)
class Part:
    """One command, with its stand-in on a CPU; everything.ini says what each field is."""

    name: str
    seconds: float
    on_gpu: str
    on_cpu: str = ""
    needs: tuple[str, ...] = ()
    beside: bool = False
    further: bool = False


@dataclass
class Outcome:
    part: Part
    status: str  # ran, failed, not run
    seconds: float = 0.0
    words: str = ""


def read_parts() -> tuple[Part, ...]:
    table = configparser.ConfigParser(interpolation=None)
    table.read_string(Path(__file__).with_suffix(".ini").read_text(encoding="utf-8"))

    def part(row: configparser.SectionProxy) -> Part:
        needs = tuple(package for word in row.get("needs", "").split() for package in (SETTINGS if word == "settings" else (word,)))
        flags = (row.getboolean(flag, fallback=False) for flag in ("beside", "further"))
        return Part(row.name, row.getfloat("seconds"), row["gpu"], row.get("cpu", ""), needs, *flags)

    return tuple(part(table[name]) for name in table.sections())


PARTS = read_parts()


def groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts that run at the same time, together."""
    found: list[list[Part]] = []
    for part in parts:
        if part.beside and found:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def words(folder: Path, images: str) -> dict[str, str]:
    """What the braces in the commands hold."""
    out = f"--output {shlex.quote(str(folder / 'records.jsonl'))}"
    one_launch = "--set full --kernel-name regex:read_kernel --launch-count 1 --force-overwrite"
    return {
        "bare": "-o addopts= -v --color=no -rs -p no:cacheprovider",  # without the project's own settings, which ask for plugins
        "root": shlex.quote(str(ROOT)),
        "out": out,
        "vit": "--recipe vit_small_in1k",
        "tiny": "--train.global_batch 4 --train.device cpu",
        "beside": f"--one-by-one --cases vit_small --rounds 11 {out}",
        "images": shlex.quote(images),
        "folder": shlex.quote(str(folder)),
        "ncu": f"ncu {one_launch} --export {shlex.quote(str(folder / 'read_kernel'))}",
    }


def arguments(command: str, filled: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment that a command sets (words NAME=VALUE at its begin), and its words, the program's first."""
    split = shlex.split(command.format_map(filled))
    environment = {}
    while re.match(r"[A-Z_]+=", split[0]):
        name, _, value = split.pop(0).partition("=")
        environment[name] = value
    return environment, split


def command_line(split: Sequence[str]) -> list[str]:
    """How a part's process is started."""
    if split[0] == "ncu":
        ours = split.index("bench")
        return [*split[:ours], sys.executable, *launcher(), *split[ours:]]
    if split[0] in PROGRAMS:
        return [sys.executable, *PROGRAMS[split[0]], *split[1:]]
    return [sys.executable, *launcher(), *split]


def launcher() -> list[str]:
    """How this program was started, to start it again."""
    return [sys.argv[0]] if Path(sys.argv[0]).name in LAUNCHERS else ["-m", "massl_fast"]


def obstacle(part: Part, on_gpu: bool) -> str:
    """Why a part cannot run here; empty where it can."""
    command = part.on_gpu if on_gpu else part.on_cpu
    if not command:
        return "it needs a GPU"
    where = OF_THE_REPOSITORY.get(shlex.split(command)[0])
    if where and not where.exists():
        return f"{where} is not here: it comes with the repository alone"
    if missing := [name[1:] for name in part.needs if name.startswith("/") and not shutil.which(name[1:])]:
        return f"{missing[0]} is not on the path"
    if missing := [name for name in part.needs if not name.startswith("/") and not importable(name)]:
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    return ""


def advice(outcomes: Sequence[Outcome]) -> str:
    """How to bring along the packages that parts lacked, to a machine without a network too; empty where nothing lacked."""
    lacking = {name: None for outcome in outcomes for name in outcome.part.needs if not name.startswith("/") and not importable(name)}
    if not lacking:
        return ""
    projects = " ".join({"yaml": "pyyaml"}.get(name, name) for name in lacking)
    version = ".".join(platform.python_version_tuple()[:2])
    return (
        f"{', '.join(lacking)}: install with python -m pip install {projects}; where there is no network, make a folder elsewhere with "
        f"python -m pip install --target packages --only-binary=:all: --no-deps --python-version {version} {projects} and what they need "
        "(pydantic: pydantic-core annotated-types typing-extensions typing-inspection; rich: markdown-it-py mdurl pygments), bring it "
        "here, and start with PYTHONPATH=packages."
    )


# Running


def run_parts(parts: Sequence[Part], folder: Path, deadline: float, on_gpu: bool, images: str = "") -> list[Outcome]:
    """All parts, those beside each other at once; a line of each is printed when it is known. ``deadline``: of ``time.monotonic()``."""
    filled = words(folder, images)
    outcomes: list[Outcome] = []
    for group in groups(parts):
        left = deadline - time.monotonic()
        late = "the time for all parts is used up; --minutes gives more" if left < SHORTEST else ""
        with contextlib.ExitStack() as ends:
            running: list[tuple[Part, str | Process]] = []
            for number, part in enumerate(group, len(outcomes) + 1):
                log = folder / "logs" / f"{number:02d} {re.sub('[^a-zA-Z0-9]+', '_', part.name)}.txt"
                limit = min(part.seconds * (1.0 if on_gpu else IN_A_REHEARSAL), left)
                reason = obstacle(part, on_gpu) or late
                running.append((part, reason or ends.enter_context(Process(part, filled, log, limit, on_gpu))))
            for part, process in running:
                ran = isinstance(process, Process)
                outcomes.append(outcome_of(part, process, folder) if ran else Outcome(part, "not run", words=process))
                print(line_of(outcomes[-1]), flush=True)
    return outcomes


class Process:
    """A part's process in a group of its own, so that its workers end with it; ``log`` takes what it says."""

    def __init__(self, part: Part, filled: dict[str, str], log: Path, limit: float, on_gpu: bool) -> None:
        environment, split = arguments(part.on_gpu if on_gpu else part.on_cpu, filled)
        environment = {**os.environ, **environment}
        if not on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
            # Threads that wait for each other by spinning take the cores from those that compute, where other programs run, too.
            environment.setdefault("OMP_WAIT_POLICY", "passive")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.limit, self.start = log, limit, time.monotonic()
        log.write_text(f"{shlex.join(split)}\n", encoding="utf-8")
        with open(log, "a") as file:
            # pytest looks for packages where it stands, and the repository's is one without kernels.
            place = ROOT / "tests" if split[0] == "pytest" else None
            self._process = subprocess.Popen(
                command_line(split), stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment, cwd=place
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait(self) -> tuple[int | None, float, str]:
        """Exit code, None where the limit ended it; seconds; what it said."""
        code = None
        with self, contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=max(0.0, self.start + self.limit - time.monotonic()))
        return code, time.monotonic() - self.start, self.log.read_text(encoding="utf-8", errors="replace")


def outcome_of(part: Part, process: Process, folder: Path) -> Outcome:
    """What came of a part: of tests how many passed, of what lacks a package its name, else the last line that it said."""
    code, seconds, said = process.wait()
    last = next((line for line in reversed(said.strip().splitlines()[1:]) if line.strip()), "")
    late = f"ended at its limit of {process.limit:.0f} s; what it recorded is kept" if code is None else ""
    if part.on_gpu.startswith("pytest"):
        row, told = of_tests(part.name, said)
        if row["figures"]:
            records.append(folder / "records.jsonl", [row])
            failed = code != 0 or "failed" in row["figures"]
            return Outcome(part, "failed" if failed else "ran", seconds, "; ".join(filter(None, (told, late))))
        if code == 0:
            return Outcome(part, "not run", seconds, told)
    if late:
        return Outcome(part, "failed", seconds, late)
    if missing := re.match(r"ModuleNotFoundError: No module named '([^']+)'", last):
        return Outcome(part, "not run", seconds, f"{missing[1]} is not installed")
    return Outcome(part, "failed" if code else "ran", seconds, last[:200] or f"exit code {code}" if code else "")


def of_tests(name: str, said: str) -> tuple[dict[str, Any], str]:
    """A record of a part's tests, without figures where none ran, and the outcome in words with the tests that failed or why they did not
    run."""
    results = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)", said, re.MULTILINE)
    wrong = [test.rpartition("/")[2] for test, result in results if result in ("FAILED", "ERROR")]
    counts = {"passed": sum(result == "PASSED" for _, result in results), "failed": len(wrong)}
    skipped = sorted(set(re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", said, re.MULTILINE)))
    figures = {word: records.figure(count, "tests", exact=True) for word, count in counts.items() if count}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    if wrong:
        told += f": {'; '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}"
    if skipped:
        told = "; ".join(filter(None, (told, f"left out: {skipped[0]}")))
    return records.record("tests", {"part": name}, figures, {"failed": wrong, "left out": skipped}), told


@contextlib.contextmanager
def clocks(folder: Path) -> Iterator[None]:
    """Clocks, power and temperature of the GPU twice a second into ``clocks.csv``, where nvidia-smi is there."""
    if not shutil.which("nvidia-smi"):
        yield
        return
    query = "--query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"
    with open(folder / "clocks.csv", "w") as file:
        process = subprocess.Popen(["nvidia-smi", query, "--format=csv", "-lms", "500"], stdout=file, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


# What is shown


def line_of(outcome: Outcome) -> str:
    return f"{outcome.part.name:<52}{outcome.status:<9}{outcome.seconds:>4.0f} s  {outcome.words}".rstrip()


def summary(outcomes: Sequence[Outcome], rows: Sequence[dict[str, Any]]) -> str:
    """The machine, a line per part and the figures that one looks for first, as Markdown."""
    here = records.record("summary", {}, {})
    shown = here["hardware"] | here["versions"]
    lines = [f"# {here['hardware'].get('gpu') or here['hardware']['processor']}, {here['date'][:10]}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in shown.items()) + f"; commit {here['git']['commit'] or 'unknown'}.", ""]
    lines += ["| part | outcome | seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {o.part.name} | {o.status} | {o.seconds:.0f} | {o.words.replace('|', '/')} |" for o in outcomes]
    if told := advice(outcomes):
        lines += ["", told]
    return "\n".join([*lines, "", *(f"- {line}" for line in headlines(rows))]) + "\n"


# The figures that one looks for first, by kind of record.
HEADLINES = {
    "kernels": ("time", "time ratio", "error", "share of the matrix rate"),
    "objectives": ("time", "time ratio", "error", "share of the matrix rate"),
    "step": ("images_per_second", "utilization_of_measured_rate", "model_flops_utilization"),
    "memory": ("measured_peak", "estimate_error"),
    "batch search": ("best_images_per_second",),
    "train": ("loader_images_per_second", "model_images_per_second", "together_images_per_second", "data_wait"),
    "loader": ("images_per_second", "images_per_core_second"),
    "trace": ("device_idle", "waits_per_step"),
}


def headlines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per case, from its latest record."""
    lines = []
    for row in records.latest(rows):
        names = HEADLINES.get(row["kind"], [name for name in row["figures"] if name.endswith("step_seconds")])
        found = [(name, row["figures"][name]) for name in names if name in row["figures"]]
        told = ", ".join(f"{name.replace('_', ' ')} {median(figure['samples']):.4g} {figure['unit']}" for name, figure in found)
        if row["kind"] not in ("correctness", "tests") and told:
            lines.append(f"{records.name_of_case(row)}: {told}")
    return lines


def read_whole(path: Path) -> list[dict[str, Any]]:
    """The records of a file but for a last line that a limit cut off."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
