"""Correctness first, then every benchmark and profile, each in a process of its own with a time limit.

What one part loses, by an error or by its limit, is lost to that part alone; records come into the folder as they are made, the output of
all parts into ``log.txt``. Kernels that are wrong are not timed, nor is anything that uses them, unless asked for. On a CPU the shapes are
small and what needs a GPU is named as left out. Not make targets with ``timeout``: parts wait for correctness, share one limit, and their
process groups end with them.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from massl_fast.benchmarks import records
from massl_fast.benchmarks.chapters import latest
from massl_fast.benchmarks.loader import importable
from massl_fast.hardware import ROOT

PUBLISHED = ROOT / "bench" / "bench_step.py"
LAUNCHERS = ("massl-fast", "massl_fast_here.py")
GPU_ALONE = ("triton kernels", "largest batch", "gaps of the device", "decoding on the GPU")
SHORTEST = 10.0  # seconds that a part must still have to be started


@dataclass(frozen=True)
class Part:
    """One command. ``seconds`` is its limit; ``timing`` says that it must wait for correct kernels."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    timing: bool = True
    program: tuple[str, ...] = ()
    """What is run in place of massl-fast."""


@dataclass
class Outcome:
    part: Part
    status: str  # done, failed, too long, left out
    seconds: float = 0.0
    words: str = ""


# Seconds, name, arguments: most telling first, because time may run out. OUT, IMAGES and FOLDER are filled in; what begins with an
# option is bench_step.py's.
ON_A_GPU = """
90  | correctness | bench correctness OUT
150 | kernels | bench kernels --entries 65536 131072 --images 64 512 OUT
45  | step, ViT-S, 64 images | bench step VIT --train.global_batch 64 --seconds 6 OUT
75  | memory, ViT-S, 64 images | profile memory VIT --train.global_batch 64 OUT
150 | step beside the published way | --batch 64 --sides published massl-fast 'massl-fast compiled' 'massl-fast graphed' \
 'one-kernel update' 'bf16 residual' 'bf16 residual graphed' BESIDE
70  | the same with 256 images | --batch 256 --sides published 'bf16 residual graphed' BESIDE
60  | step against the memory's length | --batch 512 --sides massl-fast --memory-size 65536 1048576 BESIDE
75  | step, ViT-S, 256 images, compiled | bench step VIT --train.global_batch 256 --model.compile true --seconds 6 OUT
45  | trace, ViT-S | profile trace VIT --train.global_batch 64 --to FOLDER
45  | memory, ViT-S, 128 images | profile memory VIT --train.global_batch 128 --no-largest OUT
45  | memory, ViT-B, 64 images | profile memory --recipe vit_base_in1k --train.global_batch 64 --no-largest OUT
45  | memory, ViT-B, 128 images | profile memory --recipe vit_base_in1k --train.global_batch 128 --no-largest OUT
45  | memory, ResNet-50, 64 images | profile memory --recipe resnet50_in1k --train.global_batch 64 --no-largest OUT
45  | memory, ResNet-50, 128 images | profile memory --recipe resnet50_in1k --train.global_batch 128 --no-largest OUT
90  | largest batch | bench step VIT --search-batch OUT
60  | loader and model | bench train VIT --train.global_batch 64 --seconds 5 --data.train IMAGES OUT
60  | loaders | bench loader --loaders torchvision dali --seconds 4 OUT
"""
# The same in small, to see that everything runs and what a CPU does.
ON_A_CPU = """
180 | correctness | bench correctness --quick --device cpu OUT
180 | kernels | bench kernels --quick --rounds 9 --device cpu OUT
60  | step, demo | bench step TINY --seconds 5 OUT
90  | step, small ViT | bench step --recipe cifar10 TINY --seconds 5 OUT
90  | memory, small ViT | profile memory --recipe cifar10 TINY --no-largest OUT
60  | memory, demo | profile memory TINY --no-largest OUT
90  | trace, small ViT | profile trace --recipe cifar10 TINY --to FOLDER
60  | rate against the batch | bench step --search-batch --max-batch 32 --train.device cpu OUT
60  | loader and model | bench train TINY --seconds 4 --data.train IMAGES OUT
60  | loaders | bench loader --loaders LOADERS --seconds 3 --batch 16 OUT
"""


def parts(on_gpu: bool, folder: Path, images: str) -> list[Part]:
    """What is run on a GPU, or on a CPU."""
    out = ["--output", str(folder / "records.jsonl")]
    words = {
        "OUT": out,
        "VIT": ["--recipe", "vit_small_in1k"],
        "TINY": ["--train.global_batch", "16", "--train.device", "cpu"],
        "BESIDE": ["--cases", "vit_small", "--rounds", "11", *out],
        "LOADERS": ["torchvision", *(["dali"] if importable("nvidia.dali") else [])],
        "IMAGES": [images],
        "FOLDER": [str(folder)],
    }
    found = []
    for line in (ON_A_GPU if on_gpu else ON_A_CPU).replace("\\\n", "").strip().splitlines():
        seconds, name, command = (cell.strip() for cell in line.split("|"))
        arguments = tuple(filled for word in shlex.split(command) for filled in words.get(word, [word]))
        program = (str(PUBLISHED),) if command.startswith("-") else ()
        found.append(Part(name, arguments, float(seconds), name != "correctness", program))
    return found


def run_parts(parts: list[Part], folder: Path, deadline: float, keep_going: bool, on_gpu: bool) -> list[Outcome]:
    outcomes: list[Outcome] = []
    correct = True
    for part in parts:
        left = deadline - time.monotonic()
        if left < SHORTEST:
            outcome = Outcome(part, "left out", words="the time for all parts is used up; --minutes gives more")
        elif part.timing and not correct and not keep_going:
            outcome = Outcome(part, "left out", words="the kernels are wrong (--keep-going measures all the same)")
        else:
            outcome = run_part(part, folder, min(part.seconds, left), on_gpu)
        if not part.timing:
            correct = outcome.status == "done"
        outcomes.append(outcome)
        print(line_of(outcome), flush=True)
    return outcomes


def run_part(part: Part, folder: Path, limit: float, on_gpu: bool) -> Outcome:
    """Run a part in a process group of its own, so that its workers end with it, and keep what it says."""
    if part.program and not Path(part.program[0]).is_file():
        return Outcome(part, "left out", words=f"{part.program[0]} is not here: it comes with the repository alone")
    environment = dict(os.environ)
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # Threads that wait for each other by spinning take the cores from those that compute, where other programs run, too.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    command = [sys.executable, *(part.program or launcher()), *part.arguments]
    start = time.monotonic()
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n=== {part.name}: {' '.join(part.arguments)}\n")
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - start
    if code is None:
        return Outcome(part, "too long", seconds, f"ended after {limit:.0f} s")
    if code:
        said = (folder / "log.txt").read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
        return Outcome(part, "failed", seconds, said[-1][:160] if said else f"exit code {code}")
    return Outcome(part, "done", seconds)


def launcher() -> list[str]:
    """How this program was started, to start it again."""
    return [sys.argv[0]] if Path(sys.argv[0]).name in LAUNCHERS else ["-m", "massl_fast"]


def line_of(outcome: Outcome) -> str:
    return f"{outcome.part.name:<34}{outcome.status:<10}{outcome.seconds:>6.0f} s  {outcome.words}".rstrip()


# The figures that one looks for first, by kind of record.
HEADLINES = {
    "kernels": ("time", "time ratio", "error", "share of the matrix rate"),
    "step": ("images_per_second", "utilization_of_measured_rate", "model_flops_utilization"),
    "memory": ("measured_peak", "estimate_error"),
    "batch search": ("best_images_per_second",),
    "train": ("loader_images_per_second", "model_images_per_second", "together_images_per_second", "data_wait"),
    "loader": ("images_per_second", "images_per_core_second"),
    "trace": ("device_idle", "waits_per_step"),
}


def headlines(rows: list[dict[str, Any]]) -> list[str]:
    """A line per case, from its latest record."""
    lines = []
    for row in latest(rows):
        names = HEADLINES.get(row["kind"], [name for name in row["figures"] if name.endswith("step_seconds")])
        found = [(name, row["figures"][name]) for name in names if name in row["figures"]]
        told = ", ".join(f"{name.replace('_', ' ')} {median(figure['samples']):.4g} {figure['unit']}" for name, figure in found)
        if row["kind"] != "correctness" and told:
            lines.append(f"{records.name_of_case(row)}: {told}")
    return lines
