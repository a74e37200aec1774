"""How a protocol that tries several heads says which one it reports: both ways, by name."""

from __future__ import annotations

import torch
from torch import Tensor

BEST = "best on test, as published"
CHOSEN = "chosen on held-out training images"


def validation_of(text: str) -> tuple[float, str | None]:
    """(share of the training images to hold out, or 0; path of images of their own, or None) of a setting ``validation``.

    Raises ValueError for a number that is no share.
    """
    try:
        share = float(text)
    except ValueError:
        return 0.0, text
    if not 0 <= share < 1:
        raise ValueError(f"The share of training images to hold out is {text}; it must be at least 0 and below 1, or a path.")
    return share, None


def held_out(count: int, share: float, seed: int) -> Tensor:
    """Positions [round(share · count), at least 1] of the images to hold out, ascending; drawn by ``seed`` alone.

    Raises ValueError where none would be left to train on.
    """
    number = max(1, round(share * count))
    if number >= count:
        raise ValueError(f"None of {count} training images would be left if {share:g} of them are held out. Set validation to 0.")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:number].sort().values
