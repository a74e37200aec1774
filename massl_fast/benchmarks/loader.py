"""``massl-fast bench loader``: how many images a second the loaders alone make crops of.

Every configuration runs in a process of its own. ``per core`` are images a second of processor time spent in that process and its
workers, threads of DALI included, which other work on the machine hardly changes. Memory of the host is the growth of that process
and its workers (shared pages split among those that share them); on a GPU, DALI's memory, which PyTorch does not know of, is what the
device is short of beyond PyTorch's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from massl_fast.benchmarks import records
from massl_fast.data.crops import View, published_views
from massl_fast.data.sources import Source, open_source
from massl_fast.data.torchvision_loader import TorchvisionLoader

GENERATED = 256  # images
WIDTH, HEIGHT, QUALITY = 500, 375, 87
PLACES = (("cpu", "cpu"), ("cpu", "gpu"), ("mixed", "gpu"))  # decode, augment
WINDOWS = 10
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", default="", help=f"folder or tars to load (default: {GENERATED} generated images, {WIDTH} × {HEIGHT})")
    parser.add_argument(
        "--loaders",
        nargs="+",
        default=["published", "torchvision", "dali"],
        choices=["published", "torchvision", "dali"],
        help="published: one image and one Pillow operation at a time, as in the published code (default: all)",
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[os.cpu_count() or 1], help="processes or threads (default: all cores)")
    parser.add_argument("--batch", type=int, default=0, help="images of a batch (default: 64 for a GPU, else 16)")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a measurement (default: 6)")
    parser.add_argument("--global-size", type=int, default=224, help="side of the 2 global crops (default: 224)")
    parser.add_argument("--local-size", type=int, default=96, help="side of the local crops (default: 96)")
    parser.add_argument("--num-local", type=int, default=10, help="local crops (default: 10)")
    parser.add_argument("--step-rate", default="", help="images/s that a model trains on, or a run's folder, whose summary tells it")
    parser.add_argument("--output", default="", help="file to which a JSON object a line is appended")


def run(args: argparse.Namespace) -> int:
    if min(args.workers) < 1 or args.seconds <= 0 or args.batch < 0:
        raise ValueError("--workers take at least 1, --seconds more than 0, --batch at least 1.")
    if args.output:
        records.check_writable(args.output)
    step_rate = read_step_rate(args.step_rate) if args.step_rate else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = args.batch or (64 if device == "cuda" else 16)
    with tempfile.TemporaryDirectory(prefix="massl_fast_bench_") as folder:
        if not args.images:
            write_images(Path(folder), max(GENERATED, batch))
        images = args.images or folder
        source = open_source(images)
        if len(source) < batch:
            raise ValueError(f"{images} holds {len(source)} images, fewer than a batch of {batch}. Set --batch.")
        print(describe(source, bool(args.images)))
        places = {"published": PLACES[:1], "torchvision": PLACES[:1], "dali": PLACES}
        rest = (images, batch, device, args.seconds, args.global_size, args.local_size, args.num_local)
        header = f"{'loader':<12}{'workers':>8}{'decode':>8}{'augment':>9}{'images/s':>10}{'per core':>10}{'host MiB':>10}"
        print(
            header + (f"{'DALI GPU MiB':>14}{'torch GPU MiB':>15}" if device == "cuda" else "") + ("   of the model's" if step_rate else "")
        )
        for name in args.loaders:
            for workers in args.workers:
                for decode, augment in places[name]:
                    setup = Setup(name, workers, decode, augment, *rest)
                    row = f"{name:<12}{workers:>8}{decode:>8}{augment:>9}"
                    if "gpu" in (augment, decode) and device == "cpu":
                        print(f"{row}  skipped: it needs a GPU, and there is none here")
                        continue
                    missing = next((p for p in needed(name) if not importable(p)), None)
                    if missing:
                        print(f"{row}  skipped: {missing} is not installed")
                        continue
                    # A process of its own: DALI's memory pools never shrink.
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                        try:
                            result = executor.submit(measure, setup).result()
                        except OSError as error:  # the published path takes no unreadable image
                            print(f"{row}  ended by an image: {str(error).splitlines()[-1]}")
                            continue
                    found = {name: median(samples) for name, samples in result.items()}
                    row += f"{found['images_per_second']:>10.1f}{found['images_per_core_second']:>10.1f}{found['host_memory_mib']:>10.0f}"
                    if device == "cuda":
                        row += f"{found['dali_gpu_memory_mib']:>14.0f}{found['torch_gpu_memory_mib']:>15.0f}"
                    if step_rate:
                        row += f"{100 * found['images_per_second'] / step_rate:>14.0f} %"
                    print(row, flush=True)
                    if args.output:
                        records.append(args.output, [as_record(setup, result, args.images or "generated", step_rate)])
    return 0


def needed(loader: str) -> tuple[str, ...]:
    return {"published": ("torchvision",), "torchvision": (), "dali": ("nvidia.dali",)}[loader]


def importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def read_step_rate(text: str) -> float:
    """Images a second, from a number or from a run's summary."""
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
    on_gpu = setup.device == "cuda"
    free_before = torch.cuda.mem_get_info()[0] if on_gpu else 0
    memory_before = sum(map(proportional_bytes, process_tree()))
    loader = make_loader(setup)
    batches = loader.batches(0)
    # As many batches as may lie ready, so that what is counted is made while the clock runs.
    for _ in range(2 * setup.workers + 2 if setup.loader != "dali" else 4):
        next(batches)
    synchronize(on_gpu)
    result: dict[str, list[float]] = {"images_per_second": [], "images_per_core_second": []}
    begin = time.perf_counter()
    while time.perf_counter() - begin < setup.seconds:
        images, start, processor = 0, time.perf_counter(), processor_seconds()
        while (elapsed := time.perf_counter() - start) < setup.seconds / WINDOWS:
            images += len(next(batches).indices)
            synchronize(on_gpu)
        result["images_per_second"].append(images / elapsed)
        # Processor time comes in ticks of 10 ms: a window shorter than some of them has no sample of its own.
        if (spent := processor_seconds() - processor) >= SHORTEST_PROCESSOR_TIME or not result["images_per_core_second"]:
            result["images_per_core_second"].append(images / max(spent, 1 / os.sysconf("SC_CLK_TCK")))
    result["host_memory_mib"] = [(sum(map(proportional_bytes, process_tree())) - memory_before) / 2**20]
    if on_gpu:
        reserved = torch.cuda.memory_reserved()
        beside = free_before - torch.cuda.mem_get_info()[0] - reserved
        result["torch_gpu_memory_mib"] = [reserved / 2**20]
        result["dali_gpu_memory_mib"] = [beside / 2**20 if setup.loader == "dali" else 0.0]
    loader.close()
    return result


def synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def make_loader(setup: Setup):
    source = open_source(setup.images)
    common = dict(seed=0, global_batch=setup.batch, device_batch=setup.batch, num_workers=setup.workers, device=setup.device)
    common |= dict(max_bad_percent=100.0)
    if setup.loader == "published":
        return PublishedLoader(source, setup)
    if setup.loader == "torchvision":
        return TorchvisionLoader(source, setup.views, **common, pin_memory=setup.device == "cuda")
    from massl_fast.data.dali.loader import DaliLoader

    return DaliLoader(source, setup.views, **common, decode=setup.decode, augment=setup.augment)


class PublishedLoader:
    """The multi-crop augmentation as the published code has it: torchvision's transforms on Pillow images, one image at a time."""

    def __init__(self, source: Source, setup: Setup) -> None:
        self.dataset, self.setup = PublishedDataset(source, setup.views), setup

    def batches(self, _: int) -> Iterator[PublishedBatch]:
        while True:
            loader = torch.utils.data.DataLoader(
                self.dataset,
                batch_size=self.setup.batch,
                shuffle=True,
                drop_last=True,
                num_workers=self.setup.workers,
                pin_memory=self.setup.device == "cuda",
                multiprocessing_context="forkserver",
                persistent_workers=True,
            )
            iterator = iter(loader)
            while True:
                for indices, crops in iterator:
                    yield PublishedBatch(indices, [c.to(self.setup.device, non_blocking=True) for c in crops])
                iterator = iter(loader)

    def close(self) -> None:
        pass


@dataclass
class PublishedBatch:
    indices: torch.Tensor
    crops: list[torch.Tensor]


class PublishedDataset(torch.utils.data.Dataset):
    def __init__(self, source: Source, views: tuple[View, ...]) -> None:
        self.source = source
        self.transforms = [published_transform(view) for view in views]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, list[torch.Tensor]]:
        image = Image.open(io.BytesIO(self.source.read(index))).convert("RGB")
        return index, [transform(image) for transform in self.transforms]


def published_transform(view: View):
    from torchvision import transforms as t

    steps = [
        t.RandomResizedCrop(view.size, scale=view.scale, interpolation=t.InterpolationMode.BICUBIC),
        t.RandomHorizontalFlip(view.flip_probability),
        t.RandomApply([t.ColorJitter(*view.jitter)], view.jitter_probability),
        t.RandomGrayscale(view.grayscale_probability),
        t.RandomApply([PillowBlur(view.blur_sigma)], view.blur_probability),
    ]
    if view.solarize_probability:
        steps.append(t.RandomSolarize(view.solarize_threshold, view.solarize_probability))
    return t.Compose([*steps, t.ToTensor(), t.Normalize(view.mean, view.std)])


class PillowBlur(torch.nn.Module):
    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(*self.sigma).item()))


# What the system says about this process and its descendants


def process_tree() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = stat_fields(int(entry))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry))
    tree = [os.getpid()]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name, which may hold anything; [] if the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def processor_seconds() -> float:
    ticks = sum(int(f[11]) + int(f[12]) for f in map(stat_fields, process_tree()) if f)
    return ticks / os.sysconf("SC_CLK_TCK")


def proportional_bytes(pid: int) -> int:
    """Memory of a process, pages that n processes share counted as 1/n."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


# Record


def as_record(setup: Setup, result: dict[str, list[float]], images: str, step_rate: float | None) -> dict[str, Any]:
    case = asdict(setup) | {"images": images}
    del case["seconds"]  # how long was measured is no part of what was measured
    figures = {name: records.figure(result[name], unit, better) for name, (unit, better) in FIGURES.items() if name in result}
    return records.record("loader", case, figures, {"step_rate": step_rate, "seconds": setup.seconds})
