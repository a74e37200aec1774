"""``massl-fast bench everything``: correctness first, then every benchmark and profile, each in a process of its own with a time limit.

What one part loses, by an error or by its limit, is lost to that part alone; records come into the folder as they are made, the output of
all parts into ``log.txt``, and at the end a page and a short table. Kernels that are wrong are not timed, nor is anything that uses them,
unless ``--keep-going`` asks for it. On a CPU the shapes are small and what needs a GPU is named as left out.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from massl_fast.benchmarks import records
from massl_fast.benchmarks.chapters import latest
from massl_fast.benchmarks.loader import importable, write_images
from massl_fast.benchmarks.page import page_of
from massl_fast.hardware import ROOT, device_slug

PUBLISHED = ROOT / "bench" / "bench_step.py"
LAUNCHERS = ("massl-fast", "massl_fast_here.py")
GPU_ALONE = ("triton kernels", "largest batch", "gaps of the device", "decoding on the GPU")
SHORTEST = 10.0  # seconds that a part must still have to be started
PAGE_SECONDS = 15.0  # kept for the page and the table


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", default="", help="folder for records, log and page (default: bench/results/DEVICE)")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for all parts together (default: 7.5)")
    parser.add_argument("--parts", nargs="+", default=[], help="words of the names of parts to run, correctness always (default: all)")
    parser.add_argument("--keep-going", action="store_true", help="time kernels even where they are wrong")
    parser.add_argument("--device", default="", choices=["", "cpu", "cuda"], help="(default: the GPU, else the CPU)")


def run(args: argparse.Namespace) -> int:
    if args.minutes <= 0:
        raise ValueError("--minutes takes more than 0.")
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not on_gpu:
        raise ValueError("--device is cuda, and torch finds no GPU here.")
    folder = Path(args.to or Path("bench", "results", device_slug() if on_gpu else "cpu"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").open("a").close()
    except OSError as error:
        raise ValueError(f"Nothing can be written to the folder {folder}: {error.strerror}. Name another with --to.") from None
    deadline = time.monotonic() + 60 * args.minutes - PAGE_SECONDS
    with tempfile.TemporaryDirectory(prefix="massl_fast_bench_") as images:
        write_images(Path(images), 256 if on_gpu else 32)
        parts = gpu_parts(folder, images) if on_gpu else cpu_parts(folder, images)
        chosen = [part for part in parts if not args.parts or not part.timing or any(word in part.name for word in args.parts)]
        outcomes = run_parts(chosen, folder, deadline, args.keep_going, on_gpu)
    if not on_gpu:
        outcomes += [Outcome(Part(name, (), 0), "left out", words="it needs a GPU") for name in GPU_ALONE]
    rows = records.read(folder) if list(folder.glob("*.jsonl")) else []
    if rows:
        (folder / "benchmarks.html").write_text(page_of(rows), encoding="utf-8")
    lines = table(outcomes, rows)
    print("\n" + "\n".join(lines))
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write("\n".join(lines) + "\n")
    print(f"Records, log and page: {folder}")
    return int(any(outcome.status in ("failed", "too long") for outcome in outcomes))


def gpu_parts(folder: Path, images: str) -> list[Part]:
    """What is run where there is a GPU: most telling first, because time may run out."""
    out = ("--output", str(folder / "records.jsonl"))
    small = ("--recipe", "vit_small_in1k")
    beside = ("--cases", "vit_small", "--rounds", "11", *out)
    ways = ("massl-fast", "massl-fast compiled", "massl-fast graphed", "one-kernel update", "bf16 residual", "bf16 residual graphed")
    return [
        Part("correctness", ("bench", "correctness", *out), 90, timing=False),
        Part("kernels", ("bench", "kernels", "--entries", "65536", "131072", "--images", "64", "512", *out), 150),
        Part("step, ViT-S, 64 images", ("bench", "step", *small, "--train.global_batch", "64", "--seconds", "6", *out), 45),
        Part("memory, ViT-S, 64 images", ("profile", "memory", *small, "--train.global_batch", "64", *out), 75),
        Part(
            "step beside the published way",
            ("--batch", "64", "--sides", "published", *ways, *beside),
            150,
            program=(str(PUBLISHED),),
        ),
        Part(
            "the same with 256 images",
            ("--batch", "256", "--sides", "published", "bf16 residual graphed", *beside),
            70,
            program=(str(PUBLISHED),),
        ),
        Part(
            "step against the memory's length",
            ("--batch", "512", "--sides", "massl-fast", "--memory-size", "65536", "1048576", *beside),
            60,
            program=(str(PUBLISHED),),
        ),
        Part(
            "step, ViT-S, 256 images, compiled",
            ("bench", "step", *small, "--train.global_batch", "256", "--model.compile", "true", "--seconds", "6", *out),
            75,
        ),
        Part("trace, ViT-S", ("profile", "trace", *small, "--train.global_batch", "64", "--to", str(folder)), 45),
        Part("memory, ViT-S, 128 images", ("profile", "memory", *small, "--train.global_batch", "128", "--no-largest", *out), 45),
        Part("memory, ViT-B, 64 images", _memory("vit_base_in1k", 64, out), 45),
        Part("memory, ViT-B, 128 images", _memory("vit_base_in1k", 128, out), 45),
        Part("memory, ResNet-50, 64 images", _memory("resnet50_in1k", 64, out), 45),
        Part("memory, ResNet-50, 128 images", _memory("resnet50_in1k", 128, out), 45),
        Part("largest batch", ("bench", "step", *small, "--search-batch", *out), 90),
        Part(
            "loader and model",
            ("bench", "train", *small, "--train.global_batch", "64", "--seconds", "5", "--data.train", images, *out),
            60,
        ),
        Part("loaders", ("bench", "loader", "--loaders", "torchvision", "dali", "--seconds", "4", *out), 60),
    ]


def _memory(recipe: str, batch: int, out: tuple[str, ...]) -> tuple[str, ...]:
    return ("profile", "memory", "--recipe", recipe, "--train.global_batch", str(batch), "--no-largest", *out)


def cpu_parts(folder: Path, images: str) -> list[Part]:
    """The same in small, to see that everything runs and what a CPU does."""
    out = ("--output", str(folder / "records.jsonl"))
    loaders = [name for name in ("torchvision", "dali") if name != "dali" or importable("nvidia.dali")]
    tiny = ("--train.global_batch", "16", "--train.device", "cpu")
    return [
        Part("correctness", ("bench", "correctness", "--quick", "--device", "cpu", *out), 180, timing=False),
        Part("kernels", ("bench", "kernels", "--quick", "--rounds", "9", "--device", "cpu", *out), 180),
        Part("step, demo", ("bench", "step", *tiny, "--seconds", "5", *out), 60),
        Part("step, small ViT", ("bench", "step", "--recipe", "cifar10", *tiny, "--seconds", "5", *out), 90),
        Part("memory, small ViT", ("profile", "memory", "--recipe", "cifar10", *tiny, "--no-largest", *out), 90),
        Part("memory, demo", ("profile", "memory", *tiny, "--no-largest", *out), 60),
        Part("trace, small ViT", ("profile", "trace", "--recipe", "cifar10", *tiny, "--to", str(folder)), 90),
        Part("rate against the batch", ("bench", "step", "--search-batch", "--max-batch", "32", "--train.device", "cpu", *out), 60),
        Part("loader and model", ("bench", "train", *tiny, "--seconds", "4", "--data.train", images, *out), 60),
        Part("loaders", ("bench", "loader", "--loaders", *loaders, "--seconds", "3", "--batch", "16", *out), 60),
    ]


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
        print(f"{part.name:<34}{outcome.status:<10}{outcome.seconds:>6.0f} s  {outcome.words}", flush=True)
    return outcomes


def run_part(part: Part, folder: Path, limit: float, on_gpu: bool) -> Outcome:
    """Run a part in a process group of its own, so that its workers end with it, and keep what it says."""
    if part.program and not Path(part.program[0]).is_file():
        return Outcome(part, "left out", words=f"{part.program[0]} is not here: it comes with the repository alone")
    program = [sys.executable, *(part.program or launcher()), *part.arguments]
    environment = dict(os.environ)
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        # Threads that wait for each other by spinning take the cores from those that compute, where other programs run, too.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    start = time.monotonic()
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n=== {part.name}: {' '.join(part.arguments)}\n")
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(program, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
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


def table(outcomes: list[Outcome], rows: list[dict[str, Any]]) -> list[str]:
    """What came of each part, then what was found, a line each."""
    lines = [f"{'part':<34}{'':<10}{'s':>6}"]
    lines += [f"{o.part.name:<34}{o.status:<10}{o.seconds:>6.0f}  {o.words}".rstrip() for o in outcomes]
    return [*lines, "", *headlines(rows)]


def headlines(rows: list[dict[str, Any]]) -> list[str]:
    """The figures that one looks for first, from the latest record of each case."""
    lines: list[str] = []
    for row in latest(rows):
        case, figures = row["case"], {name: value["median"] for name, value in row["figures"].items()}
        if row["kind"] == "kernels" and case["operation"] == "loss":
            share = f", {figures['share of the matrix rate']:.0f} % of the matrix rate" if "share of the matrix rate" in figures else ""
            lines.append(
                f"loss, N {case['N']}, K {case['K']}, {case['dtype']}, {case['variant']}: {figures['time']:.3f} ms, "
                f"{figures.get('time ratio', 1):.3f} × the first, error {figures['error']:.0e}{share}"
            )
        elif row["kind"] == "step":
            of = f"{figures['utilization_of_measured_rate']:.0f} % of the matrix rate"
            if share := figures.get("model_flops_utilization"):
                of = f"{share:.1f} % of the data sheet's rate"
            lines.append(f"step, {case['architecture']}, {case['batch']} images: {figures['images_per_second']:.1f} images/s, {of}")
        elif row["kind"] in ("published step", "ablation"):
            sides = [name.removesuffix(": times the first") for name in figures if name.endswith(": times the first")]
            rates = ", ".join(f"{side} {case['batch'] / figures[f'{side}: step_seconds']:.1f} images/s" for side in sides)
            what = "step beside the published way" if row["kind"] == "published step" else "ways of a step"
            lines.append(f"{what}, {case['architecture']}, {case['batch']} images, K {case['memory_size']}: {rates}")
        elif row["kind"] == "memory" and "measured_peak" in figures:
            lines.append(
                f"memory, {case['architecture']}, {case['batch']} images: peak {figures['measured_peak']:.0f} MiB, estimate "
                f"{figures['estimate_error']:+.1f} % off"
            )
        elif row["kind"] == "batch search":
            details = row["details"]
            largest = f", largest {details['largest']} (predicted {details['predicted']})" if "largest" in details else ""
            lines.append(f"batch, {case['architecture']}: best {details['best']}{largest}")
        elif row["kind"] == "train":
            lines.append(f"train, {case['architecture']}: {row['details']['verdict'][0]}")
        elif row["kind"] == "loader":
            lines.append(f"loader, {case['loader']}, {case['decode']}/{case['augment']}: {figures['images_per_second']:.0f} images/s")
        elif row["kind"] == "trace":
            idle = f"device idle {figures['device_idle']:.1f} %, " if "device_idle" in figures else ""
            lines.append(f"trace, {case['architecture']}: {idle}{figures['waits_per_step']:.0f} waits a step")
    return lines
