"""A whole training step of massl-fast beside the published way of taking it, and beside itself with one thing taken back or added.

    python bench/bench_step.py                                    small ViTs on the CPU
    python bench/bench_step.py --cases vit_small --batch 64 512   ViT-S/16 on a GPU
    python bench/bench_step.py --cases vit_small --largest        the largest batch that fits, of each side
    python bench/bench_step.py --cases vit_mini --ablation        what each part of the design is worth
    pytest bench/bench_step.py --benchmark-enable                 the smallest case, under pytest-benchmark

Crops are synthetic and lie on the device. All sides of a case run in one process, a step of each in turn, so that what else the machine
does meets all of them; the figure is the median over the rounds, the ratio the median of each round's ratio. On a CPU, images per second of
processor time stand beside it, which other work on the machine hardly changes (set OMP_WAIT_POLICY=passive, or waiting counts).

Peak memory is that of one side alone, from its construction through its first steps: allocated bytes on a GPU, bytes of the CPU allocator
on a CPU (scratch memory of matrix libraries not included).
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

from massl_fast.benchmarks import records
from massl_fast.config import OptimizerSection
from massl_fast.distributed.world import World
from massl_fast.engine import graphed_step
from massl_fast.engine.flops import step_flops
from massl_fast.engine.graphed_step import GraphedStep
from massl_fast.engine.optimizer import build_optimizer
from massl_fast.engine.schedules import StepSettings
from massl_fast.engine.step import TrainStep
from massl_fast.hardware import peak_flops
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import choose_precision
from massl_fast.objectives.massl import MasslObjective
from massl_fast.profiling.out_of_memory import is_out_of_memory

sys.path.insert(0, str(Path(__file__).parent))
from published_step import PublishedStep, published_encoder

SETTINGS = StepSettings(learning_rate=1e-4, weight_decay=0.1, teacher_momentum=0.996, own={"teacher_temperature": 0.05})


@dataclass(frozen=True)
class Options:
    """How massl-fast takes its step; the defaults are the trainer's."""

    crops_pass: str = "auto"
    backend: str = "auto"
    optimizer: str = "adamw"
    recompute: str = "nothing"
    residual: str = "fp32"
    compiled: bool = False
    graphed: bool = False


OPTIONS = {
    "massl-fast": Options(),
    "massl-fast compiled": Options(compiled=True),
    "massl-fast graphed": Options(compiled=True, graphed=True, optimizer="adamw_with_teacher"),
    "one pass a crop size": Options(crops_pass="separate"),
    "loss from logits": Options(backend="reference"),
    "one-kernel update": Options(optimizer="adamw_with_teacher"),
    "recompute pointwise": Options(recompute="pointwise"),
    "recompute blocks": Options(recompute="blocks"),
    "bf16 residual": Options(residual="bf16"),
    "bf16 residual graphed": Options(residual="bf16", graphed=True, optimizer="adamw_with_teacher"),
}
SIDES = ("published", *OPTIONS)
GPU_ALONE = tuple(side for side, options in OPTIONS.items() if options.graphed)
ABLATION = (
    "massl-fast",
    "one pass a crop size",
    "loss from logits",
    "one-kernel update",
    "recompute pointwise",
    "recompute blocks",
    "bf16 residual",
)


@dataclass(frozen=True)
class Case:
    """What a step is taken of. The memory is the paper's."""

    name: str
    architecture: str
    model_args: dict
    global_size: int
    local_size: int
    batch: int
    memory_size: int = 65536
    block_size: int = 16384
    num_local: int = 10
    drop_path: float = 0.1

    @property
    def sizes(self) -> list[int]:
        return [self.global_size] * MasslObjective.teacher_views + [self.local_size] * self.num_local


CASES = {
    case.name: case
    for case in (
        Case("vit_mini", "vit_tiny_patch16_224", dict(patch_size=8, depth=4), 64, 32, batch=16),
        Case("vit_tiny", "vit_tiny_patch16_224", {}, 224, 96, batch=8),
        Case("vit_small", "vit_small_patch16_224", {}, 224, 96, batch=64),
        Case("vit_base", "vit_base_patch16_224", {}, 224, 96, batch=64),
    )
}


def build(case: Case, side: str, device: torch.device, precision: str = "auto") -> Callable[[int], None]:
    """A function that takes step number n on synthetic crops."""
    world, chosen = World(0, 1, 0, device), choose_precision(precision, device)
    torch.manual_seed(0)

    def parts(drop_path: float):
        backbone = build_backbone(
            case.architecture,
            image_size=case.global_size,
            other_sizes=[case.local_size],
            drop_path=drop_path,
            model_args=case.model_args,
        )
        return backbone, ProjectionHead(backbone.feature_dim)

    crops = [torch.randn(case.batch, 3, size, size, device=device) for size in case.sizes]
    if side == "published":
        student, teacher = (published_encoder(*parts(rate)).to(device) for rate in (case.drop_path, 0.0))
        memory = torch.nn.functional.normalize(torch.randn(case.memory_size, 256, device=device))
        step = PublishedStep(
            student.train(), teacher, memory, block_size=case.block_size, student_temperature=0.1, clip=3.0, precision=chosen
        )
        return lambda number: step(crops, SETTINGS, number)
    crops = [crop.contiguous(memory_format=torch.channels_last) for crop in crops]
    options = OPTIONS[side]
    common = {"crops_pass": options.crops_pass, "residual": options.residual}
    student = Encoder(*parts(case.drop_path), recompute=options.recompute, **common)
    pair = StudentTeacher(student, Encoder(*parts(0.0), **common)).to(device, memory_format=torch.channels_last)
    if options.compiled:
        pair.compile_blocks()
    objective = MasslObjective(
        case.memory_size,
        256,
        block_size=case.block_size,
        student_temperature=0.1,
        memory_dtype=chosen.dtype,
        backend=options.backend,
    ).to(device)
    step = TrainStep(
        pair,
        objective,
        build_optimizer(pair.student, OptimizerSection(name=options.optimizer)),
        world=world,
        precision=chosen,
        clip=3.0,
        clip_mode="parameter",
    )
    take = GraphedStep(step) if options.graphed else step
    return lambda number: take([crops], SETTINGS, number)


def warm_up_steps(side: str) -> int:
    """Steps after which a side takes every further one in the same way, and with the same memory."""
    return graphed_step.WARM_UP + 2 if side in OPTIONS and OPTIONS[side].graphed else 2


def seconds_of(step: Callable[[int], None], number: int, device: torch.device) -> tuple[float, float]:
    """Wall time of one step, the device's work included, and this process's processor time over all threads."""
    _wait(device)
    start, processor_start = time.perf_counter(), time.process_time()
    step(number)
    _wait(device)
    return time.perf_counter() - start, time.process_time() - processor_start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_sides(case: Case, sides: list[str], device: torch.device, precision: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of each round of each side, after steps of warm-up."""
    torch.compiler.reset()  # Dynamo keeps eight graphs of a function; the sides of a case share theirs
    steps = {side: build(case, side, device, precision) for side in sides}
    for side, step in steps.items():
        for number in range(warm_up_steps(side)):
            seconds_of(step, number, device)
    gc.collect()
    gc.disable()
    try:
        seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for number in range(graphed_step.WARM_UP + 2, graphed_step.WARM_UP + 2 + rounds):
            for side, step in steps.items():
                seconds[side].append(seconds_of(step, number, device))
    finally:
        gc.enable()
    return seconds


def peak_bytes(case: Case, side: str, device: torch.device, precision: str = "auto") -> int:
    """Most bytes allocated at a time by one side alone: weights, optimizer, memory, crops and its first steps."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step = build(case, side, device, precision)
        for number in range(warm_up_steps(side)):
            step(number)
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step = build(case, side, device, precision)
        for number in range(warm_up_steps(side)):
            step(number)
    changes = [(event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for _, change in sorted(changes):
        total += change
        most = max(most, total)
    return most


def largest_batch(case: Case, side: str, device: torch.device, precision: str = "auto") -> int:
    """The largest multiple of 8 whose first steps fit the GPU."""

    def fits(eights: int) -> bool:
        # K a multiple of the batch is the published code's own demand; its memory is widened by less than a batch for it.
        batch = 8 * eights
        try:
            peak_bytes(replace(case, batch=batch, memory_size=-(-case.memory_size // batch) * batch), side, device, precision)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 8 * low


def compare(case: Case, sides: list[str], device: torch.device, precision: str, rounds: int) -> dict:
    """All figures of a case as one record."""
    load = os.getloadavg()[0]
    seconds = time_sides(case, sides, device, precision, rounds)
    gc.collect()
    backbone = build_backbone(case.architecture, image_size=case.global_size, model_args=case.model_args)
    encoder = Encoder(backbone, ProjectionHead(backbone.feature_dim))
    objective = MasslObjective(case.memory_size, 256, block_size=case.block_size, student_temperature=0.1)
    flops = step_flops(StudentTeacher(encoder, copy.deepcopy(encoder)), objective, crop_sizes=case.sizes, batch=case.batch)
    results = {}
    for side in sides:
        (times, processor), (first, first_processor) = zip(*seconds[side]), zip(*seconds[sides[0]])
        median = statistics.median(times)
        results[side] = {
            "images_per_second": round(case.batch / median, 2),
            "step_seconds": [round(value, 5) for value in times],
            "step_seconds_median": round(median, 5),
            "step_seconds_quartiles": [round(q, 5) for q in statistics.quantiles(times, n=4)[::2]],
            "times_the_first_side": round(statistics.median(theirs / ours for theirs, ours in zip(first, times)), 3),
            "peak_mib": round(peak_bytes(case, side, device, precision) / 2**20, 1),
            "tflops_per_second": round(flops / median / 1e12, 3),
        }
        if device.type == "cpu":
            ratio = statistics.median(theirs / ours for theirs, ours in zip(first_processor, processor))
            results[side]["images_per_processor_second"] = round(case.batch / statistics.median(processor), 2)
            results[side]["times_the_first_side_by_processor_time"] = round(ratio, 3)
        elif peak := peak_flops(torch.cuda.get_device_name(device), choose_precision(precision, device).dtype):
            results[side]["model_flops_utilization_percent"] = round(100 * flops / median / peak, 1)
    return {
        "case": asdict(case),
        "precision": choose_precision(precision, device).name,
        "gflop_per_image": round(flops / case.batch / 1e9, 2),
        "rounds": rounds,
        "sides": results,
        "load_average_before": round(load, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
    }


def as_record(found: dict) -> dict:
    """What was found for a case in the common form of records, all of it as details."""
    case = {name: value for name, value in found["case"].items() if name != "model_args"} | {"precision": found["precision"]}
    if "largest_batch" in found:
        figures = {
            f"{side}: largest batch": records.figure(size, "images", "higher", exact=True) for side, size in found["largest_batch"].items()
        }
        return records.record("largest batches", case, figures, found)
    figures = {}
    for side, result in found["sides"].items():
        figures[f"{side}: step_seconds"] = records.figure(result["step_seconds"], "s", "lower")
        figures[f"{side}: times the first"] = records.figure(result["times_the_first_side"], "×")
        figures[f"{side}: peak_memory"] = records.figure(result["peak_mib"], "MiB", "lower", exact=True)
    if "published" in found["sides"]:
        return records.record("published step", case, figures, found)
    return records.record("ablation", case | {"sides": ", ".join(found["sides"])}, figures, found)


def table(record: dict) -> str:
    lines = [
        f"{record['case']['name']}, batch {record['case']['batch']}, {record['precision']}, {record['gflop_per_image']} GFLOP an image"
    ]
    for side, result in record["sides"].items():
        line = (
            f"  {side:<22}{result['images_per_second']:>10.2f} images/s  ×{result['times_the_first_side']:<6.2f}"
            f"{result['peak_mib']:>10.0f} MiB  {result['tflops_per_second']:>8.3f} TFLOP/s"
        )
        if "images_per_processor_second" in result:
            line += (
                f"  {result['images_per_processor_second']:>10.2f} images per processor second  "
                f"×{result['times_the_first_side_by_processor_time']:.2f}"
            )
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["vit_mini", "vit_tiny"])
    parser.add_argument("--batch", nargs="+", type=int, default=[], help="batches in place of the case's own")
    parser.add_argument("--memory-size", nargs="+", type=int, default=[], help="memories in place of the case's own")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:2]), help="the first is what the others are compared with")
    parser.add_argument("--ablation", action="store_true", help=f"these sides: {', '.join(ABLATION)}; the last with --precision bf16")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--largest", action="store_true", help="find the largest batch that fits the GPU instead of timing")
    parser.add_argument("--output", default="", help="file to which a record a case is appended (default: none)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.ablation:
        args.sides = [
            side for side in ABLATION if OPTIONS[side].residual == "fp32" or choose_precision(args.precision, device).name == "bf16"
        ]
    precision = choose_precision(args.precision, device)
    if narrow := [side for side in args.sides if side in OPTIONS and OPTIONS[side].residual == "bf16" and precision.name != "bf16"]:
        parser.error(f"{narrow[0]} is a step in bf16; this one is in {precision.name} ({precision.reason})")
    if device.type == "cpu" and (absent := [side for side in args.sides if side in GPU_ALONE]):
        parser.error(f"{absent[0]} needs a GPU, and there is none here")
    if args.largest and device.type == "cpu":
        parser.error("--largest fills a GPU's memory, and there is none here")
    for case in [CASES[name] for name in args.cases]:
        for batch in args.batch or [case.batch]:
            for memory_size in args.memory_size or [case.memory_size]:
                chosen = replace(case, batch=batch, memory_size=memory_size)
                if args.largest:
                    record = {
                        "case": asdict(chosen),
                        "precision": choose_precision(args.precision, device).name,
                        "largest_batch": {s: largest_batch(chosen, s, device, args.precision) for s in args.sides},
                    }
                    print(case.name, record["largest_batch"], flush=True)
                else:
                    record = compare(chosen, args.sides, device, args.precision, args.rounds)
                    print(table(record), flush=True)
                if args.output:
                    records.append(args.output, [as_record(record | {"threads": torch.get_num_threads()})])


@pytest.mark.parametrize("side", SIDES)
def test_step(benchmark, side):
    """One step of the smallest case; interleaved comparisons are the script's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if side in GPU_ALONE and device.type == "cpu":
        pytest.skip(f"{side} needs a GPU")
    step = build(CASES["vit_mini"], side, device)
    for number in range(warm_up_steps(side)):
        step(number)
    benchmark.extra_info["images_per_step"] = CASES["vit_mini"].batch
    benchmark.pedantic(lambda: seconds_of(step, 1, device), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
