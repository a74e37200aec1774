"""The projection head: from the backbone's feature to the unit embedding that the memory holds."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-6


class ProjectionHead(nn.Module):
    """Linear-GELU-…-Linear, then L2 normalisation (Learning from Memory, section 4: 2048, 2048, 256; no batch norm).

    Weights start truncated-normal with standard deviation 0.02, biases at 0. Parameters are ``mlp.0``, ``mlp.2``, ``mlp.4``.
    """

    def __init__(self, in_dim: int, *, hidden_dim: int = 2048, out_dim: int = 256, num_layers: int = 3) -> None:
        super().__init__()
        if min(in_dim, hidden_dim, out_dim, num_layers) < 1:
            raise ValueError(
                f"A projection head needs positive widths and at least one layer; found {num_layers} layers "
                f"of widths {in_dim}, {hidden_dim}, {out_dim}."
            )
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[..., in_dim] → [..., out_dim], unit rows, in float32 at least: 16 bits are too coarse to normalise in."""
        embeddings = self.mlp(features)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return F.normalize(embeddings, dim=-1, eps=NORM_EPSILON)
