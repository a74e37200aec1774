"""Loss and gradient, read-out, enqueue and partition, each beside its peers.

Correctness comes first: every variant's error against float64 stands beside its time, and a backend of ours that errs more than twice as
much as the reference of the same precision gets no time and ends the run with exit code 1. Then all variants of a case run in turn, a
call (or a few) of each in every round, so that what else the machine does meets all of them; times are medians over the rounds, ratios
medians of each round's ratio. Inputs are random and rotate over several copies. The rate of a large matrix product and the bandwidth of a
copy are measured in the same rounds; the floor is 4·D·(V+T)·N·K operations at that rate.

Extra memory is what a second call needs beyond its inputs, results included. GPU: peak of PyTorch's allocator. CPU: growth of the
resident set's high-water mark (VmHWM, reset through /proc/self/clear_refs) during the call, in a process of its own for each variant;
scratch memory of the matrix library and of threads is in it.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from massl_fast import kernels
from massl_fast.benchmarks import records
from massl_fast.benchmarks.intervals import spread_percent
from massl_fast.hardware import device_slug
from massl_fast.kernels import reference
from massl_fast.kernels.backends import triton_obstacle
from massl_fast.kernels.loss import assemble, count_pairs
from massl_fast.kernels.shuffle import round_keys, shuffle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Their ratio is a power of two, so that the attention composition can give all rows one scale without rounding them.
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
TUNED = "triton, tuned"
"""Stands in for triton where the tuner is on (MASSL_FAST_AUTOTUNE=1)."""
OURS = ("triton", "streaming", TUNED)
LOSS_ONLY = "reference, loss only"
# Timed as a CUDA graph as well: short beside the launches from the host, which a training step under a graph does not pay.
GRAPHED, GRAPH = ("triton", TUNED, "enqueue_", "partition_indices"), ", graph"
MATRIX, COPY = "matrix product", "copy"
COPIES = 3  # of the inputs
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


@dataclass
class Inputs:
    """One copy of a case's random inputs."""

    student: Tensor  # [V, N, D]
    teacher: Tensor  # [T, N, D]
    memory: Tensor  # [K, D]
    partition: Tensor  # [K] int32
    pointer: Tensor  # [1] int64
    targets: Tensor  # [(V+T)·N] int64: of the linear cross-entropy peer

    @property
    def rows(self) -> Tensor:
        return torch.cat((self.student, self.teacher)).flatten(0, 1)


Call = Callable[[Inputs], tuple[Tensor, ...]]


def make_inputs(case: Case, seed: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, case.D, device=device, generator=generator), dim=-1).to(DTYPES[case.dtype])

    return Inputs(
        unit(case.V, case.N),
        unit(case.T, case.N),
        unit(case.K),
        torch.randperm(case.K, device=device, generator=generator).int(),
        torch.full((1,), case.K - case.N // 2, device=device),  # the rows wrap around
        torch.randint(case.K, ((case.V + case.T) * case.N,), device=device, generator=generator),
    )


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
        found[LOSS_ONLY] = functools.partial(_differentiate, lambda z, inputs: _published_loss(z, inputs, case.block))
    found["reference"] = functools.partial(call, case=case, backend="reference")
    if compiled:
        found["reference, compiled"] = torch.compile(found[LOSS_ONLY if case.operation == "loss" else "reference"], dynamic=False)
    found["streaming"] = functools.partial(call, case=case, backend="streaming")
    missing = {}
    if device.type != "cuda":
        missing["triton"] = "it needs a GPU, and there is none here"
    elif obstacle := triton_obstacle(device, DTYPES[case.dtype], case.D):
        missing["triton"] = obstacle.removesuffix(".")
    else:
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


def _loss(inputs: Inputs, case: Case, backend: str) -> tuple[Tensor, Tensor]:
    return _differentiate(
        lambda z, inputs: (
            kernels.memory_cross_entropy(
                z,
                inputs.teacher,
                inputs.memory,
                block_size=case.block,
                student_temp=STUDENT_TEMP,
                teacher_temp=TEACHER_TEMP,
                partition=inputs.partition,
                backend=backend,
            ).loss
        ),
        inputs,
    )


def _differentiate(function: Callable[[Tensor, Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and its gradient with respect to the student."""
    z = inputs.student.detach().requires_grad_()
    loss = function(z, inputs)
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient


def _published_loss(student: Tensor, inputs: Inputs, block: int) -> Tensor:
    """The reference's loss without its telemetry, which the published code does not compute: the strictest baseline."""
    kept = inputs.partition[: inputs.memory.shape[0] // block * block]

    def block_logits(rows: Tensor, temp: float) -> Tensor:
        return (rows @ inputs.memory.T)[..., kept].unflatten(-1, (-1, block)) / temp

    logits = block_logits(student, STUDENT_TEMP)
    targets = block_logits(inputs.teacher, TEACHER_TEMP).softmax(-1, dtype=torch.float32)
    loss = torch.zeros((), device=student.device)
    for i, prediction in enumerate(logits):
        for j, target in enumerate(targets):
            if i != j:
                loss = loss - (target * prediction.log_softmax(-1, dtype=torch.float32)).sum(-1).mean()
    return loss / count_pairs(len(logits), len(targets))


def _readout(inputs: Inputs, case: Case, backend: str) -> tuple[Tensor, Tensor]:
    return kernels.memory_readout(
        inputs.rows, inputs.memory, block_size=case.block, temperature=STUDENT_TEMP, partition=inputs.partition, backend=backend
    )


def _attention(rows: Tensor, inputs: Inputs, block: int, kind: str) -> tuple[Tensor, Tensor]:
    """Read-out and logsumexp of rows at the student's temperature: keys = values = the permuted memory, block = batch."""
    blocks, aten = inputs.memory.shape[0] // block, torch.ops.aten
    entries = inputs.memory[inputs.partition[: blocks * block]].view(blocks, 1, block, -1)
    queries, scale = rows.expand(blocks, 1, *rows.shape), 1 / STUDENT_TEMP
    if kind == "cpu flash":
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(queries, entries, entries, scale=scale)[:2]
    elif kind == "flash":
        out, logsumexp = aten._scaled_dot_product_flash_attention(queries, entries, entries, scale=scale)[:2]
    elif kind == "efficient":
        out, logsumexp = aten._scaled_dot_product_efficient_attention(queries, entries, entries, None, True, scale=scale)[:2]
    else:
        out, logsumexp = aten._scaled_dot_product_cudnn_attention(queries, entries, entries, None, True, scale=scale)[:2]
    logsumexp = logsumexp.reshape(blocks, -1)[:, : len(rows)]  # efficient pads the rows
    return out.squeeze(1).sum(0, dtype=torch.float32), logsumexp.sum(0, dtype=torch.float32)


def _readout_by_attention(inputs: Inputs, case: Case, kind: str) -> tuple[Tensor, Tensor]:
    return _attention(inputs.rows, inputs, case.block, kind)


def _loss_by_attention(inputs: Inputs, case: Case, kind: str) -> tuple[Tensor, Tensor]:
    rows = torch.cat((inputs.student, inputs.teacher * (STUDENT_TEMP / TEACHER_TEMP))).flatten(0, 1)
    readout, logsumexp = _attention(rows, inputs, case.block, kind)
    blocks = case.K // case.block
    statistics, gradient = assemble(inputs.student, inputs.teacher, readout, logsumexp, STUDENT_TEMP, TEACHER_TEMP, blocks)
    return statistics[0], gradient


def _linear_cross_entropy(inputs: Inputs) -> tuple[Tensor]:
    """PyTorch's fused loss at the same number of rows and entries: half of the problem (one softmax over all entries, a class index as the
    target, forward alone; nothing reads the memory out for a teacher)."""
    rows = (inputs.rows / STUDENT_TEMP).requires_grad_()
    options = torch.nn.LinearCrossEntropyOptions()
    return (F.linear_cross_entropy(rows, inputs.memory, inputs.targets, options=options).detach(),)


def _enqueue(inputs: Inputs) -> tuple[Tensor, ...]:
    kernels.enqueue_(inputs.memory, inputs.pointer, inputs.teacher[-1])
    return ()


def _enqueue_plainly(inputs: Inputs) -> tuple[Tensor, ...]:
    rows = F.normalize(inputs.teacher[-1].float(), dim=-1).to(inputs.memory.dtype)
    positions = (inputs.pointer + torch.arange(len(rows), device=rows.device)) % len(inputs.memory)
    inputs.memory[positions] = rows
    inputs.pointer.copy_((inputs.pointer + len(rows)) % len(inputs.memory))
    return ()


def partition_of_step_one(num_entries: int, device: torch.device) -> Tensor:
    return kernels.partition_indices(num_entries, seed=1, step=1, device=device)


# Correctness


def errors(case: Case, calls: dict[str, Call], device: torch.device) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Errors of each variant against float64, and why a variant could not run.

    loss: (relative error of the loss, largest error of the gradient / largest gradient); readout: the same of logsumexp and read-out;
    enqueue: largest error of an entry; partition: entries that are not those of the sequential form, a randperm's repeated entries.
    """
    inputs = make_inputs(case, 0, device)
    truth = oracle(case, inputs)
    found, failed = {}, {}
    for name, call in calls.items():
        fresh = make_inputs(case, 0, device) if case.operation == "enqueue" else inputs
        try:
            results = call(fresh)
        except torch.cuda.OutOfMemoryError:
            failed[name] = "it does not fit the GPU's memory"
            continue
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failed[name] = " ".join(str(error).split())[:200]
            continue
        if case.operation == "enqueue":
            found[name] = (float((fresh.memory.double() - truth[0]).abs().max()),)
        elif case.operation == "partition":
            missed = case.K - results[0].unique().numel()
            found[name] = (float(missed if name == "randperm" else max(missed, int((results[0] != truth[0]).sum()))),)
        elif name.startswith("linear"):
            logits = (inputs.rows / STUDENT_TEMP).double() @ inputs.memory.double().T
            found[name] = (_relative(results[0], F.cross_entropy(logits, inputs.targets)),)
        elif case.operation == "loss":
            found[name] = tuple(map(_relative, results, truth))
        else:
            found[name] = (_relative(results[1], truth[1]), _relative(results[0], truth[0]))
    return found, failed


def oracle(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The published computation in float64, a few images at a time: the loss is a mean over images."""
    if case.operation == "partition":
        return (shuffle(torch.arange(case.K), case.K, *round_keys(case.K, 1, 1)).int().to(inputs.memory.device),)
    memory = inputs.memory.double()
    if case.operation == "enqueue":
        rows = F.normalize(inputs.teacher[-1].double(), dim=-1)
        memory[(inputs.pointer + torch.arange(case.N, device=rows.device)) % case.K] = rows
        return (memory,)
    if case.operation == "readout":
        step = ORACLE_IMAGES * (case.V + case.T)
        parts = [reference.memory_readout(r, memory, inputs.partition, case.block, STUDENT_TEMP) for r in inputs.rows.double().split(step)]
        return tuple(torch.cat(part) for part in zip(*parts))
    loss, gradients = torch.zeros((), dtype=torch.float64, device=memory.device), []
    for z, w in zip(inputs.student.double().split(ORACLE_IMAGES, 1), inputs.teacher.double().split(ORACLE_IMAGES, 1)):
        z = z.requires_grad_()
        share = z.shape[1] / case.N
        part = share * reference.memory_cross_entropy(z, w, memory, inputs.partition, case.block, STUDENT_TEMP, TEACHER_TEMP)[0]
        gradients += torch.autograd.grad(part, z)
        loss += part.detach()
    return loss, torch.cat(gradients, 1)


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max() / truth.abs().max())


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
    return {
        name: f"errors {_scientific(found[name])}, more than the {_scientific(budget)} that twice the reference's allows"
        for name in OURS
        if name in found and any(error > allowed for error, allowed in zip(found[name], budget))
    }


# Time


def time_variants(
    calls: dict[str, Call], copies: Sequence[Inputs], rounds: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of a call, of each variant in each round; on a GPU wall is by events, processor 0."""
    repeats = {}
    for name, call in calls.items():
        call(copies[0])
        start = time.perf_counter()
        call(copies[-1])
        _wait(device)
        # A clock's resolution and a launch's latency vanish in 2 ms; no more calls than that, to keep rounds short.
        repeats[name] = max(1, min(200, int(2e-3 / max(time.perf_counter() - start, 1e-6))))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name, call in calls.items():
                samples[name].append(_time(call, copies, number, repeats[name], device))
    finally:
        gc.enable()
    return samples


def _time(call: Call, copies: Sequence[Inputs], first: int, repeats: int, device: torch.device) -> tuple[float, float]:
    _wait(device)
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for number in range(first, first + repeats):
            call(copies[number % len(copies)])
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats, 0.0
    wall, processor = time.perf_counter(), time.process_time()
    for number in range(first, first + repeats):
        call(copies[number % len(copies)])
    return (time.perf_counter() - wall) / repeats, (time.process_time() - processor) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graphed(call: Call, copies: Sequence[Inputs]) -> Call:
    """The call as a CUDA graph: the device's own time, without the host's launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in copies:
            call(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    recorded = {}
    for inputs in copies:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call(inputs)
        recorded[id(inputs)] = graph, results

    def replay(inputs: Inputs) -> tuple[Tensor, ...]:
        graph, results = recorded[id(inputs)]
        graph.replay()
        return results

    return replay


def graphs(case: Case, calls: dict[str, Call], copies: Sequence[Inputs]) -> tuple[dict[str, Call], dict[str, str]]:
    """CUDA graphs of those variants that have one, and which of them give something else than the call itself."""
    found, differing = {}, {}
    for name, call in calls.items():
        if name not in GRAPHED:
            continue
        replay = graphed(call, copies)
        # An enqueue moves its pointer, so that no two calls of it are the same.
        unequal = case.operation != "enqueue" and not all(
            torch.equal(one, other) for inputs in copies for one, other in zip(call(inputs), replay(inputs))
        )
        if unequal:
            differing[name + GRAPH] = "its results are not those of the call without a graph"
        else:
            found[name + GRAPH] = replay
    return found, differing


def machine_calls(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Call], dict[str, float]]:
    """A large matrix product and a large copy, and the operations or bytes of a call of each."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros((2**30 if device.type == "cuda" else 2**27), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    calls = {MATRIX: lambda inputs: (a @ b,), COPY: lambda inputs: (target.copy_(source),)}
    return calls, {MATRIX: 2.0 * side**3, COPY: 2.0 * source.numel()}


# Memory


def extra_bytes(case: Case, name: str, compiled: bool, device: torch.device) -> int:
    """What a variant's second call needs beyond its inputs; see above for the method."""
    if device.type == "cpu":
        # Spawned, so that nothing of this process's pools is reused.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            return executor.submit(_growth, case, name, compiled, torch.get_num_threads()).result()
    call, inputs = variants(case, device, compiled)[0][name], make_inputs(case, 0, device)
    call(inputs)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(inputs)
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _growth(case: Case, name: str, compiled: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    call, inputs = variants(case, device, compiled)[0][name], make_inputs(case, 0, device)
    call(inputs)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the first call freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    results = call(inputs)
    peak = _status("VmHWM")
    del results
    return max(0, peak - before)


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


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
    for name, value, least in (
        ("--images", min(images), 1),
        ("--entries", min(entries), 1),
        ("--block", block, 1),
        ("--width", args.width, 1),
        ("--teacher-views", args.teacher_views, 1),
        ("--student-views", args.student_views, 2),
        ("--rounds", args.rounds, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it takes at least {least}.")
    for name, value in (("--images", max(images)), ("--block", block)):
        if value > min(entries):
            raise ValueError(f"{name} is {value}, more than the {min(entries)} entries of the memory (--entries).")
    cases = []
    for operation in args.cases:
        for count in images if operation != "partition" else images[:1]:
            for size in entries:
                cases.append(Case(operation, args.student_views, args.teacher_views, count, args.width, size, block, dtype))
    return cases


def slug(device: torch.device) -> str:
    """The folder of a device's records."""
    return device_slug() if device.type == "cuda" else "cpu"


def measure(case: Case, wanted: Sequence[str], rounds: int, compiled: bool, device: torch.device) -> tuple[list[dict], dict[str, str]]:
    """Records of all variants of a case, printed as they come, and what was wrong."""
    print(f"\n{case.operation}: V {case.V}, T {case.T}, N {case.N}, D {case.D}, K {case.K}, block {case.block}, {case.dtype}")
    calls, missing = variants(case, device, compiled)
    baseline = next(iter(calls))
    keep = (baseline, "reference")
    calls = {name: call for name, call in calls.items() if not wanted or name in keep or any(word in name for word in wanted)}
    found, failed = errors(case, calls, device)
    mistakes = excess(case, found)
    for name, why in (missing | failed).items():
        print(f"  {name:<30} not measured: {why}")
    for name, why in mistakes.items():
        print(f"  {name:<30} WRONG: {why}")
    timed = {name: call for name, call in calls.items() if name in found and name not in mistakes}
    copies = [make_inputs(case, seed, device) for seed in range(COPIES)]
    if device.type == "cuda":
        replays, differing = graphs(case, timed, copies)
        mistakes |= differing
        for name, why in differing.items():
            print(f"  {name:<30} WRONG: {why}")
        timed |= replays
        found |= {name: found[name.removesuffix(GRAPH)] for name in replays}
    work: dict[str, float] = {}
    if case.flops:
        machine, work = machine_calls(DTYPES[case.dtype], device)
        timed |= machine
    samples = time_variants(timed, copies, rounds, device)
    del copies
    walls = {name: [wall for wall, _ in pairs] for name, pairs in samples.items()}
    rates = {name: [amount / wall for wall in walls[name]] for name, amount in work.items()}
    if rates:
        print(f"  {MATRIX} {median(rates[MATRIX]) / 1e12:.3f} TFLOP/s, {COPY} {median(rates[COPY]) / 1e9:.1f} GB/s", end=", ")
        print(f"floor {1e3 * case.flops / median(rates[MATRIX]):.3f} ms")
    print(
        f"  {'variant':<30}{'ms':>11}{'spread':>8}{'× first':>9}{'× CPU':>8}{'error':>18}"
        f"{'TFLOP/s':>9}{'% rate':>8}{'× floor':>9}{'extra MiB':>11}"
    )
    rows = []
    for name in (n for n in timed if n not in work):
        is_graph = name.endswith(GRAPH)
        extra = extra_bytes(case, name, compiled, device) if case.flops and not is_graph else None
        rows.append(_record(case, name, samples, samples.get(baseline), rates, found[name], extra, rounds, device))
        _print(rows[-1], name)
    return rows, mistakes


def _record(
    case: Case,
    name: str,
    samples: dict[str, list[tuple[float, float]]],
    baseline: list[tuple[float, float]] | None,
    rates: dict[str, list[float]],
    error: tuple[float, ...],
    extra: int | None,
    rounds: int,
    device: torch.device,
) -> dict:
    times = samples[name]
    walls = [wall for wall, _ in times]
    figures = {"time": records.figure([1e3 * wall for wall in walls], "ms", "lower")}
    figures["error"] = records.figure(error[-1], "relative" if case.flops else "absolute", "lower")
    if len(error) > 1:
        figures["error of the sum"] = records.figure(error[0], "relative", "lower")
    if baseline:
        figures["time ratio"] = records.figure([wall / first for (wall, _), (first, _) in zip(times, baseline)], "×", "lower")
        if device.type == "cpu":
            ratios = [mine / first for (_, mine), (_, first) in zip(times, baseline) if first]
            if ratios:
                figures["processor time ratio"] = records.figure(ratios, "×", "lower")
    if device.type == "cpu":
        figures["processor time"] = records.figure([1e3 * processor for _, processor in times], "ms", "lower")
    half = name.startswith("linear")  # it does not do these operations
    if rates and not half:
        figures["rate"] = records.figure([case.flops / wall / 1e12 for wall in walls], "TFLOP/s", "higher")
        shares = [100 * case.flops / wall / rate for wall, rate in zip(walls, rates[MATRIX])]
        figures["share of the matrix rate"] = records.figure(shares, "%", "higher")
        figures["time, of the floor"] = records.figure([100 / share for share in shares], "×", "lower")
    if rates:
        figures[MATRIX] = records.figure([rate / 1e12 for rate in rates[MATRIX]], "TFLOP/s")
        figures[COPY] = records.figure([rate / 1e9 for rate in rates[COPY]], "GB/s")
    if extra is not None:
        figures["extra memory"] = records.figure(extra / 2**20, "MiB", "lower")
    details = {
        "first": next(iter(samples)),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "temperatures": [STUDENT_TEMP, TEACHER_TEMP],
        "half of the problem": half,
    }
    if name == TUNED:
        from massl_fast.kernels.fused import tuned_milliseconds  # imports Triton

        details["tuner"] = [[shape, {str(choice): ms for choice, ms in times.items()}] for shape, times in tuned_milliseconds()]
    return records.record("kernels", asdict(case) | {"variant": name, "device": device.type}, figures, details)


def _print(row: dict, name: str) -> None:
    figures = row["figures"]

    def value(key: str, form: str, width: int) -> str:
        return f"{format(figures[key]['median'], form) if key in figures else '–':>{width}}"

    error = "/".join(f"{figures[key]['median']:.1e}" for key in ("error of the sum", "error") if key in figures)
    cells = (
        ("time ratio", ".3f", 9),
        ("processor time ratio", ".2f", 8),
        ("rate", ".3f", 9),
        ("share of the matrix rate", ".0f", 8),
        ("time, of the floor", ".2f", 9),
        ("extra memory", ".1f", 11),
    )
    texts = [value(*cell) for cell in cells]
    texts.insert(2, f"{error:>18}")
    spread = spread_percent(figures["time"]["samples"])
    print(f"  {name:<30}{value('time', '.4f', 11)}{spread:>7.0f}%" + "".join(texts), flush=True)


def _scientific(values: Sequence[float]) -> str:
    return "/".join(f"{value:.1e}" for value in values)
