"""Spherical k-means, all restarts at once: unit centroids, images assigned by largest inner product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 2**27
SPLIT = 1 / 1024


@dataclass(frozen=True)
class Clustering:
    centroids: Tensor
    """[K, D], unit rows, of the restart with the largest objective."""
    objectives: Tensor
    """[restarts], float64: Σ over images of the inner product with their centroid."""
    iterations: int
    """Until nothing moved in any restart, or the limit."""


@torch.no_grad()
def spherical_kmeans(
    features: Tensor, num_clusters: int, *, restarts: int = 10, iterations: int = 100, seed: int = 0, start: str = "random"
) -> Clustering:
    """Centroids that maximise Σ over images of the largest inner product (Dhillon & Modha 2001).

    Restarts are a batch dimension: one product serves all. An empty cluster takes half of the largest one. Equal inner products go to the
    lower centroid. The result follows from `seed` alone on one kind of device.

    Args:
        features [n, D]: float32, not necessarily of unit length, on the device that does the work.
        start: `random` rows, or `plus`: k-means++ (rows drawn by 1 - cosine to the nearest centroid so far).

    Raises:
        ValueError: fewer images than clusters, a count below one, features that are not finite.
    """
    count = len(features)
    if min(num_clusters, restarts, iterations) < 1:
        raise ValueError(f"k-means needs clusters, restarts and iterations of at least 1, not {num_clusters}, {restarts} and {iterations}.")
    if count < num_clusters:
        raise ValueError(f"{count} images cannot be put into {num_clusters} clusters; take at most as many clusters as images.")
    if not features.isfinite().all():
        raise ValueError("Some features are not finite; k-means has no place for them.")
    features = features.float()
    generator = torch.Generator().manual_seed(seed)
    with torch.autocast(features.device.type, enabled=False):
        centroids = torch.stack([_starting_rows(features, num_clusters, start, generator) for _ in range(restarts)])
        before = None
        for iteration in range(1, iterations + 1):  # noqa: B007
            assignment, objective = assign(features, centroids)
            if before is not None and torch.equal(assignment, before):
                break
            before = assignment
            centroids = _updated(features, assignment, centroids)
        assignment, objective = assign(features, centroids)
    return Clustering(centroids[objective.argmax()], objective.cpu(), iteration)


def assign(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [R, n]: centroid of the largest inner product, float64 [R]: sum of those products).

    Args:
        features [n, D], centroids [R, K, D].
    """
    restarts, clusters, _ = centroids.shape
    chunk = max(1, CHUNK_BYTES // (4 * restarts * clusters))
    best, total = [], torch.zeros(restarts, dtype=torch.float64, device=features.device)
    for some in features.split(chunk):
        value, index = (some @ centroids.flatten(0, 1).T).view(-1, restarts, clusters).max(2)
        total += value.double().sum(0)
        best.append(index.T)
    return torch.cat(best, 1), total


def _updated(features: Tensor, assignment: Tensor, centroids: Tensor) -> Tensor:
    """Normalised sums of the images of each cluster, by products with one-hot rows: the same on every run, which atomic sums are not."""
    restarts, clusters, width = centroids.shape
    sums, sizes = torch.zeros_like(centroids), torch.zeros(restarts, clusters, dtype=torch.int64, device=features.device)
    chunk = max(1, CHUNK_BYTES // (4 * restarts * clusters))
    for some, index in zip(features.split(chunk), assignment.split(chunk, 1)):
        member = F.one_hot(index, clusters)
        sizes += member.sum(1)
        sums += (member.to(features.dtype).transpose(1, 2).reshape(-1, len(some)) @ some).view_as(sums)
    updated = F.normalize(sums, dim=2)
    for restart, cluster in (sizes == 0).nonzero().tolist():
        largest = int(sizes[restart].argmax())
        sign = torch.where(torch.arange(width, device=features.device) % 2 == 0, SPLIT, -SPLIT)
        updated[restart, cluster] = F.normalize(updated[restart, largest] * (1 + sign), dim=0)
        updated[restart, largest] = F.normalize(updated[restart, largest] * (1 - sign), dim=0)
        half = sizes[restart, largest] // 2
        sizes[restart, cluster], sizes[restart, largest] = half, sizes[restart, largest] - half
    return updated


def _starting_rows(features: Tensor, num_clusters: int, start: str, generator: torch.Generator) -> Tensor:
    if start == "random":
        rows = torch.randperm(len(features), generator=generator)[:num_clusters].to(features.device)
        return F.normalize(features[rows], dim=1)
    if start != "plus":
        raise ValueError(f"k-means can start at random rows (random) or by k-means++ (plus), not by {start!r}.")
    unit = F.normalize(features, dim=1)
    chosen = [int(torch.randint(len(unit), (1,), generator=generator))]
    distance = 1 - unit @ unit[chosen[0]]
    while len(chosen) < num_clusters:
        weight = distance.clamp_min(0).double().cpu()
        weight[chosen] = 0
        if not weight.sum() > 0:  # fewer distinct rows than clusters
            weight = torch.ones_like(weight)
            weight[chosen] = 0
        place = torch.rand((), generator=generator, dtype=torch.float64) * weight.sum()
        chosen.append(int(torch.searchsorted(weight.cumsum(0), place, right=True).clamp_max(len(unit) - 1)))
        distance = torch.minimum(distance, 1 - unit @ unit[chosen[-1]])
    return unit[chosen]
