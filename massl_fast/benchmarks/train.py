"""The loader alone, the model alone, and both together; then in words what bounds the run and what to try.

Loader and step are those of ``massl-fast train`` with the same settings. The three are measured one after the other in one process, each in
windows whose rates are the samples of the record. ``data wait`` is the share of the time of both together in which the host waited for
images.
"""

from __future__ import annotations

from dataclasses import dataclass

from massl_fast.benchmarks.timing import windows
from massl_fast.config import Config
from massl_fast.data.loader import Loader
from massl_fast.distributed.world import World
from massl_fast.extras import importable
from massl_fast.hardware import synchronize
from massl_fast.models.precision import Precision
from massl_fast.profiling.synthetic import micro_batches_of, synthetic_run
from massl_fast.run.outputs import WindowClock

KINDS = {"loader": "loader alone", "model": "model alone", "together": "together"}
WAITING = 0.10
"""Share of waiting from which on the loader is said to bound a run."""
TOGETHER = 0.85
"""Below this share of the slower of the two alone, they are said to get in each other's way."""
FAR_AHEAD = 3
"""A loader that many times faster than the model takes too little of shared cores to matter."""


def measure(config: Config, world: World, precision: Precision, loader: Loader, seconds: float) -> dict[str, list[float]]:
    """Images per second of each window of loader, model and both together; shares of time spent waiting for images."""
    device = world.device
    accumulation, batch = micro_batches_of(config)
    synthetic = synthetic_run(config, world, precision, device_batch=batch, accumulation=accumulation)
    batches = loader.batches(0)
    clock = WindowClock()
    waited: list[float] = []

    def load() -> None:
        for _ in range(accumulation):
            next(batches)

    def together() -> None:
        with clock.waiting():
            micro_batches = [next(batches).crops for _ in range(accumulation)]
        synthetic.step(micro_batches)

    def end_of_window() -> None:
        waited.append(clock.read()[1])
        clock.restart()

    # What lies ready before the clock starts would be counted as made: with workers, some batches.
    for _ in range(2 * loader.num_workers + 2):
        next(batches)
    loaded = windows(load, seconds, device)
    for _ in range(2):
        synthetic.step()
    trained = windows(synthetic.step, seconds, device)
    for _ in range(loader.num_workers + 2):  # what lay ready while the model ran alone
        together()
    synchronize(device)
    clock.restart()
    both = windows(together, seconds, device, end_of_window)
    rates = {
        name: [accumulation * batch * count / took for count, took in found]
        for name, found in (("loader", loaded), ("model", trained), ("together", both))
    }
    return rates | {"waited": waited}


@dataclass(frozen=True)
class Situation:
    """What a verdict rests on; rates in images per second."""

    loader: float
    model: float
    together: float
    waited: float
    on_gpu: bool
    loader_name: str
    workers: int
    cores: int
    compiled: bool
    precision: str
    decode: str
    augment: str


def verdict(s: Situation) -> list[str]:
    """What bounds the run, as a sentence, and what to try, one line each."""
    slower, ours, gpu_augments = min(s.loader, s.model), s.loader_name == "torchvision", s.loader_name == "dali" and s.augment == "gpu"
    smaller = "Try smaller files: images scaled once to about 1.5 times the global crop decode in a fraction of the time."
    if not s.on_gpu and s.together < TOGETHER * slower and s.loader < FAR_AHEAD * s.model:
        head = (
            f"Loader and model share {s.cores} core{'s' if s.cores > 1 else ''}: together they make {s.together:.0f} images/s, less than "
            f"either alone ({s.loader:.0f} and {s.model:.0f})."
        )
        tries = [
            (s.workers > 1, f"Try --data.num_workers {max(1, s.workers // 2)}: fewer of the cores taken from the model."),
            (True, smaller),
            (True, "On a GPU the loader would have the cores to itself."),
        ]
    elif s.waited >= WAITING:
        reach = f"alone it makes {s.loader:.0f} images/s, the model could take {s.model:.0f}"
        head = f"The loader bounds this run: steps wait for images {100 * s.waited:.0f} % of the time; {reach}."
        idle, more, dali = s.workers < s.cores - 1, f"Try --data.num_workers {s.cores - 1}:", importable("nvidia.dali")
        extra = "pip install 'massl-fast[dali-cuda13]' (or [dali-cuda12])"
        tries = [
            (ours and idle, f"{more} {s.workers} of {s.cores} cores load images."),
            (ours and s.on_gpu and dali, "Try --data.loader dali: it decodes and augments on the GPU."),
            (ours and s.on_gpu and not dali, f"Try DALI, which decodes and augments on the GPU: {extra}."),
            (not ours and s.decode == "cpu", "Try --data.decode mixed: JPEGs are decoded on the GPU."),
            (not ours and s.augment == "cpu", "Try --data.augment gpu."),
            (not ours and idle, f"{more} DALI has {s.workers} threads on {s.cores} cores."),
            (True, smaller),
        ]
    elif s.on_gpu and s.together < TOGETHER * slower:
        head = (
            f"Together they make {s.together:.0f} images/s, less than either alone ({s.loader:.0f} and {s.model:.0f}), though steps hardly "
            f"wait for images: they get in each other's way on the GPU or its host."
        )
        tries = [
            (gpu_augments, "Try --data.augment cpu, or --data.decode cpu: both take time of the GPU from the model."),
            (s.workers >= s.cores, f"Try --data.num_workers {max(1, s.cores - 1)}: the step's own thread needs a core."),
            (True, "massl-fast profile trace shows where the device idles."),
        ]
    else:
        head = (
            f"The model bounds this run: {s.model:.0f} images/s alone, {s.together:.0f} with the loader, which could make "
            f"{s.loader / s.model:.1f} times as many."
        )
        spare = s.on_gpu and s.loader > 2 * s.model and gpu_augments
        search = "massl-fast bench step --search-batch; where its time goes: massl-fast bench step, profile trace."
        tries = [
            (not s.compiled, "Try --model.compile true."),
            (s.precision == "fp32" and s.on_gpu, "Try --train.precision bf16."),
            (True, f"Try another batch: {search}"),
            (spare, "Try --data.augment cpu, if cores are idle: the loader has time to spare, the GPU has none."),
        ]
    return [head, *(sentence for may_help, sentence in tries if may_help)]
