"""What computes here: data sheets of GPUs, the chosen device, this machine, versions and commit. Each fact stands here once."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")

# Data sheets

# Dense peaks of the matrix units in TFLOP/s with 32-bit accumulation, at the vendor's boost clock, and of plain float32.
# NVIDIA's data sheets and architecture white papers: V100 (2017, 2020), T4, A100, A10, A30, A40, RTX 3090 and 4090 (GA102,
# AD102 white papers), L4, L40, L40S, H100, H200, B200. Where a sheet gives the figure "with sparsity", half of it.
# The first pattern that occurs in the device's name counts, so special boards stand before their family.
_PEAKS: list[tuple[str, dict[str, float]]] = [
    (r"MIG", {}),
    (r"B200", {"16": 2250, "32": 75}),
    (r"H200 NVL", {"16": 835.5, "32": 60}),
    (r"H200|GH200", {"16": 989.4, "32": 67}),
    (r"H100 PCIe", {"16": 756.5, "32": 51}),
    (r"H100 NVL", {"16": 835.5, "32": 60}),
    (r"H100", {"16": 989.4, "32": 67}),
    (r"A100", {"16": 312, "32": 19.5}),
    (r"A10G", {"16": 70, "32": 31.5}),
    (r"A10\b", {"16": 125, "32": 31.2}),
    (r"A30\b", {"16": 165, "32": 10.3}),
    (r"A40\b", {"16": 149.7, "32": 37.4}),
    (r"L40S", {"16": 362, "32": 91.6}),
    (r"L40\b", {"16": 181, "32": 90.5}),
    (r"L4\b", {"16": 121, "32": 30.3}),
    (r"RTX 3090\b(?! Ti)", {"16": 71.2, "32": 35.6}),
    (r"RTX 4090\b(?! D)", {"16": 165.2, "32": 82.6}),
    (r"V100S", {"fp16": 130, "32": 16.4}),
    (r"V100-PCIE|V100-FHHL", {"fp16": 112, "32": 14}),
    (r"V100", {"fp16": 125, "32": 15.7}),
    (r"\bT4\b", {"fp16": 65, "32": 8.1}),
]


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of a GPU in operations per second, from the vendor's data sheet; None where none is known.

    ``device_name`` as ``torch.cuda.get_device_name`` gives it; ``dtype`` that of the matrix products. float32 stands for
    true float32: products in TF32 can exceed it.
    """
    for pattern, rates in _PEAKS:
        if re.search(pattern, device_name):
            names = {torch.float16: ("16", "fp16"), torch.bfloat16: ("16",), torch.float32: ("32",)}.get(dtype, ())
            return next((rates[name] * 1e12 for name in names if name in rates), None)
    return None


@dataclass(frozen=True)
class Gpu:
    """A GPU in its usual host of eight, as published."""

    name: str
    bytes: float
    """Of its memory."""
    peak_flops: float
    """Dense, of 16-bit products, operations per second."""
    bandwidth: float
    """Of its memory, bytes per second."""
    link: float
    """To the other GPUs of the host, bytes per second in one direction, as ``network``."""
    network: float
    """To other hosts, for one GPU."""


def _gpu(name: str, device_name: str, gigabytes: float, terabytes_per_second: float, link_gigabytes: float, network_gigabits: float) -> Gpu:
    peak = peak_flops(device_name, torch.float16)
    assert peak is not None
    return Gpu(name, gigabytes * 1e9, peak, terabytes_per_second * 1e12, link_gigabytes * 1e9, network_gigabits * 1e9 / 8)


# NVIDIA's data sheets of V100 (SXM2), A100 (SXM4), H100 (SXM5) and H200: memory, memory bandwidth, NVLink (half of the 300, 600, 900 and
# 900 GB/s that are given for both directions). NVIDIA's data sheets of DGX-1 (4 × 100 Gb/s for 8 GPUs), DGX A100 (8 × 200 Gb/s), DGX H100
# and DGX H200 (8 × 400 Gb/s): network for one GPU.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16", "Tesla V100-SXM2-16GB", 16, 0.9, 150, 50),
        _gpu("V100-32", "Tesla V100-SXM2-32GB", 32, 0.9, 150, 50),
        _gpu("A100-40", "NVIDIA A100-SXM4-40GB", 40, 1.555, 300, 200),
        _gpu("A100-80", "NVIDIA A100-SXM4-80GB", 80, 2.039, 300, 200),
        _gpu("H100", "NVIDIA H100 80GB HBM3", 80, 3.35, 450, 400),
        _gpu("H200", "NVIDIA H200", 141, 4.8, 450, 400),
    )
}

# The device


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names; the GPU, else the CPU, where it is empty or auto."""
    try:
        device = torch.device(name if name not in ("", "auto") else ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name}; it can be auto, cpu, cuda, or cuda:1 and so on.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name}, and torch finds no GPU here. --device cpu does without.")
    if device.index is not None and device.index >= (torch.cuda.device_count() if device.type == "cuda" else 1):
        raise ValueError(f"--device is {name}; there are {torch.cuda.device_count()} GPUs here, counted from 0.")
    demand_code(device)
    return device


def demand_code(device: torch.device) -> None:
    """Raise ValueError where the installed PyTorch has no code that runs on a GPU: its first kernel would end in an error of CUDA's."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in torch.cuda.get_arch_list()]
    known = [(kind, int(one), int(other), suffix) for kind, one, other, suffix in (match.groups() for match in kinds if match)]
    # Machine code runs on its own major version from its minor version on, PTX is compiled for whatever is newer; a suffix ties both down.
    fits = any(
        (one, other) == (major, minor)
        or (not suffix and ((one == major and other <= minor) if kind == "sm" else (one, other) <= (major, minor)))
        for kind, one, other, suffix in known
    )
    if known and not fits:
        raise ValueError(
            f"PyTorch {torch.__version__} has no code for {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}: it was "
            f"built for {', '.join(torch.cuda.get_arch_list())}. Install one that is (docs/cluster.md lists them by GPU; V100: CUDA 12.6)."
        )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# This machine

# mallopt(3): M_MMAP_THRESHOLD at the largest it takes (larger tensors are mapped as ever), M_TRIM_THRESHOLD, M_TOP_PAD.
GLIBC_OPTIONS = {-3: 32 * 2**20, -1: 2**31 - 1, -2: 64 * 2**20}


@functools.cache
def machine() -> dict[str, Any]:
    """Processor, cores and memory, and the current GPU with its driver."""
    found: dict[str, Any] = {"processor": processor_name(), "cores": os.cpu_count(), "memory_gib": _memory_gib()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["gpu_multiprocessors"] = properties.multi_processor_count
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found |= _driver()
    return found


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def processor_vendor() -> str:
    """Such as GenuineIntel or AuthenticAMD; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def keep_freed_memory() -> bool:
    """Have glibc's allocator keep what this process frees, and whether it does.

    By default it gives the top of its heap back to the system after each step, and the system clears every page that the next one takes
    again: some ten thousand page faults per step of a small network on a CPU.
    """
    allocator = ctypes.CDLL(None)
    if platform.libc_ver()[0] != "glibc" or not hasattr(allocator, "mallopt"):
        return False
    return all(allocator.mallopt(option, value) for option, value in GLIBC_OPTIONS.items())


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _driver() -> dict[str, str]:
    """Driver and clock and power limits, where nvidia-smi tells them."""
    if not shutil.which("nvidia-smi"):
        return {}
    keys = {"driver_version": "driver", "clocks.max.sm": "max_clock", "power.limit": "power_limit"}
    query = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode:
        return {}
    return dict(zip(keys.values(), (value.strip() for value in answer.stdout.strip().split(","))))


def device_slug(found: dict[str, Any] | None = None) -> str:
    """Name of the folder under bench/results for a device: its GPU's, or cpu (records tell which)."""
    return re.sub(r"[^a-z0-9]+", "-", (found or machine()).get("gpu", "cpu").lower()).strip("-")


# Versions


def versions() -> dict[str, str]:
    """Versions of what computes: Python, the packages that are installed, and torch's CUDA."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


@functools.cache
def git_state() -> dict[str, Any]:
    """Commit and whether tracked files other than records differ from it. Where the files came without git, MASSL_FAST_COMMIT names it."""
    if named := os.environ.get("MASSL_FAST_COMMIT"):
        return {"commit": named, "dirty": None}
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return {"commit": commit, "dirty": bool(changed) if commit else None}


def _git(*arguments: str) -> str:
    """Of this checkout; empty where the package is installed elsewhere, perhaps inside another repository."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
