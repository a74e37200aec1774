"""Meters of collapse that objectives share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

METER_ROWS = 32
"""Rows whose assignments or similarities are laid out in full; more would cost memory of size rows × K."""


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


@torch.no_grad()
def positive_rank(query: Tensor, keys: Tensor, own: Tensor) -> Tensor:
    """Percentage of other keys that are nearer to a query than its own, mean over the first rows; equal ones count by half.

    ``query`` [R, D], ``keys`` [M, D], ``own`` int64 [R], each query's key. 0: all queries know their image; 50: none does, be it because
    all keys are alike or because they tell something else. Spread does not see a collapse behind batch norms: rows that were alike are 0
    there, rows on a line have a mean of 0.
    """
    query, keys = (F.normalize(rows.float(), dim=-1) for rows in (query[:METER_ROWS], keys))
    similarity = query @ keys.T
    mine = similarity.gather(1, own[:METER_ROWS, None])
    nearer = (similarity > mine).sum(1) + ((similarity == mine).sum(1) - 1) / 2
    return 100 * (nearer / max(1, len(keys) - 1)).mean()
