"""Random numbers and masks that depend on (seed, step) alone and are drawn on the device, so that loaders and CUDA graphs need not know."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from massl_fast.objectives.base import At

ATTEMPTS = 32
"""Blocks tried per mask. The published loop ends after ten attempts in a row without success, most often before this many."""

GMML_BLOCKS = 64
"""Blocks laid per image; of sides up to 30 % this covers three quarters of nearly every image."""


def uniforms(seed: int, step: int | Tensor, names: Tensor, count: int) -> Tensor:
    """float32 [n, count] in [0, 1): splitmix64 (Steele, Lea, Flood, 2014) of (seed, step, name, number); ``names`` int64 [n]."""
    counter = names[:, None] * count + torch.arange(count, dtype=torch.int64, device=names.device)
    start = _signed(seed * 3202034522624059733 + 1)
    start = start + step * 2862933555777941757 if isinstance(step, Tensor) else _signed(start + step * 2862933555777941757)
    key = counter * -7046029254386353131 + start
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        key = (key ^ _shifted(key, shift)) * factor
    return (_shifted(key ^ _shifted(key, 31), 40)).to(torch.float32) * 2.0**-24


def _signed(value: int) -> int:
    """``value`` modulo 2^64 as an int64."""
    return (value + 2**63) % 2**64 - 2**63


def _shifted(value: Tensor, by: int) -> Tensor:
    """Logical shift to the right, which int64 has not."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def names_of_crops(views: int, at: At, device: torch.device) -> Tensor:
    """int64 [views·N]: a number for each crop of a micro-batch, view-major, by the place of its image in the global batch. What is drawn by
    it is the same however ranks and micro-batches divide the batch."""
    images = at.first + torch.arange(at.images, device=device)
    return (images[None] * views + torch.arange(views, device=device)[:, None]).flatten()


def block_masks(names: Tensor, grid: tuple[int, int], *, seed: int, step: int | Tensor, ratio: tuple[float, float], share: float) -> Tensor:
    """bool [crops, h·w]: block-wise masks of the crops called ``names`` (BEiT, algorithm 1; iBOT, section 3.1).

    A crop is masked with probability ``share``, then to a ratio drawn from ``ratio``. Blocks have an area from (min(h, w) // 3)² to what is
    left and a logarithm of the aspect from log 0.3 to −log 0.3; a block that would exceed the ratio, or add nothing, is not taken, and
    after ten such in a row the mask is done.
    """
    height, width = grid
    crops, device = len(names), names.device
    draws = uniforms(seed, step, names, 2 + 4 * ATTEMPTS)
    masked, drawn = draws[:, 0] < share, ratio[0] + (ratio[1] - ratio[0]) * draws[:, 1]
    allowed = torch.where(masked, drawn * height * width, 0.0)
    smallest = float((min(height, width) // 3) ** 2)
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    mask = torch.zeros(crops, height, width, dtype=torch.bool, device=device)
    failures = torch.zeros(crops, dtype=torch.int64, device=device)
    for attempt in draws[:, 2:].view(crops, ATTEMPTS, 4).unbind(1):
        left_over = allowed - mask.sum((1, 2))
        area = (smallest + (left_over - smallest) * attempt[:, 0]).clamp_min(0)
        aspect = (math.log(0.3) * (1 - 2 * attempt[:, 1])).exp()
        rows, columns = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top, start = ((attempt[:, 2] * (height - rows + 1)).floor(), (attempt[:, 3] * (width - columns + 1)).floor())
        inside = (y >= top[:, None]) & (y < (top + rows)[:, None])
        across = (x >= start[:, None]) & (x < (start + columns)[:, None])
        block = inside[:, :, None] & across[:, None, :]
        added = (block & ~mask).sum((1, 2))
        fits = (rows < height) & (columns < width) & (added > 0) & (added <= left_over) & (failures < 10) & (left_over > 0)
        mask = mask | (block & fits[:, None, None])
        failures = torch.where(fits, 0, failures + 1)
    return mask.flatten(1)


def chosen_rows(mask: Tensor, most: int | None) -> Tensor:
    """int64 [M]: places of ``mask`` [crops, P] that are set, in order. With ``most``, the host waits for nothing: M = ``most``, the rest
    being places that are not set; a mask holds at most so many."""
    flat = mask.flatten()
    if most is None:
        return flat.nonzero()[:, 0]
    return torch.sort(flat.logical_not().to(torch.uint8), stable=True).indices[:most]


def small_blocks(names: Tensor, grid: tuple[int, int], *, seed: int, step: int | Tensor, ratio: Tensor, largest: float) -> Tensor:
    """bool [crops, h·w]: blocks with sides of up to ``largest`` of the grid's, laid one over another until ``ratio`` [crops] is covered
    (GMML, section 3.1); the last block may go beyond it."""
    height, width = grid
    tall, broad = max(1, round(largest * height)), max(1, round(largest * width))
    draws = uniforms(seed, step, names, 4 * GMML_BLOCKS).view(len(names), GMML_BLOCKS, 4)
    y, x = torch.arange(height, device=names.device), torch.arange(width, device=names.device)
    mask = torch.zeros(len(names), height, width, dtype=torch.bool, device=names.device)
    for draw in draws.unbind(1):
        rows, columns = 1 + (draw[:, 0] * tall).floor(), 1 + (draw[:, 1] * broad).floor()
        top, start = (draw[:, 2] * (height - rows + 1)).floor(), (draw[:, 3] * (width - columns + 1)).floor()
        inside = (y >= top[:, None]) & (y < (top + rows)[:, None])
        across = (x >= start[:, None]) & (x < (start + columns)[:, None])
        short = mask.float().mean((1, 2)) < ratio
        mask = mask | (inside[:, :, None] & across[:, None, :] & short[:, None, None])
    return mask.flatten(1)
