"""What a step has to compute and to move, part by part, and the least time a GPU can take for it.

The trainer's own step runs on tensors without contents, and every operator it calls is counted: operations of matrix products, attention
and the loss; bytes of what it reads, each tensor once, and writes. The floor of an operator is the longer of operations / peak and
bytes / bandwidth of the data sheet; the floor of a part is the sum over its operators. No cache is assumed, so an operator whose inputs
still lie in the L2 cache can be faster, and one compiled together with its neighbours moves less. Casts are those of CUDA's autocast
(cuda_casts.py).

No kernel computes at the peak: beside the floor stands the time with products at 70 % and attention at 40 % of it, which is what cuBLAS
and flash attention give at widths and lengths of vision transformers (``SHARE_OF_PEAK``). These shares are assumed, not measured here.

No GPU is needed. Parts measured on such a GPU by ``massl-fast bench step --output`` can stand beside the floors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from massl_fast import records
from massl_fast.config import Config
from massl_fast.engine import phases
from massl_fast.hardware import Gpu
from massl_fast.kernels import flops as _formulas  # noqa: F401  registers those of our operators
from massl_fast.profiling.cuda_casts import cuda_casts
from massl_fast.profiling.estimate import bring_optimizer_state, fake_run

GROUPS = ("products", "attention", "loss", "other")
"""What an operator belongs to."""
SHARE_OF_PEAK = {"products": 0.7, "attention": 0.4}
"""What kernels of a group compute at, of the data sheet's peak; the others' time is in what they move."""
# The CPU's fused attention, which PyTorch 2.11 knows no formula for, computes what the GPU's does.
ATTENTION_OF_CPUS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: torch.ops.aten._scaled_dot_product_flash_attention_backward,
}
NO_WORK = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "lift_fresh")


Calls = list[tuple[float, float]]
"""(operations, bytes) of each operator."""
Budget = dict[tuple[str, str], Calls]
"""(part of the step, group of operators) → what they compute and move."""


def floor(calls: Calls, gpu: Gpu, share: float = 1.0) -> float:
    """Seconds, where arithmetic runs at ``share`` of the peak."""
    return sum(max(flops / (share * gpu.peak_flops), moved / gpu.bandwidth) for flops, moved in calls)


class OperatorCount(TorchDispatchMode):
    """Adds up the work of every operator under the part that ``observe`` named last."""

    def __init__(self):
        super().__init__()
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
        formula = flop_registry.get(ATTENTION_OF_CPUS.get(func._overloadpacket, func._overloadpacket))
        flops = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
        if func.namespace == "massl_fast":
            group = "loss"
        else:
            group = "attention" if "attention" in name else "products" if flops else "other"
        self.budget.setdefault((self.part, group), []).append((flops, bytes_moved(func, args, kwargs, out)))
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
    with FakeTensorMode():
        taken = fake_run(config, "cuda", batch, accumulation)  # the loss counts as one operator, whatever does its work
        with cuda_casts():
            bring_optimizer_state(taken)
            taken.step()  # which makes what later ones keep
            count = OperatorCount()
            with taken.observed(count.observe), count:
                taken.step()
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


def as_rows(budget: Budget, gpu: Gpu, measured: dict[str, float]) -> list[dict[str, Any]]:
    """A row per part and per group of operators in it, the whole step last."""
    rows = []
    for part in phases.PHASES:
        groups = {group: budget[part, group] for group in GROUPS if (part, group) in budget}
        rows.append(_row(part, "", list(groups.items()), gpu, measured.get(part)))
        if len(groups) > 1:
            rows += [_row(part, group, [(group, calls)], gpu) for group, calls in groups.items()]
    whole = [(group, calls) for (_, group), calls in budget.items()]
    return [*rows, _row("whole step", "", whole, gpu, sum(measured.values()) if measured else None)]


def _row(part: str, name: str, groups: Sequence[tuple[str, Calls]], gpu: Gpu, measured: float | None = None) -> dict[str, Any]:
    flops, moved = (sum(sum(call[which] for call in calls) for _, calls in groups) for which in (0, 1))
    row = {"part": part, "group": name, "flops": flops, "bytes": moved, "operators": sum(len(calls) for _, calls in groups)}
    row["floor_seconds"] = sum(floor(calls, gpu) for _, calls in groups)
    row["expected_seconds"] = sum(floor(calls, gpu, SHARE_OF_PEAK.get(group, 1.0)) for group, calls in groups)
    return row | {"measured_seconds": measured}


def table(budget: Budget, gpu: Gpu, images: int, measured: dict[str, float]) -> list[str]:
    """Lines of a Markdown table: parts, what they consist of, and the whole."""
    head = ["part", "GFLOP", "GB", "operators", "floor ms", "at 70 / 40 % ms", *(["measured ms", "gap"] if measured else [])]
    lines = [head, ["---"] * len(head)]
    rows = as_rows(budget, gpu, measured)
    for row in rows:
        least, seconds = row["floor_seconds"], row["measured_seconds"]
        name = f"– {row['group']}" if row["group"] else f"**{row['part']}**"
        cells = [f"{row['flops'] / 1e9:,.1f}", f"{row['bytes'] / 1e9:,.2f}", str(row["operators"]), f"{1000 * least:,.2f}"]
        cells.append(f"{1000 * row['expected_seconds']:,.2f}")
        if measured:
            cells += [f"{1000 * seconds:.2f}", f"×{seconds / least:.1f}" if least else ""] if seconds is not None else ["", ""]
        lines.append([name, *cells])
    whole = rows[-1]
    arithmetic, least, expected = whole["flops"] / gpu.peak_flops, whole["floor_seconds"], whole["expected_seconds"]
    return [
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
        f"{whole['flops'] / images / 1e9:.1f} GFLOP per image; {whole['operators']} operators. "
        f"At the floor {images / least:,.0f} images/s, {100 * arithmetic / least:.0f} % of the peak; "
        f"with arithmetic alone {images / arithmetic:,.0f} images/s. With products at 70 % and attention at 40 % of the peak "
        f"{images / expected:,.0f} images/s, {100 * arithmetic / expected:.0f} % of the peak.",
    ]
