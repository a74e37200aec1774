"""Loss and gradient, read-out, enqueue and partition, each beside its peers.

Correctness comes first: every variant's error against float64 stands beside its time, and a backend of ours that errs more than twice as
much as the reference of the same precision gets no time and ends the run with exit code 1. How times and memory are taken:
benchmarks.beside. Inputs are random; the floor is 4·D·(V+T)·N·K operations.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from massl_fast import kernels
from massl_fast.benchmarks import beside
from massl_fast.benchmarks.beside import DTYPES, OURS, TUNED, Call, Inputs, differentiate, relative_error, unit_rows
from massl_fast.hardware import device_slug
from massl_fast.kernels import reference
from massl_fast.kernels.loss import assemble, count_pairs
from massl_fast.kernels.shuffle import round_keys, shuffle

# Their ratio is a power of two, so that the attention composition can give all rows one scale without rounding them.
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
LOSS_ONLY = "reference, loss only"
# Timed as a CUDA graph as well: short beside the launches from the host, which a training step under a graph does not pay.
GRAPHED = ("triton", TUNED, "enqueue_", "partition_indices")
KIND, ERRORS, DETAILS = "kernels", ("error of the sum", "error"), {"temperatures": [STUDENT_TEMP, TEACHER_TEMP]}
ORACLE_IMAGES = 8  # at a time, in float64
RESULTS = Path("bench") / "results"


@dataclass(frozen=True)
class Case:
    """One operation at one shape; V, T, N, K, D and block as in docs/kernels.md."""

    operation: str  # loss, readout, enqueue or partition
    V: int
    T: int
    N: int
    D: int
    K: int
    block: int
    dtype: str

    @property
    def flops(self) -> int:
        """Two products of all rows with the entries that take part; 0 for what is no product."""
        kept = self.K // self.block * self.block
        return 4 * self.D * (self.V + self.T) * self.N * kept if self.operation in ("loss", "readout") else 0

    def __str__(self) -> str:
        return f"{self.operation}: V {self.V}, T {self.T}, N {self.N}, D {self.D}, K {self.K}, block {self.block}, {self.dtype}"


def make_inputs(case: Case, seed: int, device: torch.device) -> Inputs:
    """student [V, N, D], teacher [T, N, D], memory [K, D], partition [K] int32, pointer [1] int64; targets [(V+T)·N] int64 of the linear
    cross-entropy."""
    generator = torch.Generator(device).manual_seed(seed)
    unit = functools.partial(unit_rows, case, generator)
    return dict(
        student=unit(case.V, case.N),
        teacher=unit(case.T, case.N),
        memory=unit(case.K),
        partition=torch.randperm(case.K, device=device, generator=generator).int(),
        pointer=torch.full((1,), case.K - case.N // 2, device=device),  # the rows wrap around
        targets=torch.randint(case.K, ((case.V + case.T) * case.N,), device=device, generator=generator),
    )


def rows_of(inputs: Inputs) -> Tensor:
    """Of student and teacher, [(V+T)·N, D]."""
    return torch.cat((inputs["student"], inputs["teacher"])).flatten(0, 1)


# Variants: functions of the inputs


def variants(case: Case, device: torch.device, compiled: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """The variants of a case by name, the baseline first, and why others cannot run here."""
    if case.operation == "partition":
        sort = lambda inputs: (torch.randperm(case.K, device=device),)  # noqa: E731
        return {"randperm": sort, "partition_indices": lambda inputs: (partition_of_step_one(case.K, device),)}, {}
    if case.operation == "enqueue":
        return {"plain PyTorch": _enqueue_plainly, "enqueue_": _enqueue}, {}
    call = _loss if case.operation == "loss" else _readout
    found: dict[str, Call] = {}
    if case.operation == "loss":
        found[LOSS_ONLY] = functools.partial(differentiate, function=functools.partial(_published_loss, case=case), names=("student",))
    found["reference"] = functools.partial(call, case=case, backend="reference")
    if compiled:
        found["reference, compiled"] = torch.compile(found[LOSS_ONLY if case.operation == "loss" else "reference"], dynamic=False)
    found["streaming"] = functools.partial(call, case=case, backend="streaming")
    missing = beside.without_triton(device, case.dtype, case.D)
    if not missing:
        found[TUNED if tuning() else "triton"] = functools.partial(call, case=case, backend="triton")
    attentions = ("flash", "efficient", "cudnn") if device.type == "cuda" else ("cpu flash",)
    compose = _loss_by_attention if case.operation == "loss" else _readout_by_attention
    for kind in attentions:
        found[f"attention, {kind}"] = functools.partial(compose, case=case, kind=kind)
    if case.operation == "loss":
        if hasattr(F, "linear_cross_entropy"):
            found["linear cross-entropy, forward"] = _linear_cross_entropy
        else:
            missing["linear cross-entropy, forward"] = f"torch {torch.__version__} has no linear_cross_entropy"
    return found, missing


def tuning() -> bool:
    return os.environ.get("MASSL_FAST_AUTOTUNE") == "1"


def _loss(inputs: Inputs, case: Case, backend: str) -> tuple[Tensor, ...]:
    def loss(i: Inputs) -> Tensor:
        temperatures = dict(student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP)
        options = dict(block_size=case.block, partition=i["partition"], backend=backend)
        return kernels.memory_cross_entropy(i["student"], i["teacher"], i["memory"], **temperatures, **options).loss

    return differentiate(inputs, loss, ("student",))


def _published_loss(inputs: Inputs, case: Case) -> Tensor:
    """The reference's loss without its telemetry, which the published code does not compute: the strictest baseline."""
    kept = inputs["partition"][: case.K // case.block * case.block]

    def block_logits(rows: Tensor, temp: float) -> Tensor:
        return (rows @ inputs["memory"].T)[..., kept].unflatten(-1, (-1, case.block)) / temp

    logits = block_logits(inputs["student"], STUDENT_TEMP)
    targets = block_logits(inputs["teacher"], TEACHER_TEMP).softmax(-1, dtype=torch.float32)
    loss = torch.zeros((), device=logits.device)
    for i, prediction in enumerate(logits):
        for j, target in enumerate(targets):
            if i != j:
                loss = loss - (target * prediction.log_softmax(-1, dtype=torch.float32)).sum(-1).mean()
    return loss / count_pairs(len(logits), len(targets))


def _readout(inputs: Inputs, case: Case, backend: str) -> tuple[Tensor, Tensor]:
    return kernels.memory_readout(
        rows_of(inputs), inputs["memory"], block_size=case.block, temperature=STUDENT_TEMP, partition=inputs["partition"], backend=backend
    )


def _attention(rows: Tensor, inputs: Inputs, block: int, kind: str) -> tuple[Tensor, Tensor]:
    """Read-out and logsumexp of rows at the student's temperature: keys = values = the permuted memory, block = batch."""
    blocks, aten = inputs["memory"].shape[0] // block, torch.ops.aten
    entries = inputs["memory"][inputs["partition"][: blocks * block]].view(blocks, 1, block, -1)
    queries, scale = rows.expand(blocks, 1, *rows.shape), 1 / STUDENT_TEMP
    operator, more = {
        "cpu flash": (aten._scaled_dot_product_flash_attention_for_cpu, ()),
        "flash": (aten._scaled_dot_product_flash_attention, ()),
        "efficient": (aten._scaled_dot_product_efficient_attention, (None, True)),
        "cudnn": (aten._scaled_dot_product_cudnn_attention, (None, True)),
    }[kind]
    out, logsumexp = operator(queries, entries, entries, *more, scale=scale)[:2]
    logsumexp = logsumexp.reshape(blocks, -1)[:, : len(rows)]  # efficient pads the rows
    return out.squeeze(1).sum(0, dtype=torch.float32), logsumexp.sum(0, dtype=torch.float32)


def _readout_by_attention(inputs: Inputs, case: Case, kind: str) -> tuple[Tensor, Tensor]:
    return _attention(rows_of(inputs), inputs, case.block, kind)


def _loss_by_attention(inputs: Inputs, case: Case, kind: str) -> tuple[Tensor, Tensor]:
    rows = torch.cat((inputs["student"], inputs["teacher"] * (STUDENT_TEMP / TEACHER_TEMP))).flatten(0, 1)
    readout, logsumexp = _attention(rows, inputs, case.block, kind)
    blocks = case.K // case.block
    statistics, gradient = assemble(inputs["student"], inputs["teacher"], readout, logsumexp, STUDENT_TEMP, TEACHER_TEMP, blocks)
    return statistics[0], gradient


def _linear_cross_entropy(inputs: Inputs) -> tuple[Tensor]:
    """PyTorch's fused loss at the same number of rows and entries: half of the problem (one softmax over all entries, a class index as the
    target, forward alone; nothing reads the memory out for a teacher)."""
    rows = (rows_of(inputs) / STUDENT_TEMP).requires_grad_()
    options = torch.nn.LinearCrossEntropyOptions()
    return (F.linear_cross_entropy(rows, inputs["memory"], inputs["targets"], options=options).detach(),)


def _enqueue(inputs: Inputs) -> tuple[Tensor, ...]:
    kernels.enqueue_(inputs["memory"], inputs["pointer"], inputs["teacher"][-1])
    return ()


def _enqueue_plainly(inputs: Inputs) -> tuple[Tensor, ...]:
    rows = F.normalize(inputs["teacher"][-1].float(), dim=-1).to(inputs["memory"].dtype)
    positions = (inputs["pointer"] + torch.arange(len(rows), device=rows.device)) % len(inputs["memory"])
    inputs["memory"][positions] = rows
    inputs["pointer"].copy_((inputs["pointer"] + len(rows)) % len(inputs["memory"]))
    return ()


def partition_of_step_one(num_entries: int, device: torch.device) -> Tensor:
    return kernels.partition_indices(num_entries, seed=1, step=1, device=device)


# Correctness


def errors_of(case: Case, name: str, inputs: Inputs, results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> tuple[float, ...]:
    """loss: (relative error of the loss, largest error of the gradient / largest gradient); readout: the same of logsumexp and read-out;
    enqueue: largest error of an entry; partition: entries that are not those of the sequential form, a randperm's repeated entries."""
    if case.operation == "enqueue":
        return (float((inputs["memory"].double() - truth[0]).abs().max()),)
    if case.operation == "partition":
        missed = case.K - results[0].unique().numel()
        return (float(missed if name == "randperm" else max(missed, int((results[0] != truth[0]).sum()))),)
    if name.startswith("linear"):
        logits = (rows_of(inputs) / STUDENT_TEMP).double() @ inputs["memory"].double().T
        return (relative_error(results[0], F.cross_entropy(logits, inputs["targets"])),)
    errors = tuple(map(relative_error, results, truth))
    return errors if case.operation == "loss" else errors[::-1]


def truth(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The published computation in float64, a few images at a time: the loss is a mean over images."""
    if case.operation == "partition":
        return (shuffle(torch.arange(case.K), case.K, *round_keys(case.K, 1, 1)).int().to(inputs["memory"].device),)
    memory = inputs["memory"].double()
    if case.operation == "enqueue":
        rows = F.normalize(inputs["teacher"][-1].double(), dim=-1)
        memory[(inputs["pointer"] + torch.arange(case.N, device=rows.device)) % case.K] = rows
        return (memory,)
    if case.operation == "readout":
        few = rows_of(inputs).double().split(ORACLE_IMAGES * (case.V + case.T))
        parts = [reference.memory_readout(rows, memory, inputs["partition"], case.block, STUDENT_TEMP) for rows in few]
        return tuple(torch.cat(part) for part in zip(*parts))
    loss, gradients = torch.zeros((), dtype=torch.float64, device=memory.device), []
    for z, w in zip(inputs["student"].double().split(ORACLE_IMAGES, 1), inputs["teacher"].double().split(ORACLE_IMAGES, 1)):
        z = z.requires_grad_()
        share = z.shape[1] / case.N
        part = share * reference.memory_cross_entropy(z, w, memory, inputs["partition"], case.block, STUDENT_TEMP, TEACHER_TEMP)[0]
        gradients += torch.autograd.grad(part, z)
        loss += part.detach()
    return loss, torch.cat(gradients, 1)


def excess(case: Case, found: dict[str, tuple[float, ...]]) -> dict[str, str]:
    """Which of our variants are wrong, and by how much."""
    if case.operation == "partition":
        return {name: f"{values[0]:.0f} entries are wrong" for name, values in found.items() if values[0] and name == "partition_indices"}
    unit = torch.finfo(DTYPES[case.dtype]).eps
    if case.operation == "enqueue":
        return {name: f"an entry is off by {values[0]:.1e}" for name, values in found.items() if values[0] > unit}
    if "reference" not in found:
        return {}
    # The loss has an allowance of its own, and both have one of a few roundings of float32, in which results are summed: the reference's
    # can be right by luck.
    least = 4 * torch.finfo(torch.float32).eps
    budget = tuple(max(2 * error, floor) for error, floor in zip(found["reference"], (max(unit, least), least)))
    return beside.too_wrong(found, OURS, budget, "reference's allows")


def operations_of(case: Case, name: str, call: Call, inputs: Inputs) -> float:
    """The linear cross-entropy is half of the problem: it does not do the operations of the others."""
    return 0 if name.startswith("linear") else case.flops


# The command


def check_names(cases: Sequence[Case], wanted: Sequence[str], compiled: bool, device: torch.device) -> None:
    """Raise ValueError where a word of ``--variants`` is in no variant's name."""
    known: dict[str, str] = {}
    for case in cases:
        calls, missing = variants(case, device, compiled)
        known |= dict.fromkeys(calls, "") | missing
    for word in wanted:
        names = [name for name in known if word in name]
        if not names:
            raise ValueError(f"--variants: no variant has {word} in its name; there are {'; '.join(known)}.")
        if all(known[name] for name in names):
            raise ValueError(f"--variants: {names[0]} cannot be measured: {known[names[0]]}.")


def chosen_cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    on_gpu = device.type == "cuda"
    images = args.images or ([8] if args.quick else [64, 512] if on_gpu else [64])
    entries = args.entries or ([8192] if args.quick else [65536, 131072] if on_gpu else [65536])
    block = min(args.block, 2048) if args.quick else args.block
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    found = {"--images": min(images), "--entries": min(entries), "--block": block, "--width": args.width}
    found |= {"--teacher-views": args.teacher_views, "--student-views": args.student_views, "--rounds": args.rounds}
    for name, value in found.items():
        least = {"--student-views": 2, "--rounds": 0}.get(name, 1)
        if value < least:
            raise ValueError(f"{name} is {value}; it takes at least {least}.")
    for name, value in (("--images", max(images)), ("--block", block)):
        if value > min(entries):
            raise ValueError(f"{name} is {value}, more than the {min(entries)} entries of the memory (--entries).")
    return [
        Case(operation, args.student_views, args.teacher_views, count, args.width, size, block, dtype)
        for operation in args.cases
        for count in (images if operation != "partition" else images[:1])
        for size in entries
    ]


def slug(device: torch.device) -> str:
    """The folder of a device's records."""
    return device_slug() if device.type == "cuda" else "cpu"
