"""The cases of ``massl-fast bench kernels`` under pytest-benchmark: ``pytest bench/bench_kernels.py``.

Small shapes, on the GPU where there is one. Comparisons with peers in interleaved rounds, errors and memory are the command's.
"""

import pytest
import torch

from massl_fast.benchmarks import kernels
from massl_fast.benchmarks.beside import errors_in
from massl_fast.benchmarks.kernels import Case, excess, make_inputs, variants

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [Case(operation, 12, 2, 8, 256, 8192, 2048, "float32") for operation in ("loss", "readout", "enqueue", "partition")]
PAIRS = [(case, name) for case in CASES for name in variants(case, DEVICE, compiled=False)[0]]


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=[f"{case.operation}-{name.replace(' ', '_')}" for case, name in PAIRS])
def test_kernel(benchmark, case, name):
    """One call, the device's work included; what errs gets no time."""
    calls, _ = variants(case, DEVICE, compiled=False)
    found, failed = errors_in(kernels, case, {key: calls[key] for key in {name, "reference"} & calls.keys()}, DEVICE)
    if name in failed:
        pytest.skip(failed[name])
    assert name not in excess(case, found)
    inputs = make_inputs(case, 0, DEVICE)

    def call():
        calls[name](inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["errors"] = found[name]
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
