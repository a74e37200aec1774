"""What a training will take on machines that are not here: step time, efficiency, memory and GPU hours for 8 to 512 GPUs.

    python bench/planning.py                          the tables of docs/scaling.md and bench/notes/scaling.md
    python bench/planning.py --model vit_small --gpu H100 --images-per-second 1800 --launch-seconds 0.02

Everything here is arithmetic on figures from elsewhere, and what comes out is a prediction. Sources of the figures stand beside them; a
rate measured on one GPU replaces the assumption (``--images-per-second``).

A step = computing + what of the exchange of gradients outlasts the backward pass + gathering the rows for the memory + one small sum:

    computing        max(launches, images / rate + 60 bytes per parameter of optimizer and moving average / memory bandwidth)
    gradients        hierarchical ring: reduce-scatter and all-gather of S bytes among the g GPUs of a host, all-reduce of S/g among m hosts
                     2·S·(g−1)/g / link + 2·(S/g)·(m−1)/m / network + latency · 2·(g−1 + m−1)
    memory rows      all-gather of G·D·4 bytes: what does not lie here already, over the slower of link and network

Gradients travel while the backward pass runs, but for the last bucket, which waits for its end.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from massl_fast.hardware import GPUS, Gpu

GIB, MIB = 2**30, 2**20
IMAGENET_IMAGES = 1_281_167
EMBEDDING_DIM = 256
GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512)
BUCKET_BYTES = 25 * MIB
"""Gradients that DistributedDataParallel sends at once (its default)."""

# Assumptions. Nothing of them was measured with this software yet.
UTILIZATION = 0.35
"""Assumed share of the matrix units' peak that one GPU reaches. Published for comparison: CAPI reports 58% on A100 (its README)."""
LAUNCH_SECONDS = 0.025
"""Assumed time in which the host launches the kernels of a step; no step is shorter."""
REACHED = 0.7
"""Assumed share of a link's published rate that a collective reaches."""
LATENCY_SECONDS = 10e-6
"""Assumed time of one message between neighbours of a ring."""
BACKWARD_SHARE = 0.6
"""Share of computing that is the student's backward pass: two of three parts of the student's work, beside the teacher's forward pass."""
UPDATE_BYTES = 60
"""Bytes per parameter that clipping (12), AdamW (28) and the moving average (20) read and write in float32."""
CONTEXT_BYTES = 2 * GIB
"""Assumed for what is neither tensor nor allocator: CUDA context, NCCL's buffers, the loader's pool."""


@dataclass(frozen=True)
class Network:
    """A student with its head (2048, 2048, 256)."""

    name: str
    parameters: int
    flops_per_image: float
    """Of a whole step with 2 × 224 + 10 × 96 px and a memory of 65536 (engine.flops.step_flops)."""
    bytes_per_image: float
    """Activations and crops a step keeps per image of a micro-batch, bf16: slope of ``massl-fast profile memory --estimate``."""
    workspace_bytes: float
    """Of that estimate what neither grows with the batch nor is weights, optimizer state or memory."""


NETWORKS = {
    "vit_small": Network("ViT-S/16", 27_175_040, 1.147e11, 131 * MIB, 0.1 * GIB),
    "vit_base": Network("ViT-B/16", 92_094_464, 4.406e11, 259 * MIB, 0.2 * GIB),
    "vit_large": Network("ViT-L/16", 310_121_728, 1.604e12, 701 * MIB, 0.3 * GIB),
}


HOST_GPUS = 8


@dataclass(frozen=True)
class Cluster:
    """``gpus`` of one kind, eight a host; ``images_per_second`` is of one GPU with a full batch. No step is below ``launch_seconds``."""

    gpu: Gpu
    gpus: int
    images_per_second: float
    launch_seconds: float = LAUNCH_SECONDS

    @property
    def per_host(self) -> int:
        return min(self.gpus, HOST_GPUS)

    @property
    def hosts(self) -> int:
        return math.ceil(self.gpus / HOST_GPUS)


@dataclass(frozen=True)
class Step:
    """Seconds of one step; communication is what computing does not hide."""

    computing: float
    gradients_sent: float
    gradients_waited: float
    memory_rows: float
    small_sum: float
    images: int

    @property
    def seconds(self) -> float:
        return self.computing + self.gradients_waited + self.memory_rows + self.small_sum

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def assumed_rate(network: Network, gpu: Gpu, utilization: float = UTILIZATION) -> float:
    """Images per second of one GPU at an assumed share of its peak."""
    return utilization * gpu.peak_flops / network.flops_per_image


def all_gather_seconds(cluster: Cluster, size: float) -> float:
    """``size`` bytes, of which each GPU holds its part, to all: from the other hosts over the network, then within the host."""
    g, m = cluster.per_host, cluster.hosts
    within = size * (g - 1) / g / (REACHED * cluster.gpu.link)
    between = (size / g) * (m - 1) / m / (REACHED * cluster.gpu.network)
    return within + between + LATENCY_SECONDS * (g - 1 + m - 1)


def all_reduce_seconds(cluster: Cluster, size: float) -> float:
    """A sum of ``size`` bytes over all GPUs, by rings within hosts and between them: what is scattered while it is summed is gathered."""
    return 2 * all_gather_seconds(cluster, size)


def ddp_step(network: Network, cluster: Cluster, global_batch: int) -> Step:
    """One step with DistributedDataParallel, gradients in float32."""
    updating = UPDATE_BYTES * network.parameters / cluster.gpu.bandwidth
    computing = max(cluster.launch_seconds, global_batch / cluster.gpus / cluster.images_per_second + updating)
    size = 4 * network.parameters
    buckets = math.ceil(size / BUCKET_BYTES)
    # Each bucket is a collective of its own with latencies of its own.
    sent = all_reduce_seconds(cluster, size) + (buckets - 1) * all_reduce_seconds(cluster, 0)
    last = all_reduce_seconds(cluster, min(size, BUCKET_BYTES))
    return Step(
        computing=computing,
        gradients_sent=sent,
        gradients_waited=max(last, sent - BACKWARD_SHARE * computing),
        memory_rows=all_gather_seconds(cluster, 4 * global_batch * EMBEDDING_DIM),
        small_sum=all_reduce_seconds(cluster, 40),
        images=global_batch,
    )


def fsdp2_step(network: Network, cluster: Cluster, global_batch: int) -> Step:
    """One step sharded over all GPUs: student gathered twice and teacher once in 16 bits, gradients reduced once in float32.

    Gathering runs one block ahead of computing, so the whole computing time hides it but for one block at the start and one at the end;
    blocks are taken as twelve equal ones.
    """
    ddp = ddp_step(network, cluster, global_batch)
    size = 2 * network.parameters
    sent = 3 * all_gather_seconds(cluster, size) + all_gather_seconds(cluster, 2 * size)  # a reduce-scatter costs what an all-gather does
    sent += 4 * 11 * all_gather_seconds(cluster, 0)
    return replace(ddp, gradients_sent=sent, gradients_waited=max(sent / 12, sent - ddp.computing))


def efficiency(step: Step, cluster: Cluster) -> float:
    """Images per second beside those of as many GPUs working alone with full batches."""
    return step.images_per_second / (cluster.gpus * cluster.images_per_second)


def hours(step: Step, epochs: float, images: int = IMAGENET_IMAGES) -> float:
    """Wall clock of a training, without evaluations and restarts."""
    return epochs * (images // step.images) * step.seconds / 3600


def matters_from(steps: dict[int, Step], part: str, share: float = 0.05) -> int | None:
    """The smallest number of GPUs at which ``part`` takes more than ``share`` of the step; None: at none of them."""
    return next((gpus for gpus, step in steps.items() if getattr(step, part) > share * step.seconds), None)


def state_bytes(network: Network, shards: int = 1) -> float:
    """Student, teacher, gradients and AdamW's moments in float32, 20 bytes per parameter, and the 4 of the moving average's temporary."""
    return 24 * network.parameters / shards


def largest_memory(network: Network, gpu: Gpu, images: int) -> int:
    """Entries K that fit beside a micro-batch of ``images``, unsharded: 16-bit rows, their permuted copy and 4 bytes of partition each."""
    free = gpu.bytes - CONTEXT_BYTES - state_bytes(network) - network.workspace_bytes - images * network.bytes_per_image
    return max(0, int(free // (2 * 2 * EMBEDDING_DIM + 4)))


def largest_batch(network: Network, gpu: Gpu, memory_size: int = 65536, shards: int = 1) -> int:
    """Images of a micro-batch that fit."""
    gathered = 0 if shards == 1 else 4 * network.parameters / 12  # two blocks of twelve at a time, 16 bits
    fixed = CONTEXT_BYTES + state_bytes(network, shards) + gathered + network.workspace_bytes + memory_size * (4 * EMBEDDING_DIM + 4)
    return max(0, int((gpu.bytes - fixed) // network.bytes_per_image))


def largest_parameters(gpu: Gpu, shards: int = 1, images: int = 1) -> float:
    """Parameters of the largest ViT that takes a step with ``images`` images; activations grow from ViT-L's by the power 2/3.

    Depth and width grow together, parameters with depth · width², activations with depth · width.
    """
    base = NETWORKS["vit_large"]

    def fits(parameters: float) -> bool:
        activations = base.bytes_per_image * (parameters / base.parameters) ** (2 / 3)
        other = replace(base, parameters=int(parameters), bytes_per_image=activations)
        return largest_batch(other, gpu, shards=shards) >= images

    low, high = 1e6, 1e13
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# Tables

COLUMNS = (
    "GPUs", "images per GPU", "computing ms", "exchange sent ms", "waited for ms", "memory rows ms", "step ms", "images/s", "efficiency",
    "100 epochs", "GPU hours", "800 epochs", "GPU hours",
)  # fmt: skip
STRATEGIES = {"ddp": ddp_step, "fsdp2": fsdp2_step}


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *map(list, rows))]


def scaling_table(
    network: Network, gpu: Gpu, rate: float, launch: float, global_batch: int | None, strategy: str = "ddp", per_gpu: int = 64
) -> list[str]:
    """Strong scaling at ``global_batch``, or weak scaling at ``per_gpu`` images per GPU where it is None."""
    rows, steps = [], {}
    for gpus in GPU_COUNTS:
        cluster = Cluster(gpu, gpus, rate, launch)
        batch = global_batch or per_gpu * gpus
        if batch < gpus:
            continue
        step = steps[gpus] = STRATEGIES[strategy](network, cluster, batch)
        times = (step.computing, step.gradients_sent, step.gradients_waited, step.memory_rows, step.seconds)
        costs = [text for epochs in (100, 800) for text in (f"{hours(step, epochs):.1f} h", f"{gpus * hours(step, epochs):,.0f}")]
        share = f"{100 * efficiency(step, cluster):.0f}%"
        rows.append([str(gpus), str(batch // gpus), *(f"{1000 * t:.2f}" for t in times), f"{step.images_per_second:,.0f}", share, *costs])
    notes = []
    for part, words in {"gradients_waited": "waiting for the exchange", "memory_rows": "gathering rows for the memory"}.items():
        first = matters_from(steps, part)
        notes.append(f"{words} takes more than 5% of a step {'at none of these sizes' if first is None else f'from {first} GPUs on'}")
    return [*_table(COLUMNS, rows), "", f"Predicted: {'; '.join(notes)}."]


def capacity_table() -> list[str]:
    small, base, large = NETWORKS.values()
    header = [
        "GPU", "images: ViT-S", "ViT-B", "ViT-L", "ViT-L, fsdp2 on 8", "memory entries beside ViT-S, 32 images", "largest ViT, ddp",
        "fsdp2 on 8",
    ]  # fmt: skip
    rows = [
        [
            gpu.name,
            *(str(largest_batch(network, gpu)) for network in (small, base, large)),
            str(largest_batch(large, gpu, shards=8)),
            f"{largest_memory(small, gpu, images=32) / 1e6:.0f} million",
            f"{largest_parameters(gpu) / 1e9:.1f} billion",
            f"{largest_parameters(gpu, shards=8) / 1e9:.1f} billion",
        ]
        for gpu in GPUS.values()
    ]
    return _table(header, rows)


DINO_ON_V100 = 92.0
"""Images per second of one V100 with DINO's code: 24.2 h for 100 epochs of ViT-S/16 with 2 × 224 + 10 × 96 px on 16 of them (Caron et al.
2021, table 8)."""
CASES = (
    # network, GPU, global batch or None for 64 images per GPU, strategy, images per second or None for the assumed share of the peak
    ("vit_small", "V100-32", 1024, "ddp", DINO_ON_V100),
    ("vit_small", "H100", 1024, "ddp", None),
    ("vit_base", "A100-80", 1024, "ddp", None),
    ("vit_base", "H100", None, "ddp", None),
    ("vit_large", "A100-80", 1024, "ddp", None),
    ("vit_large", "A100-80", 1024, "fsdp2", None),
)


SUMMARY_COUNTS = (8, 64, 512)


def summary() -> str:
    """The tables of docs/scaling.md: all cases at a few numbers of GPUs, and what fits."""
    rows = []
    for key, name, batch, strategy, rate in CASES:
        network, gpu = NETWORKS[key], GPUS[name]
        row = [network.name, name, str(batch) if batch else "64 per GPU", strategy]
        for gpus in SUMMARY_COUNTS:
            cluster = Cluster(gpu, gpus, rate or assumed_rate(network, gpu), LAUNCH_SECONDS)
            step = STRATEGIES[strategy](network, cluster, batch or 64 * gpus)
            row.append(f"{step.images_per_second:,.0f} ({100 * efficiency(step, cluster):.0f}%), {hours(step, 100):.1f} h")
        rows.append(row)
    header = ["network", "GPU", "global batch", "strategy", *(f"{gpus} GPUs" for gpus in SUMMARY_COUNTS)]
    return "\n".join([*_table(header, rows), "", "## What fits", "", *capacity_table()]) + "\n"


def report() -> str:
    """The tables of bench/notes/scaling.md."""
    lines: list[str] = []
    for key, name, batch, strategy, rate in CASES:
        network, gpu = NETWORKS[key], GPUS[name]
        origin = "published for DINO's code" if rate else f"assumed: {100 * UTILIZATION:.0f}% of its peak"
        rate = rate or assumed_rate(network, gpu)
        lines += [
            f"## {network.name}, {name}, {f'global batch {batch}' if batch else '64 images per GPU'}, {strategy}",
            "",
            f"Inputs: one GPU takes {rate:,.0f} images/s ({origin}); no step below {1000 * LAUNCH_SECONDS:.0f} ms (assumed).",
            "",
            *scaling_table(network, gpu, rate, LAUNCH_SECONDS, batch, strategy),
            "",
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python bench/planning.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=NETWORKS, help="one table instead of those of the pages")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.add_argument("--images-per-second", type=float, help="measured on one GPU (default: assumed from its peak)")
    parser.add_argument("--launch-seconds", type=float, default=LAUNCH_SECONDS, help="measured with one image per step (default: assumed)")
    parser.add_argument("--global-batch", type=int, default=1024, help="0: 64 images per GPU (default: 1024)")
    args = parser.parse_args(arguments)
    if args.model is None:
        print(summary(), report(), sep="\n", end="")
        return
    network, gpu = NETWORKS[args.model], GPUS[args.gpu]
    rate = args.images_per_second or assumed_rate(network, gpu)
    print("\n".join(scaling_table(network, gpu, rate, args.launch_seconds, args.global_batch or None, args.strategy)))


if __name__ == "__main__":
    main()
