"""Linear layers on a CPU by oneDNN in float32, where that is the faster library for them.

PyTorch hands products of float32 matrices to MKL, which is made for Intel's processors; oneDNN, which PyTorch brings along as well,
generates kernels for the one that is there. On an AMD EPYC with AVX-512 its products with a layer's weights are faster
(docs/performance.md). The gradient of the weights, whose first operand is transposed, stays with MKL. Sums are taken in another order, so
results differ from MKL's by roundings.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from massl_fast.hardware import processor_vendor

CHOICES = ("auto", "onednn", "blas")
SMALLEST = 2**22
"""Multiplications below which a call costs more than it saves."""


def choose_products(asked: str, device: torch.device, precision: str) -> tuple[bool, str]:
    """(whether linear layers are computed by oneDNN, why) for a ``train.cpu_products`` of auto, onednn or blas.

    Raises ValueError where the setting is onednn, which cannot be had.
    """
    if asked not in CHOICES:
        raise ValueError(f"train.cpu_products is {asked!r}; it can be {', '.join(CHOICES[:-1])} or {CHOICES[-1]}.")
    problem = ""
    if device.type != "cpu" or precision != "fp32":
        problem = "the choice is there for steps in fp32 on a CPU"
    elif not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available():
        problem = f"PyTorch {torch.__version__} was built without oneDNN"
    if problem and asked == "onednn":
        raise ValueError(f"train.cpu_products is onednn, but {problem}. Choose auto.")
    if problem or asked == "blas":
        return False, problem or "as set"
    if asked == "onednn":
        return True, "as set"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False, "the processor has no AVX-512"
    vendor = processor_vendor()
    if vendor == "GenuineIntel":
        return False, "MKL is made for Intel's processors"
    return True, f"the processor has AVX-512 and is made by {vendor.removeprefix('Authentic') or 'another maker than Intel'}"


def multiply_by_onednn_(module: nn.Module) -> None:
    """Have all linear layers of ``module`` computed by ``linear``."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` with the same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of float32 matrices by oneDNN; of anything else by PyTorch, as it is within compiled graphs and under autocast."""
    fitting = rows.dtype == weight.dtype == torch.float32 and rows.device.type == "cpu" and rows.ndim == 2
    if not fitting or rows.numel() * weight.shape[0] < SMALLEST or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(rows, weight, bias)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (rows, weight, bias)):
        return _Linear.apply(rows, weight, bias)
    return _product(rows, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t(), None) if of_rows else None,
            gradient.t() @ rows if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
