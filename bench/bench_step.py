"""A whole training step of massl-fast beside the published way of taking it, and beside itself with one thing taken back or added.

    python bench/bench_step.py                                    small ViTs on the CPU
    python bench/bench_step.py --cases vit_small --batch 64 512   ViT-S/16 on a GPU
    python bench/bench_step.py --cases vit_small --largest        the largest batch that fits, of each side
    python bench/bench_step.py --cases vit_mini --ablation        what each part of the design is worth
    python bench/bench_step.py --one-by-one                       each side beside the first alone, and recorded as soon as it is known
    python bench/bench_step.py --cases vit_mini --objectives dino ibot carp moco_v3 mmc    the other objectives' steps
    pytest bench/bench_step.py --benchmark-enable                 the smallest case, under pytest-benchmark

Crops are synthetic and lie on the device. All sides of a case run in one process, a step of each in turn, so that what else the machine
does meets all of them; the figure is the median over the rounds, the ratio the median of each round's ratio. On a CPU, images per second of
processor time stand beside it, which other work on the machine hardly changes (set OMP_WAIT_POLICY=passive, or waiting counts).

Peak memory is what a side allocates from its construction through its first steps, beyond the sides built before (on a CPU without the
scratch memory of matrix libraries).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from massl_fast import records
from massl_fast.benchmarks.step import WARM_UP, largest_that_fits
from massl_fast.benchmarks.timing import in_turn, timed
from massl_fast.config import Config, load_config
from massl_fast.distributed.world import World
from massl_fast.engine.build import build_objective, build_pair
from massl_fast.engine.schedules import StepSettings
from massl_fast.hardware import keep_freed_memory
from massl_fast.length import Length
from massl_fast.models.precision import choose_precision
from massl_fast.objectives.base import At, Objective, patch_side
from massl_fast.profiling.estimate import counted
from massl_fast.profiling.out_of_memory import is_out_of_memory
from massl_fast.profiling.profiler import peak_bytes
from massl_fast.profiling.synthetic import synthetic_run

sys.path.insert(0, str(Path(__file__).parent))
from published_step import STEPS, Drawn, published_encoder

OWN = {"teacher_temperature": 0.05, "patch_teacher_temperature": 0.05, "masking": 1.0}
SETTINGS = StepSettings(learning_rate=1e-4, weight_decay=0.1, teacher_momentum=0.996, own=OWN)
ANY_LENGTH = Length(total_steps=10, steps_per_epoch=1, global_batch=1, accumulation=1, micro_batch=1)
ONE_KERNEL = {"optimizer.name": "adamw_with_teacher"}
GRAPHED = {"train.cuda_graph": "true", **ONE_KERNEL}
OURS: dict[str, dict[str, str]] = {
    "massl-fast": {},
    "massl-fast compiled": {"model.compile": "true"},
    "massl-fast graphed": {"model.compile": "true", **GRAPHED},
    "one pass a crop size": {"model.crops_pass": "separate"},
    "loss from logits": {"objective.backend": "reference"},
    "one-kernel update": ONE_KERNEL,
    "products by BLAS": {"train.cpu_products": "blas"},
    "recompute pointwise": {"model.recompute": "pointwise"},
    "recompute blocks": {"model.recompute": "blocks"},
    "bf16 residual": {"model.residual": "bf16"},
    "bf16 residual graphed": {"model.residual": "bf16", **GRAPHED},
}
"""How massl-fast takes its step: settings that differ from the trainer's defaults."""
SIDES = ("published", *OURS)
WITHOUT_LOCAL = ("moco_v3", "mmc")
CARP_BLOCK = 512  # of its published command; the recipe that cases start from has MaSSL's blocks
GPU_ALONE = tuple(side for side, settings in OURS.items() if "train.cuda_graph" in settings)
ABLATION = tuple(side for side in OURS if side not in (*GPU_ALONE, "massl-fast compiled"))


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
    objective: str = "massl"

    def config(self, precision: str, changes: dict[str, str]) -> Config:
        """The settings of a run that takes this step."""
        settings = {
            "model.architecture": self.architecture,
            "model.model_args": yaml.safe_dump(self.model_args, default_flow_style=True).strip(),
            "model.drop_path": self.drop_path,
            "crops.global_size": self.global_size,
            "crops.local_size": self.local_size,
            "crops.num_local": self.num_local,
            "objective.name": self.objective,
            **({"objective.memory_size": self.memory_size, "objective.block_size": self.block_size} if self.objective == "massl" else {}),
            **({"objective.block_size": CARP_BLOCK} if self.objective == "carp" else {}),
            "train.global_batch": self.batch,
            "train.precision": precision,
        }
        return load_config("vit_small_in1k", [word for key, value in (settings | changes).items() for word in (f"--{key}", str(value))])


CASES = {
    case.name: case
    for case in (
        Case("vit_mini", "vit_tiny_patch16_224", dict(patch_size=8, depth=4), 64, 32, batch=16),
        Case("vit_tiny", "vit_tiny_patch16_224", {}, 224, 96, batch=8),
        Case("vit_small", "vit_small_patch16_224", {}, 224, 96, batch=64),
        Case("vit_base", "vit_base_patch16_224", {}, 224, 96, batch=64),
    )
}


def build(case: Case, side: str, device: torch.device, precision: str) -> Callable[[], Any]:
    """A function that takes the next step on synthetic crops."""
    config, world, chosen = case.config(precision, OURS.get(side, {})), World(0, 1, 0, device), choose_precision(precision, device)
    if side != "published":
        return synthetic_run(config, world, chosen, device_batch=case.batch, crop_sets=1).step
    objective = build_objective(config, chosen, rank=0)
    pair, _ = build_pair(config, objective)
    student, teacher = (published_encoder(one.backbone, one.head).to(device) for one in (pair.student, pair.teacher))
    sizes = [case.global_size] * objective.teacher_views + [case.local_size] * case.num_local
    crops = [torch.randn(case.batch, 3, size, size, device=device) for size in sizes]
    student.backbone.patch_embed.requires_grad_("backbone.patch_embed." not in objective.frozen(0, ANY_LENGTH))
    memory = {"memory": objective.memory.float().to(device)} if case.objective == "massl" else {}
    drawn = what_is_drawn(config, objective.to(device), crops, world)
    step = STEPS[case.objective](student.train(), teacher, config.objective, drawn, clip=3.0, precision=chosen, **memory)
    numbers = itertools.count()
    return lambda: step(crops, SETTINGS, next(numbers))


def what_is_drawn(config: Config, objective: Objective, crops: list[torch.Tensor], world: World) -> Callable[[int], Drawn]:
    """MaSSL's partition is drawn anew each step, as published; of others once what a loader would bring: masks, corrupted crops."""
    settings = config.objective
    if settings.name == "massl":
        weights = torch.ones(settings.memory_size)
        return lambda step: Drawn(partition=torch.multinomial(weights, len(weights)).to(world.device))
    if settings.name == "carp":
        once = Drawn(partition=torch.randperm(settings.prototypes, device=world.device))
    else:
        at = At(0, SETTINGS.own, len(crops[0]), 0, (), world, patch_side(config))
        inputs = objective.student_inputs(crops, at)
        hidden = inputs.masks and inputs.masks.extra.get("corrupted", inputs.masks.hidden)
        once = Drawn(mask=hidden, corrupted=list(inputs.crops))
    return lambda step: once


def time_sides(
    case: Case, sides: list[str], device: torch.device, precision: str, rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, int]]:
    """(wall, processor) seconds of each round of each side, after steps of warm-up, and what each allocated at most till then."""
    torch.compiler.reset()  # Dynamo keeps eight graphs of a function; the sides of a case share theirs
    steps: dict[str, Callable[[], Any]] = {}
    peaks = {side: peak_of_first_steps(case, side, device, precision, steps) for side in sides}
    gc.collect()
    return in_turn(steps, rounds, device), peaks


def peak_of_first_steps(case: Case, side: str, device: torch.device, precision: str, steps: dict[str, Callable[[], Any]]) -> int:
    """Build a side and take its steps of warm-up; ``steps`` keeps what takes the further ones. Most bytes allocated at a time: weights,
    optimizer, memory, crops and these steps."""

    def begin() -> None:
        steps[side] = step = build(case, side, device, precision)
        for _ in range(WARM_UP + 1 if side in GPU_ALONE else 2):
            step()

    gc.collect()
    return peak_bytes(begin, device)


def largest_batch(case: Case, side: str, device: torch.device, precision: str) -> int:
    """The largest multiple of 8 whose first steps fit the GPU."""

    def fits(batch: int) -> bool:
        torch.compiler.reset()
        # K a multiple of the batch is the published code's own demand; its memory is widened by less than a batch for it.
        try:
            of_batch = replace(case, batch=batch, memory_size=-(-case.memory_size // batch) * batch)
            peak_of_first_steps(of_batch, side, device, precision, {})
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    return largest_that_fits(fits, most=2**31)[0]


def compare(case: Case, sides: list[str], device: torch.device, precision: str, rounds: int) -> dict:
    """All figures of a case as one record."""
    seconds, peaks = time_sides(case, sides, device, precision, rounds)
    flops = case.batch * counted(case.config(precision, {}))[1]
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
            "peak_mib": round(peaks[side] / 2**20, 1),
            "tflops_per_second": round(flops / median / 1e12, 3),
        }
        if device.type == "cpu":
            ratio = statistics.median(theirs / ours for theirs, ours in zip(first_processor, processor))
            results[side]["images_per_processor_second"] = round(case.batch / statistics.median(processor), 2)
            results[side]["times_the_first_side_by_processor_time"] = round(ratio, 3)
    about = {"precision": choose_precision(precision, device).name, "gflop_per_image": round(flops / case.batch / 1e9, 2)}
    return {"case": asdict(case), **about, "threads": torch.get_num_threads(), "rounds": rounds, "sides": results}


def as_record(found: dict) -> dict:
    """What was found for a case in the common form of records, all of it as details."""
    case = {name: value for name, value in found["case"].items() if name != "model_args"} | {"precision": found["precision"]}
    if case.get("objective") == "massl":  # records of the first objective have no name of one
        del case["objective"]
    figures = {}
    for side, size in found.get("largest_batch", {}).items():
        figures[f"{side}: largest batch"] = records.figure(size, "images", "higher", exact=True)
    for side, result in found.get("sides", {}).items():
        figures[f"{side}: step_seconds"] = records.figure(result["step_seconds"], "s", "lower")
        figures[f"{side}: times the first"] = records.figure(result["times_the_first_side"], "×")
        figures[f"{side}: peak_memory"] = records.figure(result["peak_mib"], "MiB", "lower", exact=True)
    if "largest_batch" in found:
        return records.record("largest batches", case, figures, found)
    if "published" in found["sides"]:
        return records.record("published step", case, figures, found)
    return records.record("ablation", case | {"sides": ", ".join(found["sides"])}, figures, found)


def table(record: dict) -> str:
    lines = [
        f"{record['case']['name']}, {record['case']['objective']}, batch {record['case']['batch']}, {record['precision']}, "
        f"{record['gflop_per_image']} GFLOP per image"
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


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["vit_mini", "vit_tiny"])
    parser.add_argument("--batch", nargs="+", type=int, default=[], help="batches in place of the case's own")
    parser.add_argument("--objectives", nargs="+", choices=[*STEPS], default=["massl"])
    parser.add_argument("--memory-size", nargs="+", type=int, default=[], help="memories in place of the case's own")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:2]), help="the first is what the others are compared with")
    parser.add_argument("--one-by-one", action="store_true", help="each side beside the first alone, and recorded as soon as it is known")
    parser.add_argument("--ablation", action="store_true", help=f"these sides: {', '.join(ABLATION)}; the last with --precision bf16")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--largest", action="store_true", help="find the largest batch that fits the GPU instead of timing")
    parser.add_argument("--output", default="", help="file to which a record per case is appended (default: none, nowhere)")
    return parser


def compare_one_by_one(
    case: Case, sides: list[str], device: torch.device, precision: str, rounds: int, keep: Callable[[dict], None]
) -> dict[str, str]:
    """Give ``keep`` what is known of the case after each side, the first one's times being those beside the last; why sides failed."""
    known: dict[str, Any] = {}
    failed = {}
    for group in [[sides[0], side] for side in sides[1:]] or [sides]:
        try:
            found = compare(case, group, device, precision, rounds)
        except Exception as error:  # a side that cannot be taken here, for whatever reason, is to cost no other one its time
            failed[group[-1]] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{group[-1]} failed: {failed[group[-1]]}", flush=True)
            continue
        known |= found["sides"]
        keep(found | {"sides": known, "one_by_one": True})
    return failed


def main() -> int:
    args = parser().parse_args()
    refuse = parser().error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(args.precision, device)
    if device.type == "cpu":
        keep_freed_memory()  # as every run there
    needs_bf16 = [side for side in OURS if "model.residual" in OURS[side]]
    if args.ablation:
        args.sides = [side for side in ABLATION if side not in needs_bf16 or precision.name == "bf16"]
    if narrow := [side for side in args.sides if side in needs_bf16 and precision.name != "bf16"]:
        refuse(f"{narrow[0]} is a step in bf16; this one is in {precision.name} ({precision.reason})")
    if device.type == "cpu" and (absent := [side for side in args.sides if side in GPU_ALONE]):
        refuse(f"{absent[0]} needs a GPU, and there is none here")

    if args.largest and device.type == "cpu":
        refuse("--largest fills a GPU's memory, and there is none here")

    def keep(found: dict) -> None:
        print(table(found) if "sides" in found else f"{found['case']['name']} {found['largest_batch']}", flush=True)
        if args.output not in ("", "none"):
            records.append(args.output, [as_record(found)])

    failed: dict[str, str] = {}
    for case in [CASES[name] for name in args.cases]:
        choices = (args.objectives, args.batch or [case.batch], args.memory_size or [case.memory_size])
        for objective, batch, memory_size in itertools.product(*choices):
            num_local = 0 if objective in WITHOUT_LOCAL else case.num_local
            chosen = replace(case, objective=objective, batch=batch, memory_size=memory_size, num_local=num_local)
            if args.largest:
                sizes = {side: largest_batch(chosen, side, device, args.precision) for side in args.sides}
                keep({"case": asdict(chosen), "precision": precision.name, "largest_batch": sizes})
            elif args.one_by_one:
                failed |= compare_one_by_one(chosen, args.sides, device, args.precision, args.rounds, keep)
            else:
                keep(compare(chosen, args.sides, device, args.precision, args.rounds))
    return int(bool(failed))


@pytest.mark.parametrize("side", SIDES)
def test_step(benchmark, side):
    """One step of the smallest case; interleaved comparisons are the script's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if side in GPU_ALONE and device.type == "cpu":
        pytest.skip(f"{side} needs a GPU")
    if "model.residual" in OURS.get(side, {}) and choose_precision("auto", device).name != "bf16":
        pytest.skip(f"{side} is a step in bf16")
    steps: dict[str, Callable[[], Any]] = {}
    benchmark.extra_info["peak_bytes"] = peak_of_first_steps(CASES["vit_mini"], side, device, "auto", steps)
    benchmark.extra_info["images_per_step"] = CASES["vit_mini"].batch
    benchmark.pedantic(lambda: timed(steps[side], device), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
