"""The kernels on this device against float64, before anything is timed.

The cases are those that a kernel gets wrong when it is wrong: few and odd numbers of images, widths that no tile divides, memories that the
block does not divide, blocks of odd length, every dtype, and the sizes of a training run. A result may err twice as much as the published
computation in the same precision does (benchmarks.kernels.excess).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from massl_fast import records
from massl_fast.benchmarks import kernels
from massl_fast.benchmarks.beside import DTYPES, OURS, errors_in
from massl_fast.benchmarks.kernels import Case

PEERS = ("reference", "randperm", "plain PyTorch")


def check(case: Case, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]], dict[str, str]]:
    """Every variant of ours and the reference on one case: (records, why variants are WRONG or FAILED, why others are absent)."""
    calls, missing = kernels.variants(case, device, compiled=False)
    calls = {name: call for name, call in calls.items() if not case.flops or name in ("reference", *OURS)}
    found, failed = errors_in(kernels, case, calls, device)
    rows = []
    for variant, errors in found.items():
        figures = {"error": records.figure(errors[-1], "relative" if case.flops else "absolute", exact=True)}
        rows.append(records.record("correctness", asdict(case) | {"variant": variant, "device": device.type}, figures))
    absent = {f"{variant} on {case.dtype}": why for variant, why in missing.items() if variant in OURS}
    return rows, {"WRONG": kernels.excess(case, found), "FAILED": failed}, absent


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Case(operation, V, T, N, D, K, block, dtype): odd ones for every dtype, then those of a run."""
    dtypes = list(DTYPES) if device.type == "cuda" else ["float32", "bfloat16"]
    found = []
    for dtype in dtypes:
        for shape in (
            (4, 2, 3, 32, 96, 32),  # less than any tile
            (3, 2, 7, 100, 1000, 250),  # a width between two powers of two, blocks of no multiple of 16
            (12, 2, 5, 256, 4099, 1024),  # a remainder of three entries sits out
            (2, 1, 1, 512, 640, 640),  # one block, one image, the widest rows
            (12, 2, 33, 192, 6144, 2048),
        ):
            found.append(Case("loss", *shape, dtype))
            found.append(Case("readout", *shape, dtype))
    found += [Case("enqueue", 12, 2, images, 256, 1000, 250, dtypes[-1]) for images in (1, 64, 999)]
    found += [Case("partition", 12, 2, 1, 32, entries, 1, "float32") for entries in (1, 2, 1000, 65536)]
    if not quick and device.type == "cuda":
        for dtype in ("bfloat16", "float16", "float32"):
            found.append(Case("loss", 12, 2, 64, 256, 65536, 16384, dtype))
        found.append(Case("loss", 12, 2, 64, 256, 131072, 16384, "bfloat16"))
        found.append(Case("readout", 12, 2, 256, 256, 65536, 16384, "bfloat16"))
        found.append(Case("partition", 12, 2, 1, 256, 131072, 16384, "bfloat16"))
    return found
