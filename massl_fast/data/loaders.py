"""What data a setting names, and which loader feeds a run and why."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from massl_fast.config import Config, CropsSection
from massl_fast.config.sections import register_loader_settings
from massl_fast.data.bad_files import read_bad_files
from massl_fast.data.crops import View, published_views
from massl_fast.data.demo import ensure_demo_images
from massl_fast.data.loader import Loader
from massl_fast.data.sources import Source, open_source
from massl_fast.distributed.world import World
from massl_fast.registry import Registry, demand_whole

DEMO_FOLDER = Path("runs/demo-images")


def open_data(path: str, setting: str, role: str) -> Source:
    """The images that ``path`` names; ``demo`` is the generated set, of which ``role`` is train or test. ``setting`` is for the error."""
    if not path:
        raise ValueError(f"{setting} is empty. Name a folder of images or WebDataset tars, or demo for the generated set.")
    if path != "demo":
        return open_source(path)
    train, test = ensure_demo_images(DEMO_FOLDER)
    return open_source(test if role == "test" else train)


def views_of(crops: CropsSection) -> tuple[View, ...]:
    """The views that the settings describe, global crops first."""
    return published_views(
        global_size=crops.global_size,
        local_size=crops.local_size,
        num_local=crops.num_local,
        global_scale=crops.global_scale,
        local_scale=crops.local_scale,
        interpolation=crops.interpolation,
        blur_probabilities=crops.blur_probability,
        solarize_probabilities=crops.solarize_probability,
        flip_probability=crops.flip_probability,
        jitter=crops.jitter,
        jitter_probability=crops.jitter_probability,
        grayscale_probability=crops.grayscale_probability,
        blur_sigma=crops.blur_sigma,
        mean=crops.mean,
        std=crops.std,
    )


LOADERS: Registry[str | type[Loader]] = Registry(
    "data.loader",
    {
        "torchvision": "massl_fast.data.torchvision_loader:TorchvisionLoader",
        "dali": "massl_fast.data.dali.loader:DaliLoader",
    },
)
"""Classes, or where they are imported from when a run names them."""


def register(loader: type[Loader]) -> None:
    """Make ``loader`` known by its ``name``, with its ``Settings``; raises ValueError where the name is taken or something is lacking."""
    demand_whole(loader, "a loader", ("name",))
    register_loader_settings(loader.name, loader.Settings)
    LOADERS.add(loader.name, loader)


def open_together(world: World, path: str, setting: str, role: str) -> Source:
    """The source that a setting names (see ``open_data``), on every rank. A collective call."""
    if world.is_main:
        source = open_data(path, setting, role)
    world.barrier()  # what is made on first use (generated images, tar indices) is made once
    return source if world.is_main else open_data(path, setting, role)


def build_loader(config: Config, source: Source, *, device_batch: int, accumulation: int, world: World, bad_files_path: Path) -> Loader:
    """The loader that ``data.loader`` names; its ``name`` and ``reason`` say which it is and why."""
    data = config.data
    name, reason = choose_loader(data.loader, world.device.type)
    workers = data.num_workers if data.num_workers >= 0 else max(1, int(world.cores()) - 1)
    kind = LOADERS.chosen(name)
    if isinstance(kind, str):
        module, _, attribute = kind.partition(":")
        kind = getattr(importlib.import_module(module), attribute)
    return kind(
        source,
        views_of(config.crops),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        device_batch=device_batch,
        accumulation=accumulation,
        rank=world.rank,
        world_size=world.size,
        num_workers=workers,
        bad_files=read_bad_files(Path(data.bad_files)) if data.bad_files else (),
        max_bad_percent=data.max_bad_percent,
        bad_files_path=bad_files_path,
        device=world.device,
        reason=reason,
        **kind.own_arguments(config, world.device),
    )


@contextlib.contextmanager
def loader_without_run(config: Config, source: Source, world: World, *, device_batch: int, accumulation: int) -> Iterator[Loader]:
    """The loader of ``build_loader`` where there is no run folder for its list of unreadable images; closed at the end."""
    with tempfile.TemporaryDirectory(prefix="massl_fast_loader_") as folder:
        loader = build_loader(
            config,
            source,
            device_batch=device_batch,
            accumulation=accumulation,
            world=world,
            bad_files_path=Path(folder, "bad_files.txt"),
        )
        with contextlib.closing(loader):
            yield loader


def choose_loader(asked: str, device_type: str) -> tuple[str, str]:
    """(name of a loader, reason) for the setting ``data.loader`` and a device type of cuda or cpu."""
    if asked not in ("auto", "torchvision", "dali"):
        return asked, "as set"
    obstacle = _dali_obstacle()
    if asked == "torchvision":
        return "torchvision", "as set"
    if asked == "dali":
        if obstacle:
            raise ValueError(
                f"data.loader is dali, but nvidia.dali does not import ({obstacle}). Install it, by the CUDA of your PyTorch (pip install "
                f"'massl-fast[dali-cuda13]' or 'massl-fast[dali-cuda12]'), or choose auto."
            )
        return "dali", "as set"
    if obstacle:
        return "torchvision", f"nvidia.dali does not import: {obstacle}"
    if device_type != "cuda":
        return "torchvision", "DALI imports, but its CPU backend is no faster per core than Pillow"
    return "dali", "it imports, and there is a GPU to feed"


def _dali_obstacle() -> str | None:
    """Why DALI cannot be used, or None. A build for another CUDA is found by importing it, not by looking for it."""
    try:
        importlib.import_module("nvidia.dali")
    except Exception as error:  # what a broken build raises is its own choice
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
