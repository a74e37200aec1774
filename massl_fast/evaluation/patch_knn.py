"""k-NN on patches: every pixel of a patch takes the label that its k nearest training patches have there most often (CAPI's protocol)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from massl_fast.evaluation.metrics.segmentation import IGNORED

QUERY_CHUNK = 1024
KEY_CHUNK = 32768
VOTE_CHUNK = 128
METRICS = ("cosine", "L2")


def most_frequent(labels: np.ndarray) -> np.ndarray:
    """The most frequent of the labels [..., n] (from 0), the smallest of equals: [...]."""
    values, codes = np.unique(labels, return_inverse=True)
    codes = codes.reshape(-1, labels.shape[-1])
    cells = np.arange(len(codes))[:, None] * len(values) + codes
    counts = np.bincount(cells.ravel(), minlength=len(codes) * len(values)).reshape(len(codes), len(values))
    return values[counts.argmax(1)].reshape(labels.shape[:-1])


@torch.no_grad()
def nearest_patches(queries: Tensor, keys: Tensor, k: int, metric: str) -> Tensor:
    """Positions [q, k] of the nearest keys, nearest first, by cosine or by Euclidean distance (L2)."""
    if metric not in METRICS:
        raise ValueError(f"Patches can be compared by {' or '.join(METRICS)}, not by {metric!r}.")
    if not 1 <= k <= len(keys):
        raise ValueError(f"There are {len(keys)} labelled training patches; {k} nearest ones cannot be taken from them.")
    if metric == "cosine":
        queries, keys = F.normalize(queries.float(), dim=1), F.normalize(keys.float(), dim=1)
    nearest = []
    for some in queries.float().split(QUERY_CHUNK):
        values = torch.empty(len(some), 0, device=some.device)
        indices = torch.empty(len(some), 0, dtype=torch.int64, device=some.device)
        for start in range(0, len(keys), KEY_CHUNK):
            block = keys[start : start + KEY_CHUNK].float()
            # |q - k|² less |q|², which orders no key: as exact as the product.
            score = some @ block.T if metric == "cosine" else 2 * some @ block.T - block.square().sum(1)
            best, index = score.topk(min(k, len(block)), dim=1)
            values, indices = torch.cat([values, best], 1), torch.cat([indices, index + start], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            indices = indices.gather(1, order)
        nearest.append(indices)
    return torch.cat(nearest)


def patch_knn(
    train: Tensor, train_pixels: np.ndarray, test: Tensor, ks: Sequence[int], *, metric: str = "cosine", ignore: int = IGNORED
) -> dict[int, np.ndarray]:
    """{k: labels of the pixels of the test patches, [m, pixels]}.

    Args:
        train [n, C], test [m, C]: features of patches, on one device.
        train_pixels [n, pixels]: uint8 labels of the pixels of each training patch; patches that are mostly `ignore` are left out.
    """
    kept = np.flatnonzero(most_frequent(train_pixels) != ignore)
    if len(kept) == 0:
        raise ValueError("No training patch has a label: all are void.")
    keys, pixels = train[torch.from_numpy(kept).to(train.device)], train_pixels[kept]
    nearest = nearest_patches(test, keys, min(max(ks), len(kept)), metric).cpu().numpy()
    return {k: np.concatenate([most_frequent(pixels[rows[:, :k]].transpose(0, 2, 1)) for rows in _chunks(nearest)]) for k in ks}


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    """Rows cut into parts whose votes, one counter per pixel and label, stay small."""
    return [rows[start : start + VOTE_CHUNK] for start in range(0, len(rows), VOTE_CHUNK)]
