"""``massl-fast doctor``: what is installed, which GPU there is, which backends and loaders run and why others do not."""

from __future__ import annotations

import argparse
import getpass
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import tempfile
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from massl_fast.data.loaders import choose_loader
from massl_fast.hardware import chosen_device, git_state, machine, versions
from massl_fast.kernels import available_backends
from massl_fast.kernels.backends import TRITON, triton_obstacle
from massl_fast.kernels.flash import obstacle as flash_obstacle
from massl_fast.models.precision import choose_precision

EXTRAS = {
    "report": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "eval": ("scikit-learn", "scipy", "pycocotools"),
    "parquet": ("pyarrow",),
}
"""Distributions of the extras whose absence is a choice; DALI has a row of its own."""
WIDTH = 256
"""Of embeddings, by default: whether Triton has a configuration depends on it."""
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print one table of what is installed, which GPU there is, and which kernel backends and loaders run here and why\n"
        "others do not. It is Markdown, to be pasted into an issue, and holds no path, user or host name."
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead")


def run(args: argparse.Namespace) -> int:
    rows = {name: without_names(text) for name, text in findings().items()}
    if args.json:
        print(json.dumps(rows))
        return 0
    widest = max(map(len, rows))
    print(f"| {'massl-fast doctor':{widest}} | |\n| {'-' * widest} | - |")
    for name, text in rows.items():
        print(f"| {name:{widest}} | {text.replace('|', '/')} |")
    return 0


def findings() -> dict[str, str]:
    """Row: what was found, in the order of the table."""
    unfit = {}
    try:
        device = chosen_device("auto")
    except ValueError as error:  # a GPU for which this PyTorch has no code: what the CPU runs is shown then
        device, unfit = torch.device("cpu"), {"PyTorch on the GPU": str(error)}
    return {**_software(), **_computer(), **_gpus(), **unfit, **_kernels(device), **_training(device)}


def without_names(text: str) -> str:
    """``text`` without folders of this machine, its name and its user's, and on one line."""
    text = re.sub(r"(?<![\w.])~?(?:/[^\s/:'\",;()]+)+/([^\s/:'\",;()]+)", r"…/\1", " ".join(text.split()))
    for name, stand_in in ((socket.gethostname(), "HOST"), (getpass.getuser(), "USER")):
        if len(name) > 2:
            text = re.sub(rf"\b{re.escape(name)}\b", stand_in, text)
    return text


def _software() -> dict[str, str]:
    found, state = versions(), git_state()
    commit = f", commit {state['commit'][:12]}{' with changes' if state['dirty'] else ''}" if state["commit"] else ""
    rows = {
        "massl-fast": importlib.metadata.version("massl-fast") + commit,
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        **{name: version for name, version in found.items() if not name.startswith("nvidia-dali")},
    }
    for extra, distributions in EXTRAS.items():
        for name in distributions:
            try:
                rows[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                rows[name] = f"absent: pip install 'massl-fast[{extra}]'"
    return rows


def _computer() -> dict[str, str]:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    rows = {
        "processor": f"{machine()['processor']}, {allowed} of {os.cpu_count()} cores may be used",
        "memory": f"{memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} GiB free",
        "temporary folder": f"{shutil.disk_usage(tempfile.gettempdir()).free / GIB:.0f} GiB free",
        "this folder": f"{shutil.disk_usage('.').free / GIB:.0f} GiB free",
        "open files": f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} per process",
        "C compiler": next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "absent; Triton and model.compile need one"),
    }
    if Path("/dev/shm").is_dir():
        rows["shared memory"] = f"{shutil.disk_usage('/dev/shm').free / GIB:.1f} GiB free, for the processes of loaders"
    return rows


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return {"GPU": f"none: this PyTorch ({torch.__version__}) is built without CUDA"}
        driver = "nvidia-smi is there, so look at the driver's version" if shutil.which("nvidia-smi") else "there is no NVIDIA driver"
        return {"GPU": f"none that PyTorch finds; {driver}"}
    rows = {}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        rows[f"GPU {index}"] = (
            f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB ({free / GIB:.0f} GiB free), compute capability {gpu.major}.{gpu.minor}"
        )
    return rows | {"driver": machine().get("driver", "unknown: nvidia-smi does not answer")}


def _kernels(device: torch.device) -> dict[str, str]:
    rows = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows[f"backends, {str(dtype).removeprefix('torch.')}"] = ", ".join(available_backends(device, dtype)) + ", fastest first"
    obstacles: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for operation in TRITON or ("memory_cross_entropy",):
            why = triton_obstacle(device, dtype, WIDTH, operation)
            obstacles.setdefault(why or "runs", []).append(f"{operation} in {str(dtype).removeprefix('torch.')}")
    rows["backend triton"] = (
        next(iter(obstacles)) if len(obstacles) == 1 else "; ".join(f"{', '.join(where)}: {why}" for why, where in obstacles.items())
    )
    if device.type == "cpu":
        rows["flash attention of the CPU"] = flash_obstacle(torch.ones(2, 2)) or "runs"
    return rows


def _training(device: torch.device) -> dict[str, str]:
    precision = choose_precision("auto", device)
    loader, reason = choose_loader("auto", device.type)
    rows = {"precision auto": f"{precision.name} ({precision.reason})", "loader auto": f"{loader} ({reason})"}
    dali = [f"{name} {version}" for name, version in versions().items() if name.startswith("nvidia-dali")]
    rows["DALI"] = ", ".join(dali) or "absent: pip install 'massl-fast[dali-cuda13]' or 'massl-fast[dali-cuda12]', by the CUDA of PyTorch"
    communication = [name for name, there in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there]
    return rows | {"communication": ", ".join(communication) if dist.is_available() else "this PyTorch has no torch.distributed"}
