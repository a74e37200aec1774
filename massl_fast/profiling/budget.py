"""``massl-fast profile budget``: what a step has to compute and to move, part by part, and the least time a GPU can take for it.

The trainer's own step runs on tensors without contents, and every operator it calls is counted: operations of matrix products, attention
and the loss; bytes of what it reads, each tensor once, and writes. The floor of an operator is the longer of operations / peak and
bytes / bandwidth of the data sheet; the floor of a part is the sum over its operators. No cache is assumed, so an operator whose inputs
still lie in the L2 cache can be faster, and one compiled together with its neighbours moves less.

No GPU is needed. With ``--record`` the parts measured by ``massl-fast bench step --output`` on such a GPU stand beside the floors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from massl_fast.benchmarks import records
from massl_fast.config import Config, load_config, recipe_names
from massl_fast.data.loaders import views_of
from massl_fast.distributed.world import World
from massl_fast.engine import phases
from massl_fast.hardware import GPUS, Gpu
from massl_fast.profiling import sections
from massl_fast.profiling.estimate import attention_of, bring_optimizer_state, precision_on
from massl_fast.profiling.synthetic import micro_batches_of, synthetic_run

TAKES_SETTINGS = True
GROUPS = ("products", "attention", "loss", "other")
"""What an operator belongs to."""
# The CPU's fused attention, which PyTorch 2.11 knows no formula for, computes what the GPU's does.
ATTENTION_OF_CPUS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: torch.ops.aten._scaled_dot_product_flash_attention_backward,
}
NO_WORK = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "lift_fresh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "massl-fast profile budget [--recipe NAME|FILE] [--gpu NAME] [--record FILE] [--section.key VALUE ...]"
    parser.add_argument("--recipe", default="vit_small_in1k", help=f"one of {', '.join(recipe_names())}, or the path of a YAML file")
    parser.add_argument("--gpu", default="H200", choices=[*GPUS], help="whose data sheet gives peak and bandwidth (default: H200)")
    parser.add_argument("--record", default="", help="file of records that holds a `bench step` of the same batch, for measured times")
    parser.epilog = "Every setting of a run can be given; massl-fast train --help lists them."


def run(args: argparse.Namespace) -> int:
    config = load_config(args.recipe, args.settings)
    gpu = GPUS[args.gpu]
    if config.train.precision == "auto" and gpu.name.startswith("V100"):
        config.train.precision = "fp16"  # what the trainer chooses there
    accumulation, batch = micro_batches_of(config)
    measured = measured_parts(args.record, config, Path(args.recipe).stem, batch, accumulation) if args.record else {}
    budget = count_step(config, batch, accumulation)
    print(
        f"{config.model.architecture}, {accumulation} × {batch} images, 2 crops of {config.crops.global_size} px and "
        f"{config.crops.num_local} of {config.crops.local_size} px, memory of {config.objective.memory_size}; "
        f"{gpu.name}: {gpu.peak_flops / 1e12:.4g} TFLOP/s, {gpu.bandwidth / 1e12:.3g} TB/s (data sheet)\n"
    )
    print("\n".join(table(budget, gpu, batch * accumulation, measured)))
    return 0


@dataclass
class Work:
    """Of one operator, or of several together."""

    flops: float = 0.0
    bytes: float = 0.0
    operators: int = 0
    calls: list[tuple[float, float]] = field(default_factory=list)
    """(operations, bytes) of each operator."""

    def add(self, flops: float, moved: float) -> None:
        self.flops += flops
        self.bytes += moved
        self.operators += 1
        self.calls.append((flops, moved))

    def floor(self, gpu: Gpu) -> float:
        """Seconds."""
        return sum(max(flops / gpu.peak_flops, moved / gpu.bandwidth) for flops, moved in self.calls)


Budget = dict[tuple[str, str], Work]
"""(part of the step, group of operators) → work."""


class OperatorCount(TorchDispatchMode):
    """Adds up the work of every operator under the part that ``observe`` named last."""

    def __init__(self, loss_flops: float):
        super().__init__()
        self.loss_flops = loss_flops
        self.part = phases.REST
        self.budget: Budget = {}

    def observe(self, name: str) -> None:
        self.part = name or phases.REST

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in NO_WORK or func.namespace in ("prim", "profiler") or is_view(func):
            return out
        if func.namespace == "massl_fast":
            group, flops = "loss", self.loss_flops
        else:
            formula = flop_registry.get(ATTENTION_OF_CPUS.get(func._overloadpacket, func._overloadpacket))
            flops = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
            group = "attention" if "attention" in name else "products" if flops else "other"
        self.budget.setdefault((self.part, group), Work()).add(flops, bytes_moved(func, args, kwargs, out))
        return out


def is_view(func: Any) -> bool:
    """Whether all that an operator returns are other views of what it was given."""
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def bytes_moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes of the tensors that an operator reads, and of those that it writes."""
    read = sum(size_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    if func._schema.name.rsplit("::")[1].rstrip("_") in ("zero", "fill", "copy"):
        read -= size_of(args[0])  # overwritten unread
    read -= sum(size_of(leaf) for leaf in tree_leaves(kwargs.get("out")) if isinstance(leaf, Tensor))
    written = 0
    for number, argument in enumerate(func._schema.arguments):
        # PyTorch's fused optimizers may write gradients (when they undo a loss scale), but are not asked to here.
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads":
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            written += sum(size_of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    if not written:
        written = sum(size_of(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    return read + written


def size_of(tensor: Tensor) -> int:
    """Bytes behind a tensor: of an expanded one no more than there are."""
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        distinct *= size if stride else 1
    return distinct * tensor.element_size()


def count_step(config: Config, batch: int, accumulation: int) -> Budget:
    """The work of one step of ``accumulation`` micro-batches of ``batch`` images, as a GPU takes it, but for the blocks' compilation."""
    simulated = config.model_copy(deep=True)
    simulated.run.init_from, simulated.objective.backend = "", "streaming"  # the operator counts as one, whatever does its work
    with FakeTensorMode(), attention_of("cuda"):
        world = World(0, 1, 0, torch.device("cpu"))
        taken = synthetic_run(simulated, world, precision_on(config, "cuda"), device_batch=batch, accumulation=accumulation)
        bring_optimizer_state(taken)
        taken.step()  # which makes what later ones keep
        count = OperatorCount(batch * taken.train_step.objective.loss_flops(len(views_of(config.crops))))
        with sections.marked(taken.train_step, count.observe) as marks, count:
            taken.step(marks.step)
    return count.budget


def measured_parts(path: str, config: Config, recipe: str, batch: int, accumulation: int) -> dict[str, float]:
    """Seconds of each part from the last record of this step. ValueError where there is none."""
    wanted = {"recipe": recipe, "architecture": config.model.architecture, "batch": batch, "accumulation": accumulation}
    rows = [row for row in records.read(Path(path)) if row["kind"] == "step"]
    fitting = [row for row in rows if all(row["case"][name] == value for name, value in wanted.items())]
    if not fitting:
        found = [", ".join(f"{name} {row['case'][name]}" for name in wanted) for row in rows]
        raise ValueError(
            f"{path} holds no `bench step` of {', '.join(f'{name} {value}' for name, value in wanted.items())}; "
            f"found: {'; '.join(found) or 'none at all'}."
        )
    return {part: fitting[-1]["figures"][f"part: {part}"]["median"] for part in phases.PHASES}


def table(budget: Budget, gpu: Gpu, images: int, measured: dict[str, float]) -> list[str]:
    """Lines of a Markdown table: parts, what they consist of, and the whole."""
    head = ["part", "GFLOP", "GB", "operators", "floor ms", *(["measured ms", "gap"] if measured else [])]
    lines = [head, ["---"] * len(head)]
    whole = Work()
    for part in phases.PHASES:
        groups = {group: budget[part, group] for group in GROUPS if (part, group) in budget}
        total = joined(groups.values())
        whole = joined([whole, total])
        extra = []
        if measured:
            floor = total.floor(gpu)
            extra = [f"{1000 * measured[part]:.2f}", f"×{measured[part] / floor:.1f}" if floor else ""]
        lines.append([f"**{part}**", *cells(total, gpu), *extra])
        if len(groups) > 1:
            lines += [[f"– {group}", *cells(work, gpu), *([""] * len(extra))] for group, work in groups.items()]
    extra = []
    if measured:
        seconds = sum(measured.values())
        extra = [f"{1000 * seconds:.2f}", f"×{seconds / whole.floor(gpu):.1f}"]
    lines.append(["**whole step**", *cells(whole, gpu), *extra])
    arithmetic, floor = whole.flops / gpu.peak_flops, whole.floor(gpu)
    return ["| " + " | ".join(line) + " |" for line in lines] + [
        "",
        f"{whole.flops / images / 1e9:.1f} GFLOP an image; {whole.operators} operators. At the floor {images / floor:,.0f} images/s, "
        f"{100 * arithmetic / floor:.0f} % of the peak; with arithmetic alone {images / arithmetic:,.0f} images/s.",
    ]


def joined(works: Any) -> Work:
    whole = Work()
    for work in works:
        for flops, moved in work.calls:
            whole.add(flops, moved)
    return whole


def cells(work: Work, gpu: Gpu) -> list[str]:
    return [f"{work.flops / 1e9:,.1f}", f"{work.bytes / 1e9:,.2f}", str(work.operators), f"{1000 * work.floor(gpu):,.2f}"]
