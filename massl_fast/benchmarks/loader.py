"""How many images per second the loaders alone make crops of.

Every configuration runs in a process of its own. ``per core`` are images per second of processor time spent in that process and its
workers, threads of DALI included, which other work on the machine hardly changes. Memory of the host is the growth of that process
and its workers (shared pages split among those that share them); on a GPU, DALI's memory, which PyTorch does not know of, is what the
device is short of beyond PyTorch's own.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Generator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from massl_fast import records
from massl_fast.benchmarks.timing import windows
from massl_fast.data.crops import View, published_views
from massl_fast.data.loader import Loader
from massl_fast.data.sources import Source, open_source
from massl_fast.data.torchvision_loader import TorchvisionLoader
from massl_fast.extras import importable
from massl_fast.hardware import synchronize
from massl_fast.processes import host_bytes, processor_seconds

GENERATED = 256  # images
WIDTH, HEIGHT, QUALITY = 500, 375, 87
PLACES = {
    "published": (("cpu", "cpu"),),
    "torchvision": (("cpu", "cpu"),),
    "dali": (("cpu", "cpu"), ("cpu", "gpu"), ("mixed", "gpu")),
}
"""Where each loader can decode and augment."""
SHORTEST_PROCESSOR_TIME = 0.2  # seconds
FIGURES = {
    "images_per_second": ("images/s", "higher"),
    "images_per_core_second": ("images/s", "higher"),
    "host_memory_mib": ("MiB", ""),
    "torch_gpu_memory_mib": ("MiB", ""),
    "dali_gpu_memory_mib": ("MiB", ""),
}


@dataclass(frozen=True)
class Setup:
    """One configuration."""

    loader: str  # published, torchvision or dali
    workers: int
    decode: str
    augment: str
    images: str
    batch: int
    device: str
    seconds: float
    global_size: int
    local_size: int
    num_local: int

    @property
    def views(self) -> tuple[View, ...]:
        return published_views(global_size=self.global_size, local_size=self.local_size, num_local=self.num_local)


def obstacle(setup: Setup) -> str:
    """Why a configuration cannot run here; empty where it can."""
    if "gpu" in (setup.augment, setup.decode) and setup.device == "cpu":
        return "it needs a GPU, and there is none here"
    return "nvidia.dali is not installed" if setup.loader == "dali" and not importable("nvidia.dali") else ""


def read_step_rate(text: str) -> float:
    """Images per second, from a number or from a run's summary."""
    try:
        rate = float(text)
    except ValueError:
        summary = Path(text, "summary.json")
        if not summary.is_file():
            raise ValueError(f"--step-rate {text} is neither a number nor a run's folder with a summary.json.") from None
        rate = json.loads(summary.read_text(encoding="utf-8")).get("images_per_second")
    if not rate or not rate > 0:
        raise ValueError(f"--step-rate {text} gives no positive number of images/s.")
    return rate


def write_images(folder: Path, count: int) -> None:
    """JPEGs with the spectrum of photos, roughly: octaves of noise, each half as strong as the one before, edges and grain."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for octave in range(1, 8):
            coarse = random.integers(0, 256, (3 * 2**octave, 4 * 2**octave, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32) / 2**octave
        left, top = random.integers(0, WIDTH // 2), random.integers(0, HEIGHT // 2)
        pixels[top : top + HEIGHT // 2, left : left + WIDTH // 2] *= random.uniform(0.5, 1.5, 3)
        pixels += random.normal(0, 6, pixels.shape)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=QUALITY)


def describe(source: Source, given: bool) -> str:
    """One sentence on the images: a sample of 100 opened, spread over the source."""
    sizes, lengths = [], []
    for index in np.linspace(0, len(source) - 1, min(100, len(source))).astype(int).tolist():
        data = source.read(index)
        lengths.append(len(data))
        try:
            sizes.append(Image.open(io.BytesIO(data)).size)
        except OSError:
            continue
    width, height = np.median(np.array(sizes or [(0, 0)]), axis=0)
    origin = source.path if given else "generated"
    return f"{len(source)} images ({origin}), median {width:.0f} × {height:.0f} pixels, {np.median(lengths) / 1024:.0f} KiB"


# One measurement, in a process of its own


def measure(setup: Setup) -> dict[str, list[float]]:
    """Warm-up, then at least ``seconds`` in windows, of which each gives a sample: images and processor seconds over the same span."""
    torch.set_num_threads(1)
    device = torch.device(setup.device)
    on_gpu = device.type == "cuda"
    free_before = torch.cuda.mem_get_info()[0] if on_gpu else 0
    memory_before = host_bytes()
    batches = batches_of(setup)
    # As many batches as may lie ready, so that what is counted is made while the clock runs.
    for _ in range(2 * setup.workers + 2 if setup.loader != "dali" else 4):
        next(batches)
    synchronize(device)
    processor = [processor_seconds()]
    found = windows(lambda: next(batches), setup.seconds, device, lambda: processor.append(processor_seconds()))
    result = {"images_per_second": [setup.batch * count / seconds for count, seconds in found]}
    # Processor time comes in ticks of 10 ms: a window shorter than some of them has no sample of its own.
    spent = [(count, max(stop - start, 1 / os.sysconf("SC_CLK_TCK"))) for (count, _), (start, stop) in zip(found, pairwise(processor))]
    long = [window for window in spent if window[1] >= SHORTEST_PROCESSOR_TIME] or spent[:1]
    result["images_per_core_second"] = [setup.batch * count / seconds for count, seconds in long]
    result["host_memory_mib"] = [(host_bytes() - memory_before) / 2**20]
    if on_gpu:
        reserved = torch.cuda.memory_reserved()
        beside = free_before - torch.cuda.mem_get_info()[0] - reserved
        result["torch_gpu_memory_mib"] = [reserved / 2**20]
        result["dali_gpu_memory_mib"] = [beside / 2**20 if setup.loader == "dali" else 0.0]
    batches.close()
    return result


def batches_of(setup: Setup) -> Generator[Any, None, None]:
    """Endless batches of crops; closing the iterator ends the loader's processes."""
    source = open_source(setup.images)
    common = dict(seed=0, global_batch=setup.batch, device_batch=setup.batch, num_workers=setup.workers, device=setup.device)
    common |= dict(max_bad_percent=100.0)
    if setup.loader == "published":
        dataset, on_gpu = PublishedDataset(source, setup.views), setup.device == "cuda"
        workers = dict(num_workers=setup.workers, multiprocessing_context="forkserver", persistent_workers=True)
        published = torch.utils.data.DataLoader(dataset, setup.batch, shuffle=True, drop_last=True, pin_memory=on_gpu, **workers)
        while True:
            for crops in published:
                yield [c.to(setup.device, non_blocking=True) for c in crops]
    loader: Loader
    if setup.loader == "torchvision":
        loader = TorchvisionLoader(source, setup.views, **common, pin_memory=setup.device == "cuda")
    else:
        from massl_fast.data.dali.loader import DaliLoader

        loader = DaliLoader(source, setup.views, **common, decode=setup.decode, augment=setup.augment)
    try:
        yield from loader.batches(0)
    finally:
        loader.close()


class PublishedDataset(torch.utils.data.Dataset):
    """The multi-crop augmentation as the published code has it: torchvision's transforms on Pillow images, one image at a time."""

    def __init__(self, source: Source, views: tuple[View, ...]) -> None:
        self.source = source
        self.transforms = [published_transform(view) for view in views]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(self.source.read(index))).convert("RGB")
        return [transform(image) for transform in self.transforms]


def published_transform(view: View):
    from torchvision import transforms as t

    steps = [
        t.RandomResizedCrop(view.size, scale=view.scale, interpolation=t.InterpolationMode(view.interpolation)),
        t.RandomHorizontalFlip(view.flip_probability),
        t.RandomApply([t.ColorJitter(*view.jitter)], view.jitter_probability),
        t.RandomGrayscale(view.grayscale_probability),
        t.RandomApply([functools.partial(blurred, sigma=view.blur_sigma)], view.blur_probability),
    ]
    if view.solarize_probability:
        steps.append(t.RandomSolarize(view.solarize_threshold, view.solarize_probability))
    return t.Compose([*steps, t.ToTensor(), t.Normalize(view.mean, view.std)])


def blurred(image: Image.Image, sigma: tuple[float, float]) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(*sigma).item()))


# Record


def as_record(setup: Setup, result: dict[str, list[float]], images: str, step_rate: float | None) -> dict[str, Any]:
    case = asdict(setup) | {"images": images}
    del case["seconds"]  # how long was measured is no part of what was measured
    figures = {name: records.figure(result[name], unit, better) for name, (unit, better) in FIGURES.items() if name in result}
    return records.record("loader", case, figures, {"step_rate": step_rate, "seconds": setup.seconds})
