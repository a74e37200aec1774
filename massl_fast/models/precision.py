"""Number formats of a step: which one is chosen and why, autocast, and loss scaling that lives on the device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Format of the matrix products of a step. Weights, optimizer and loss stay in float32 throughout."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


def choose_precision(asked: str, device: torch.device) -> Precision:
    """``asked`` is auto, bf16, fp16 or fp32. Raises ValueError where the device cannot do what is asked."""
    if device.type == "cpu":
        if asked == "fp16":
            raise ValueError("train.precision is fp16, which trains on GPUs only. On the CPU choose fp32 (or auto), or bf16.")
        return Precision("fp32", "a CPU") if asked == "auto" else Precision(asked, "train.precision names it")
    # torch.cuda.is_bf16_supported() also says yes where bf16 is emulated, as on the V100, so the hardware generation is asked instead.
    major, minor = torch.cuda.get_device_capability(device)
    native = major >= 8
    if asked == "auto":
        return Precision("bf16" if native else "fp16", f"compute capability {major}.{minor}")
    if asked == "bf16" and not native:
        raise ValueError(
            f"train.precision is bf16, but {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bf16 "
            f"hardware. Choose fp16 (with loss scaling) or auto."
        )
    return Precision(asked, "train.precision names it")


class LossScaler:
    """Dynamic loss scaling for fp16, without asking the device: halved after a non-finite gradient, doubled after ``growth_interval``
    finite ones. For other formats the scale is 1 and stays so.
    """

    def __init__(self, precision: Precision, device: torch.device, initial: float = 2.0**16, growth_interval: int = 2000):
        self.enabled = precision.name == "fp16"
        self.scale = torch.tensor(initial if self.enabled else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)
        self.growth_interval = growth_interval

    def update(self, finite: Tensor) -> None:
        """``finite``: bool 0-d tensor, whether this step's gradients were."""
        if not self.enabled:
            return
        self.finite_steps.copy_(torch.where(finite, self.finite_steps + 1, 0.0))
        grow = self.finite_steps >= self.growth_interval
        self.scale.copy_(torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale * 0.5))
        self.finite_steps.copy_(torch.where(grow, 0.0, self.finite_steps))

    def tensors(self) -> dict[str, Tensor]:
        return {"scaler/scale": self.scale, "scaler/finite_steps": self.finite_steps} if self.enabled else {}
