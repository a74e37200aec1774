"""Attention over crops of several sizes in one call: ``torch.nn.attention.varlen.varlen_attn``, public since PyTorch 2.10.

Queries, keys and values of all crops stay where their projection wrote them, [Σ B·L, 3, heads, width]; a table of where each crop begins
takes the place of a batch dimension. That spares splitting, joining and a launch per crop size. Its kernels (flash attention, cuDNN) run
on NVIDIA GPUs of compute capability 8.0 or newer in 16 bits; elsewhere attention runs once per crop size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from massl_fast.models.precision import Precision

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""Attention [T_q, heads, width] of queries [T_q, heads, width], keys and values [T_k, heads, width]; further arguments: int32 beginnings
[crops + 1] of both, the longest of both."""

CHOICES = ("auto", "varlen", "per_size")
TRIAL_LENGTHS = (197, 37)
TRIAL_TOLERANCE = 0.02
"""Relative error in 16 bits, far above rounding and far below a wrong result."""


class Sequences(NamedTuple):
    """Where the crops' tokens begin."""

    starts: Tensor
    """int32 [Σ B + 1]."""
    counts: Tensor
    """int32 [Σ B + 1]: 0, 1, 2, …, the same of one query per crop."""
    longest: int


def sequences_of(shapes: Sequence[tuple[int, int]], device: torch.device) -> Sequences:
    """``shapes``: (B, L) of each group."""
    lengths = torch.tensor([0] + [length for crops, length in shapes for _ in range(crops)])
    starts = lengths.cumsum(0).to(device, torch.int32)
    return Sequences(starts, torch.arange(len(lengths), dtype=torch.int32, device=device), max(length for _, length in shapes))


def in_one_call(function: Varlen, sequences: Sequences, first_only: bool) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Attention of [1, heads, tokens of all crops, width] and a dropout rate, which is 0; with ``first_only`` of one query per crop."""
    starts, longest = (sequences.counts, 1) if first_only else (sequences.starts, sequences.longest)

    def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        # Norms of queries and keys give float32 under autocast.
        query, key, value = (each[0].transpose(0, 1).to(value.dtype) for each in (query, key, value))
        return function(query, key, value, starts, sequences.starts, longest, sequences.longest).transpose(0, 1)[None]

    return attend


def choose_attention(
    asked: str, device: torch.device, precision: Precision, *, heads: int, width: int, dropout: bool
) -> tuple[Varlen | None, str]:
    """(the function, or None for a call per crop size; why). It is tried before it is taken.

    ``asked``: auto, varlen or per_size (``model.attention``). Raises ValueError where it is varlen, which cannot be had.
    """
    if asked not in CHOICES:
        raise ValueError(f"model.attention is {asked!r}; it can be {', '.join(CHOICES[:-1])} or {CHOICES[-1]}.")
    if asked == "per_size":
        return None, "as set"
    function, problem = _available(device, precision, width, dropout)
    if function is not None:
        problem = trial(function, device, precision.dtype, heads, width)
        if not problem:
            return function, f"PyTorch {torch.__version__} has it and gives here what a call per crop size gives"
    if asked == "varlen":
        raise ValueError(f"model.attention is varlen, but {problem}. Choose auto or per_size.")
    return None, problem


def _available(device: torch.device, precision: Precision, width: int, dropout: bool) -> tuple[Varlen | None, str]:
    if device.type != "cuda" or torch.version.hip is not None:
        return None, "attention of variable length runs on NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return None, f"attention of variable length needs compute capability 8.0 or newer, and this is {major}.{minor}"
    if precision.name == "fp32":
        return None, "attention of variable length computes in 16 bits, and this step is in fp32"
    if dropout:
        return None, "attention of variable length knows no dropout, and this network has some"
    if width % 8 or width > 256:
        return None, f"attention of variable length takes heads of a width divisible by 8 and up to 256, and these have {width}"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, f"PyTorch {torch.__version__} has no torch.nn.attention.varlen, which 2.10 brought"
    return varlen_attn, ""


def trial(function: Varlen, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> str:
    """Why ``function`` cannot be taken, empty where its results and gradients are those of a call per crop, for two crops packed as in a
    step."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, length) for length in TRIAL_LENGTHS]
    sequences = sequences_of(shapes, device)
    drawn = torch.randn(sum(TRIAL_LENGTHS), 3, heads, width, device=device, generator=generator).to(dtype)
    upstream = torch.randn(sum(TRIAL_LENGTHS), heads, width, device=device, generator=generator).to(dtype)
    found: list[tuple[Tensor, ...]] = []
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for attention in (function, one_by_one):
                packed = drawn.clone().requires_grad_()
                out = attention(*packed.unbind(1), sequences.starts, sequences.starts, sequences.longest, sequences.longest)
                found.append((out.detach(), *torch.autograd.grad(out, packed, upstream)))
    except (RuntimeError, ValueError, TypeError) as error:
        return f"varlen_attn of PyTorch {torch.__version__} does not run here: {str(error).splitlines()[0]}"
    for what, ours, expected in zip(("results", "gradients"), *found):
        error = ((ours.float() - expected.float()).norm() / expected.float().norm()).item()
        if not error < TRIAL_TOLERANCE:
            return f"varlen_attn of PyTorch {torch.__version__} gives {what} here that are {error:.1e} from those of a call per crop"
    return ""


def one_by_one(query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """The readable twin: a call per crop."""
    lengths_q, lengths_k = starts_q.diff().tolist(), starts_k.diff().tolist()
    assert max(lengths_q) <= longest_q and max(lengths_k) <= longest_k
    outputs = []
    for q, k, v in zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k)):
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(outputs)
