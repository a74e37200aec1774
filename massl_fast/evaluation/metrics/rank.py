"""How many dimensions features use: label-free measures that fall when features collapse."""

from __future__ import annotations

import torch
from torch import Tensor

RANKME_FLOOR = 1e-7
LIDAR_RIDGE, LIDAR_FLOOR = 1e-4, 1e-8


@torch.no_grad()
def rankme(rows: Tensor) -> float:
    """exp of the entropy of the normalised singular values of [n, C]: 1 (all rows along one line) to min(n, C).

    Garrido et al. 2023 (*RankMe*), equation 1; rows are taken as they come, not centred. In float64. nan where a row is not finite.
    """
    rows = rows.double()
    if not rows.isfinite().all():
        return float("nan")
    # Singular values by the smaller of the two Gram matrices.
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return _exponential_of_entropy(values / values.sum().clamp(min=RANKME_FLOOR), RANKME_FLOOR)


@torch.no_grad()
def lidar(views: Tensor) -> float:
    """exp of the entropy of the eigenvalues of Σ_w^(-1/2) Σ_b Σ_w^(-1/2), of q views of n images [q, n, C]: how many directions tell
    images apart better than they tell views of an image apart; at most n - 1.

    Thilak et al. 2024 (*LiDAR*), equations 1 to 4, with ridge 1e-4 on the scatter within images. In float64. nan where a row is not finite.
    """
    views = views.double()
    if not views.isfinite().all():
        return float("nan")
    of_images = views.mean(0)
    between = (of_images - of_images.mean(0)).T @ (of_images - of_images.mean(0)) / max(1, len(of_images) - 1)
    spread = (views - of_images).flatten(0, 1)
    within = spread.T @ spread / max(1, len(of_images) * (len(views) - 1))
    values, vectors = torch.linalg.eigh(within + LIDAR_RIDGE * torch.eye(len(within), dtype=torch.float64, device=within.device))
    root = vectors * values.clamp(min=LIDAR_RIDGE).rsqrt()
    found = torch.linalg.eigvalsh(root.T @ between @ root).clamp(min=0)
    return _exponential_of_entropy(found / found.sum().clamp(min=LIDAR_FLOOR), LIDAR_FLOOR)


def _exponential_of_entropy(shares: Tensor, floor: float) -> float:
    shares = shares + floor
    return float(torch.exp(-(shares * shares.log()).sum()))
