"""Does a faster way of taking a step change what is learned? ``python tests/equal_curves.py IMAGES [--steps 200] [--dtype float64]``

One seed, the same crops of real photos, and every way of taking the step beside the plain one: a pass a crop size, the loss from logits,
PyTorch's AdamW, launched from Python. Printed is how far each loss curve lies from the plain one at most, and, as the measure of what
rounding alone does over so many steps, how far the plain one lies from itself with weights changed in the last bit of a float32. Exit
code 1 where a way differs by more than ten times that. Products in bf16 are another rounding of everything; their curves may differ by 2 %.
(In float64 timm's own interpolation of position embeddings, in float32, is what
sets the plain way apart.)

Under ``torchrun --nproc-per-node 2`` two processes share the batch; the plain step is then that of DistributedDataParallel, and beside it
are those that exchange gradients as one flat buffer.

On a CPU a tape of operators stands in for the CUDA graph (tests/operator_tape.py).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from massl_fast.config import Config, load_config
from massl_fast.data.loaders import loader_without_run, open_data
from massl_fast.distributed.world import World, join_world, leave_world
from massl_fast.engine.build import build_objective, build_pair, build_step
from massl_fast.engine.graphed_step import GraphedStep
from massl_fast.engine.schedules import Schedules
from massl_fast.engine.step import StepResult
from massl_fast.length import Length
from massl_fast.models.precision import Precision
from massl_fast.models.products import multiply_by_onednn_
from massl_fast.models.varlen import one_by_one
from operator_tape import OperatorTape

RECIPE = """
data: {loader: torchvision}
crops: {global_size: 64, local_size: 32, num_local: 4}
model:
  architecture: vit_tiny_patch16_224
  model_args: {patch_size: 8, depth: 3, num_heads: 2, embed_dim: 64}
  drop_path: 0.0
  head_hidden_dim: 128
  embedding_dim: 64
objective: {memory_size: 2048, block_size: 512, student_temperature: 0.2, teacher_temperature_start: 0.02, teacher_temperature: 0.02}
teacher: {momentum: 0.98}
optimizer: {learning_rate: 1.0e-3, warmup_epochs: 0.02}
train: {global_batch: 32}
"""
PLAIN = ("--model.crops_pass", "separate", "--objective.backend", "reference")
WAYS = {
    "plain": PLAIN,
    "plain, last bit of weights changed": PLAIN,
    "packed": (),
    "packed, one-kernel update": ("--optimizer.name", "adamw_with_teacher"),
    "packed, recompute pointwise": ("--model.recompute", "pointwise"),
    "packed, attention in one call": (),
    "packed, products by oneDNN": (),
    "packed, compiled": ("--model.compile", "true"),
    "packed, compiled, recorded": ("--model.compile", "true", "--optimizer.name", "adamw_with_teacher"),
}
NARROW = {
    "packed, bf16": ("--train.precision", "bf16"),
    "packed, bf16, tokens too": ("--train.precision", "bf16", "--model.residual", "bf16"),
}
"""Ways of a step in 16 bits; beside steps in float32 only."""
OF_RANKS = {
    "plain": PLAIN,
    "plain, last bit of weights changed": PLAIN,
    "packed": (),
    "packed, one flat exchange": ("--parallel.gradients", "flat"),
    "packed, one flat exchange, recorded": ("--train.cuda_graph", "true", "--optimizer.name", "adamw_with_teacher"),
}
"""Ways of a step of several processes."""
ALLOWED_OF_NARROW = 0.02
"""Relative difference of a loss."""
ALLOWED = 10.0
"""Times the difference that a change in the last bit makes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder or tars of images")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="these alone beside the plain ones, for a run in parts")
    args = parser.parse_args()
    world = join_world()
    dtype = getattr(torch, args.dtype)
    ways = OF_RANKS if world.size > 1 else WAYS | (NARROW if dtype == torch.float32 else {})
    if unknown := set(args.ways or ()) - set(ways):
        parser.error(f"no way here is called {', '.join(unknown)}; there are {', '.join(ways)}")
    ways = {name: settings for name, settings in ways.items() if not args.ways or settings is PLAIN or name in args.ways}
    curves = curves_of(ways, args.images, args.steps, dtype, world)
    leave_world()
    if not world.is_main:
        return 0
    plain, control = curves["plain"], difference(curves["plain"], curves["plain, last bit of weights changed"])
    print(f"{args.steps} steps, {args.dtype}, {world.size} processes: plain loss {plain[0]:.4f} to {plain[-1]:.4f}")
    print(f"{'largest relative difference to plain':<40}{'of the loss':>12}{'step 10':>12}")
    for name, curve in list(curves.items())[1:]:
        print(f"  {name:<38}{difference(plain, curve):>12.1e}{difference(plain[:10], curve[:10]):>12.1e}")
    return int(
        any(difference(plain, curve) > (ALLOWED_OF_NARROW if name in NARROW else ALLOWED * control) for name, curve in curves.items())
    )


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs() / one.abs()).max().item()


def curves_of(asked: dict[str, tuple[str, ...]], images: str, steps: int, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    """Losses [steps] of each way; all see the same crops."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "equal_curves.yaml")
        recipe.write_text(RECIPE)
        configs = {name: load_config(str(recipe), ["--data.train", images, *settings]) for name, settings in asked.items()}
        config = configs["plain"]
        ways = {name: way_of(name, config, world, dtype) for name, config in configs.items()}
        losses: dict[str, list[Tensor]] = {name: [] for name in ways}
        source = open_data(config.data.train, "data.train", "train")
        batch_of_rank = config.train.global_batch // world.size
        with loader_without_run(config, source, world, device_batch=batch_of_rank, accumulation=1) as loader:
            objective = build_objective(config, Precision("fp32", "a comparison of roundings"), 0)
            schedules = Schedules(config, Length(steps, loader.steps_per_epoch, config.train.global_batch, 1, batch_of_rank), objective)
            for number, batch in zip(range(steps), loader.batches(0)):
                crops = [crop.to(world.device, dtype) for crop in batch.crops]
                for name, way in ways.items():
                    torch.manual_seed(zlib.crc32(f"{config.run.seed}/{number}/0".encode()))
                    losses[name].append(way([crops], schedules.at(number), number).loss.double().clone())
    return {name: world.mean(torch.stack(found)) for name, found in losses.items()}


def way_of(name: str, config: Config, world: World, dtype: torch.dtype) -> Callable[..., StepResult]:
    """A step of the run that ``config`` describes, from the weights of its seed, in ``dtype``."""
    precision = Precision("bf16" if name in NARROW else "fp32", "a comparison of roundings")
    objective = build_objective(config, precision, 0)
    pair, _ = build_pair(config, objective)
    pair.to(world.device, dtype, memory_format=torch.channels_last)
    if "last bit" in name:
        with torch.no_grad():
            for parameters in (pair.student.parameters(), pair.teacher.parameters()):
                for parameter in parameters:
                    single = parameter.float()
                    parameter.copy_(torch.nextafter(single, torch.full_like(single, torch.inf)))
    if "one call" in name:
        for encoder in (pair.student, pair.teacher):
            encoder.packed.attend_by(one_by_one)
    if "oneDNN" in name:
        multiply_by_onednn_(pair)
    if config.model.compile:
        pair.compile_blocks()
    step = build_step(config, pair, objective.to(world.device, dtype), world, precision)
    return GraphedStep(step, None if world.device.type == "cuda" else OperatorTape) if "recorded" in name else step


if __name__ == "__main__":
    sys.exit(main())
