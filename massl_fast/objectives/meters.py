"""Meters of collapse that objectives share."""

from __future__ import annotations

import torch
from torch import Tensor

METER_ROWS = 32
"""Rows whose assignments are laid out in full; more would cost memory of size rows × K."""


@torch.no_grad()
def assignment_meters(rows: Tensor, keys: Tensor, temperature: float | Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Entropy of the assignments softmax(row · keyᵀ/τ + bias), and what they tell of their image, of the first rows of view 0.

    ``rows`` [T, N, D], ``keys`` [K, D]. Entropy of the mean assignment less the mean entropy, in nats, at most ln(rows): 0 where all images
    share one assignment, be it a single prototype or all alike.
    """
    logits = (rows[0, :METER_ROWS].float() @ keys.float().T) / temperature
    logarithms = torch.log_softmax(logits if bias is None else logits + bias.float(), dim=-1)
    assignments = logarithms.exp()
    entropy = -(assignments * logarithms).sum(-1).mean()
    of_the_mean = torch.special.entr(assignments.mean(0)).sum()
    return {"teacher_entropy_nats": entropy, "assignment_information_nats": of_the_mean - entropy}
