"""Calls of one case beside their peers: times in turn, extra memory, and what the machine does at best, as records and lines.

A call (or a few) of each takes its turn in every round, so that what else the machine does meets all of them; times are medians over the
rounds, ratios medians of each round's ratio. Inputs rotate over several copies. The rate of a large matrix product and the bandwidth of a
copy are measured in the same rounds; the floor is a call's operations at that rate.

Extra memory is what a second call needs beyond its inputs, results included. GPU: peak of PyTorch's allocator. CPU: growth of the
resident set's high-water mark (VmHWM, reset through /proc/self/clear_refs) during the call, in a process of its own for each;
scratch memory of the matrix library and of threads is in it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from massl_fast import records
from massl_fast.benchmarks.intervals import spread_percent
from massl_fast.benchmarks.timing import in_turn, matrix_product, timed
from massl_fast.kernels.backends import triton_obstacle
from massl_fast.profiling.profiler import peak_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TUNED = "triton, tuned"
"""Stands in for triton where the tuner is on (MASSL_FAST_AUTOTUNE=1)."""
OURS = ("triton", "streaming", TUNED)
MATRIX, COPY = "matrix product", "copy"
COPIES = 3  # of the inputs
GRAPH = ", graph"

Inputs = dict[str, Tensor]
Results = tuple[Tensor, ...]
Call = Callable[[Inputs], Results]
Samples = list[tuple[float, float]]
"""(wall, processor) seconds of a call in each round; on a GPU wall is by its events."""


class Cases(Protocol):
    """What a module gives of its cases, which are dataclasses with a dtype: benchmarks.kernels and benchmarks.objectives."""

    KIND: str  # of the records
    ERRORS: tuple[str, str]  # their figures: of the first error, and of the largest of the others; of a single one error
    DETAILS: dict[str, Any]  # what else they hold
    GRAPHED: Sequence[str]  # variants that are timed as CUDA graphs as well

    def make_inputs(self, case: Any, seed: int, device: torch.device) -> Inputs: ...
    def variants(self, case: Any, device: torch.device, compiled: bool) -> tuple[dict[str, Call], dict[str, str]]: ...
    def truth(self, case: Any, inputs: Inputs) -> Results: ...
    def errors_of(self, case: Any, name: str, inputs: Inputs, results: Results, truth: Results) -> tuple[float, ...]: ...
    def excess(self, case: Any, found: dict[str, tuple[float, ...]]) -> dict[str, str]: ...
    def operations_of(self, case: Any, name: str, call: Call, inputs: Inputs) -> float: ...  # 0 where they are not counted


def measure(
    bench: Cases, case: Any, rounds: int, device: torch.device, wanted: Sequence[str] = (), compiled: bool = False
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A record per variant of a case, printed as they come, and what was wrong, which gets no time. Case and variant identify a record.

    ``wanted``: words of the names of variants to take, baselines always.
    """
    print(f"\n{case}")
    calls, missing = bench.variants(case, device, compiled)
    first = next(iter(calls))
    calls = {name: call for name, call in calls.items() if not wanted or name in (first, "reference") or any(w in name for w in wanted)}
    errors, failed = errors_in(bench, case, calls, device)
    wrong = bench.excess(case, errors)
    calls = {name: call for name, call in calls.items() if name in errors and name not in wrong}
    copies = [bench.make_inputs(case, seed, device) for seed in range(COPIES)]
    if device.type == "cuda":
        replays, differing = graphs({name: call for name, call in calls.items() if name in bench.GRAPHED}, copies)
        wrong |= differing
        calls |= replays
    for word, reasons in (("not measured", missing | failed), ("WRONG", wrong)):
        for name, why in reasons.items():
            print(f"  {name:<30} {word}: {why}")
    operations = {name: bench.operations_of(case, name, call, copies[0]) for name, call in calls.items() if not name.endswith(GRAPH)}
    operations |= {name: operations[name.removesuffix(GRAPH)] for name in calls if name.endswith(GRAPH)}
    counted = any(operations.values())
    machine, work = machine_calls(DTYPES[case.dtype], device) if counted else ({}, {})
    samples = time_variants(calls | machine, copies, rounds, device)
    rates = {name: [amount / wall for wall, _ in samples[name]] for name, amount in work.items()}
    if rates:
        print(f"  {MATRIX} {median(rates[MATRIX]) / 1e12:.3f} TFLOP/s, {COPY} {median(rates[COPY]) / 1e9:.1f} GB/s")
    print("  " + f"{'':<30}" + "".join(f"{head:>{width}}" for head, width, _ in COLUMNS))
    rows = []
    for name in calls:
        figures = figures_of(samples[name], samples[next(iter(calls))], rates, operations[name], device)
        error, *others = errors[name.removesuffix(GRAPH)]
        for figure, value in zip(bench.ERRORS, (error, max(others))) if others else [("error", error)]:
            figures[figure] = records.figure(value, "relative" if counted else "absolute", "lower")
        if counted and not name.endswith(GRAPH):
            extra, results = extra_bytes(
                functools.partial(prepared, bench.variants, bench.make_inputs, case, name, compiled, device), device
            )
            figures["extra memory"] = records.figure(extra / 2**20, "MiB", "lower")
            figures["results"] = records.figure(results / 2**20, "MiB", exact=True)
        about = {"first": next(iter(calls)), "threads": torch.get_num_threads(), "rounds": rounds, "operations": operations[name]}
        if name == TUNED:
            from massl_fast.kernels.fused import tuned_milliseconds  # imports Triton

            about["tuner"] = [[shape, {str(choice): ms for choice, ms in times.items()}] for shape, times in tuned_milliseconds()]
        of = asdict(case) | {"variant": name, "device": device.type}
        rows.append(records.record(bench.KIND, of, figures, about | bench.DETAILS))
        print(f"  {name:<30}" + "".join(f"{cell(figures):>{width}}" for _, width, cell in COLUMNS), flush=True)
    return rows, wrong


def errors_in(bench: Cases, case: Any, calls: dict[str, Call], device: torch.device) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Errors of each variant against float64, and why a variant could not run."""
    truth = bench.truth(case, bench.make_inputs(case, 0, device))
    found, failed = {}, {}
    for name, call in calls.items():
        inputs = bench.make_inputs(case, 0, device)  # which a call may change
        try:
            found[name] = bench.errors_of(case, name, inputs, call(inputs), truth)
        except torch.cuda.OutOfMemoryError:
            failed[name] = "it does not fit the GPU's memory"
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failed[name] = " ".join(str(error).split())[:200]
    return found, failed


def prepared(variants: Callable[..., Any], make_inputs: Callable[..., Any], case: Any, name: str, compiled: bool, device: torch.device):
    return variants(case, device, compiled)[0][name], make_inputs(case, 0, device)


def unit_rows(case: Any, generator: torch.Generator, *shape: int) -> Tensor:
    """Random rows [*shape, D] of length 1 in a case's dtype."""
    rows = torch.randn(*shape, case.D, device=generator.device, generator=generator)
    return F.normalize(rows, dim=-1).to(DTYPES[case.dtype])


def differentiate(inputs: Inputs, function: Callable[[Inputs], Tensor], names: Sequence[str]) -> tuple[Tensor, ...]:
    """The loss, or what else the function gives, and its gradients with respect to the inputs named."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    loss = function(inputs | leaves)
    return loss.detach(), *(torch.autograd.grad(loss, list(leaves.values())) if names else ())


def without_triton(device: torch.device, dtype: str, width: int, *operation: str) -> dict[str, str]:
    """Why Triton computes no such case here, by the variant's name; empty where it does."""
    if device.type != "cuda":
        return {"triton": "it needs a GPU, and there is none here"}
    obstacle = triton_obstacle(device, DTYPES[dtype], width, *operation)
    return {"triton": obstacle.removesuffix(".")} if obstacle else {}


def too_wrong(found: Mapping[str, Sequence[float]], ours: Sequence[str], allowed: Sequence[float], whose: str) -> dict[str, str]:
    """Which of our variants err more than twice as much as others do, and by how much."""
    return {
        name: f"errors {scientific(found[name])}, more than the {scientific(allowed)} that twice the {whose}"
        for name in ours
        if name in found and any(error > most for error, most in zip(found[name], allowed))
    }


def figures_of(times: Samples, first: Samples, rates: dict[str, list[float]], operations: float, device: torch.device) -> dict[str, Any]:
    walls = [wall for wall, _ in times]
    figures = {"time": records.figure([1e3 * wall for wall in walls], "ms", "lower")}
    figures["time ratio"] = records.figure([mine / theirs for mine, (theirs, _) in zip(walls, first)], "×", "lower")
    if device.type == "cpu":
        figures["processor time"] = records.figure([1e3 * processor for _, processor in times], "ms", "lower")
        if ratios := [mine / theirs for (_, mine), (_, theirs) in zip(times, first) if theirs]:
            figures["processor time ratio"] = records.figure(ratios, "×", "lower")
    if rates and operations:
        shares = [100 * operations / wall / rate for wall, rate in zip(walls, rates[MATRIX])]
        figures["rate"] = records.figure([operations / wall / 1e12 for wall in walls], "TFLOP/s", "higher")
        figures["share of the matrix rate"] = records.figure(shares, "%", "higher")
        figures["time, of the floor"] = records.figure([100 / share for share in shares], "×", "lower")
    if rates:
        figures[MATRIX] = records.figure([rate / 1e12 for rate in rates[MATRIX]], "TFLOP/s")
        figures[COPY] = records.figure([rate / 1e9 for rate in rates[COPY]], "GB/s")
    return figures


def _cell(name: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: format(figures[name]["median"], form) if name in figures else "–"


COLUMNS: tuple[tuple[str, int, Callable[[dict[str, Any]], str]], ...] = (
    ("ms", 11, _cell("time", ".4f")),
    ("spread", 8, lambda figures: f"{spread_percent(figures['time']['samples']):.0f}%"),
    ("× first", 9, _cell("time ratio", ".3f")),
    ("× CPU", 8, _cell("processor time ratio", ".3f")),
    ("errors", 18, lambda figures: scientific([value["median"] for name, value in figures.items() if name.startswith("error")])),
    ("TFLOP/s", 9, _cell("rate", ".3f")),
    ("% rate", 8, _cell("share of the matrix rate", ".0f")),
    ("× floor", 9, _cell("time, of the floor", ".2f")),
    ("extra MiB", 11, _cell("extra memory", ".1f")),
    ("results", 9, _cell("results", ".1f")),
)


def scientific(values: Sequence[float]) -> str:
    return "/".join(f"{value:.1e}" for value in values)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The largest error relative to the largest value."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


# Time


def time_variants(calls: dict[str, Call], copies: Sequence[Any], rounds: int, device: torch.device) -> dict[str, Samples]:
    def turns(call: Call, repeats: int) -> Callable[[], None]:
        inputs = itertools.cycle(copies)

        def turn() -> None:
            for _ in range(repeats):
                call(next(inputs))

        return turn

    repeats = {}
    for name, call in calls.items():
        call(copies[0])
        # A clock's resolution and a launch's latency vanish in 2 ms; no more calls than that, to keep rounds short.
        repeats[name] = max(1, min(200, int(2e-3 / max(timed(lambda: call(copies[-1]), device)[0], 1e-6))))  # noqa: B023
    found = in_turn({name: turns(call, repeats[name]) for name, call in calls.items()}, rounds, device)
    return {name: [(wall / repeats[name], processor / repeats[name]) for wall, processor in times] for name, times in found.items()}


def machine_calls(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Call], dict[str, float]]:
    """A large matrix product and a large copy, and the operations or bytes of a call of each."""
    product, operations = matrix_product(dtype, device)
    source = torch.zeros((2**30 if device.type == "cuda" else 2**27), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    calls: dict[str, Call] = {MATRIX: lambda inputs: (product(),), COPY: lambda inputs: (target.copy_(source),)}
    return calls, {MATRIX: operations, COPY: 2.0 * source.numel()}


# CUDA graphs


def graphed(call: Call, copies: Sequence[Any]) -> Call:
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

    def replay(inputs: Any) -> tuple[Tensor, ...]:
        graph, results = recorded[id(inputs)]
        graph.replay()
        return results

    return replay


def graphs(calls: dict[str, Call], copies: Sequence[Any]) -> tuple[dict[str, Call], dict[str, str]]:
    """CUDA graphs of variants, and which of them give something else than the call itself."""
    found, differing = {}, {}
    for name, call in calls.items():
        replay = graphed(call, copies)
        if all(torch.equal(one, other) for inputs in copies for one, other in zip(call(inputs), replay(inputs))):
            found[name + GRAPH] = replay
        else:
            differing[name + GRAPH] = "its results are not those of the call without a graph"
    return found, differing


# Memory


def extra_bytes(prepare: Callable[[], tuple[Call, Any]], device: torch.device) -> tuple[int, int]:
    """(what a second call needs beyond its inputs, what of it are results). ``prepare``, which another process can be given, makes the call
    and its inputs."""
    if device.type == "cpu":
        # Spawned, so that nothing of this process's pools is reused.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            return executor.submit(_growth, prepare, torch.get_num_threads()).result()
    call, inputs = prepare()
    call(inputs)
    results: list[tuple[Tensor, ...]] = []
    return peak_bytes(lambda: results.append(call(inputs)), device), _bytes(results[0])


def _growth(prepare: Callable[[], tuple[Call, Any]], threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    call, inputs = prepare()
    call(inputs)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the first call freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    results = call(inputs)
    return max(0, _status("VmHWM") - before), _bytes(results)


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _bytes(results: tuple[Tensor, ...]) -> int:
    return sum(r.untyped_storage().nbytes() for r in results)
