"""Labels of a video's first frame carried on by similarity of patches (Jabri et al. 2020, as DINO runs it on DAVIS).

A patch takes its label from the most similar patches of earlier frames near its own place; soft labels are carried on, not the argmax.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_A_TIME = 8


@dataclass(frozen=True)
class PropagationSettings:
    """The published ones are the defaults."""

    context: int = 7
    """Frames before a frame that it takes labels from, besides the first."""
    radius: int = 12
    """Patches in row and column between a patch and its sources."""
    neighbours: int = 5
    """Sources of a patch over all frames of its context; sources as similar as the last of them stay, too."""
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.context < 0 or self.radius < 0 or self.neighbours < 1 or not self.temperature > 0:
            raise ValueError(
                f"Labels cannot be propagated with context {self.context}, radius {self.radius}, neighbours {self.neighbours} and "
                f"temperature {self.temperature}: context and radius are at least 0, neighbours at least 1, and temperature is positive."
            )


@torch.no_grad()
def propagate(features: Tensor, first_labels: Tensor, settings: PropagationSettings = PropagationSettings()) -> Tensor:
    """Soft labels of all frames after the first.

    Exact for any number of rows at a time; only rows within reach are compared, so that memory does not grow with the square of the frame.

    Args:
        features [T, h, w, D]: of any scale, on the device that does the work.
        first_labels [C, h, w]: one-hot, float32.

    Returns:
        [T - 1, C, h, w] float32.
    """
    num_frames, height, width, _ = features.shape
    first = F.normalize(features[0].float(), dim=-1), first_labels.float()
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.context)
    columns = torch.arange(width, device=features.device)
    far_columns = (columns[:, None] - columns[None]).abs() > settings.radius  # [target, source]
    soft = []
    for frame in range(1, num_frames):
        target = F.normalize(features[frame].float(), dim=-1)
        context = [first, *recent]
        sources, labels = torch.stack([pair[0] for pair in context]), torch.stack([pair[1] for pair in context], 1)
        rows = [
            _propagate_rows(target, sources, labels, top, min(top + ROWS_AT_A_TIME, height), far_columns, settings)
            for top in range(0, height, ROWS_AT_A_TIME)
        ]
        soft.append(torch.cat(rows, 1))
        recent.append((target, soft[-1]))
    return torch.stack(soft) if soft else first_labels.new_empty(0, *first_labels.shape)


def _propagate_rows(
    target: Tensor, sources: Tensor, labels: Tensor, top: int, bottom: int, far_columns: Tensor, settings: PropagationSettings
) -> Tensor:
    """Soft labels [C, bottom - top, w] of some rows of the target [h, w, D] from sources [F, h, w, D] with labels [C, F, h, w]."""
    height, width, dim = target.shape
    low, high = max(0, top - settings.radius), min(height, bottom + settings.radius)
    near = sources[:, low:high]
    cosine = target[top:bottom].reshape(-1, dim) @ near.reshape(-1, dim).T
    cosine = cosine.view(bottom - top, width, len(sources), high - low, width)
    rows = torch.arange(top, bottom, device=target.device)[:, None] - torch.arange(low, high, device=target.device)[None]
    far_rows = rows.abs() > settings.radius
    cosine.masked_fill_(far_columns[None, :, None, None, :], -torch.inf)
    cosine.masked_fill_(far_rows[:, None, None, :, None], -torch.inf)
    cosine = cosine.flatten(2).flatten(0, 1)  # [targets, sources]
    labels = labels[:, :, low:high].flatten(1)
    most = settings.neighbours
    best, index = cosine.topk(min(most + 1, cosine.shape[1]), dim=1)
    weights = (best[:, :most] / settings.temperature).softmax(1)
    found = (labels[:, index[:, :most]] * weights).sum(2)
    if best.shape[1] > most:
        # Sources as similar as the last that is kept stay, too; this is rare, and only such targets are done over all sources.
        tied = ((best[:, most] == best[:, most - 1]) & (best[:, most] > -torch.inf)).nonzero()[:, 0]
        if len(tied):
            all_of = cosine[tied]
            all_of.masked_fill_(all_of < best[tied, most - 1, None], -torch.inf)
            found[:, tied] = labels @ (all_of / settings.temperature).softmax(1).T
    return found.view(-1, bottom - top, width)


def hard_labels(soft: Tensor, scale: int) -> Tensor:
    """Soft labels [T, C, h, w] → uint8 [T, h·scale, w·scale]: bilinear, each channel with a positive maximum stretched to 0 … 1, argmax."""
    large = F.interpolate(soft.float(), scale_factor=scale, mode="bilinear", align_corners=False)
    least, most = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
    stretched = (large - least) / (most - least).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(most > 0, stretched, large).argmax(1).to(torch.uint8)
