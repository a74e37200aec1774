"""Heads of objectives with prototypes or predictors: multi-layer perceptrons with batch norms, and last layers with weight norm."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def perceptron(
    widths: list[int],
    *,
    activation: type[nn.Module] = nn.GELU,
    bias: bool = True,
    batch_norm: bool = False,
    last_batch_norm: bool = False,
) -> nn.Sequential:
    """Linear layers between ``widths``, each but the last followed by a batch norm (where ``batch_norm``) and ``activation``.

    ``last_batch_norm``: a batch norm without scale and shift behind the last layer (MoCo v3). Batch norms take the place of nothing: with
    ``bias`` the linear layers keep theirs.
    """
    layers: list[nn.Module] = []
    for index, (width, next_width) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(width, next_width, bias=bias))
        if index < len(widths) - 2:
            layers += [nn.BatchNorm1d(next_width)] * batch_norm + [activation()]
        elif last_batch_norm:
            layers.append(nn.BatchNorm1d(next_width, affine=False))
    return nn.Sequential(*layers)


def truncated_normal_(module: nn.Module, deviation: float = 0.02) -> None:
    """Weights of linear layers truncated-normal, biases 0, as DINO's heads start."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Prototypes(nn.Module):
    """A last layer with weight norm: C = g · v/|v| row by row, [K, D]. ``v`` starts as a linear layer's weight, ``g`` [K, 1] as 1.

    ``free_norm``: whether g learns; otherwise prototypes stay on the unit sphere.
    """

    def __init__(self, count: int, width: int, *, free_norm: bool) -> None:
        super().__init__()
        self.v = nn.Parameter(nn.Linear(width, count, bias=False).weight.detach().clone())
        self.g = nn.Parameter(torch.ones(count, 1), requires_grad=free_norm)

    def forward(self) -> Tensor:
        # PyTorch's fused weight norm, as nn.utils.parametrizations calls it: one pass each way, where g · normalize(v) takes five backward.
        return torch._weight_norm(self.v, self.g, 0)


class PrototypeHead(nn.Module):
    """A perceptron and prototypes: what DINO, iBOT and CARP compare are its embeddings with its prototypes.

    Parameters are ``mlp.*`` and ``last_layer.v``, ``last_layer.g``. ``unit``: embeddings are normalised (DINO, iBOT) or not (CARP).
    """

    def __init__(
        self, in_dim: int, *, hidden_dim: int, out_dim: int, num_layers: int, prototypes: int, free_norm: bool, batch_norm: bool, unit: bool
    ) -> None:
        super().__init__()
        self.mlp = perceptron([in_dim, *[hidden_dim] * (num_layers - 1), out_dim], batch_norm=batch_norm)
        truncated_normal_(self.mlp)
        self.last_layer = Prototypes(prototypes, out_dim, free_norm=free_norm)
        self.unit = unit

    def embed(self, features: Tensor) -> Tensor:
        """[..., in_dim] → [..., out_dim] in float32 at least: 16 bits are too coarse to normalise in."""
        embeddings = self.mlp(features)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return F.normalize(embeddings, dim=-1) if self.unit else embeddings

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """``embeddings`` [n, D] of features [n, C], and ``prototypes`` [K, D]."""
        with torch.autocast(features.device.type, enabled=False):
            prototypes = self.last_layer()
        return {"embeddings": self.embed(features), "prototypes": prototypes}


class PatchPrototypeHead(PrototypeHead):
    """A ``PrototypeHead`` for class tokens and patches, with the vector that stands for masked patches on the student's side (iBOT).

    ``shared``: patches have the prototypes of class tokens; otherwise a last layer of their own, ``patch_last_layer``.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        hidden_dim: int,
        out_dim: int,
        num_layers: int,
        prototypes: int,
        free_norm: bool,
        shared: bool,
        mask_token: bool,
    ) -> None:
        super().__init__(
            in_dim,
            hidden_dim=hidden_dim,
            out_dim=out_dim,
            num_layers=num_layers,
            prototypes=prototypes,
            free_norm=free_norm,
            batch_norm=False,
            unit=True,
        )
        self.patch_last_layer = None if shared else Prototypes(prototypes, out_dim, free_norm=free_norm)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(in_dim))

    def forward(self, features: Tensor, patches: Tensor) -> dict[str, Tensor]:  # type: ignore[override]  # patches are not optional here
        """Class tokens [n, C] and patches [m, C] become ``embeddings`` [n, D], ``patch_embeddings`` [m, D], ``prototypes`` and
        ``patch_prototypes`` [K, D]."""
        found = super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            keys = found["prototypes"] if self.patch_last_layer is None else self.patch_last_layer()
        return found | {"patch_embeddings": self.embed(patches), "patch_prototypes": keys}


class ClassPatchPixelHead(nn.Module):
    """Perceptrons for class tokens and for patches and, on the student's side, a decoder from patch tokens to pixels (MMC).

    Parameters are ``class_mlp.*``, ``patch_mlp.*`` and ``decoder.*``. ``pixels``: values of a patch, 3·side²; 0: no decoder.
    """

    def __init__(self, in_dim: int, *, hidden_dim: int, out_dim: int, num_layers: int, pixels: int) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.class_mlp, self.patch_mlp = perceptron(widths), perceptron(widths)
        self.decoder = perceptron([in_dim, hidden_dim, pixels]) if pixels else None
        truncated_normal_(self)

    def forward(self, features: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Class tokens [n, C] and patches [m, C] become ``class_embeddings`` [n, D], ``patch_embeddings`` [m, D], and ``pixels``
        [m, 3·side²] in the order channel, row, column."""
        found = {"class_embeddings": self.class_mlp(features), "patch_embeddings": self.patch_mlp(patches)}
        return found if self.decoder is None else found | {"pixels": self.decoder(patches)}


class ContrastHead(nn.Module):
    """A projector and, on the student's side, a predictor behind it (MoCo v3, section 4): ReLU, batch norms, no biases.

    Parameters are ``projector.*`` and ``predictor.*``. ``views``: features come view-major, and batch norms take the statistics of one view
    at a time, as where each view has a pass of its own.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        hidden_dim: int,
        out_dim: int,
        num_layers: int,
        predictor: bool,
        last_batch_norm_of_predictor: bool = True,
        views: int = 1,
    ) -> None:
        super().__init__()
        self.views = views
        projector = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.projector = perceptron(projector, activation=nn.ReLU, bias=False, batch_norm=True, last_batch_norm=True)
        self.predictor: nn.Module = nn.Identity()
        if predictor:
            self.predictor = perceptron(
                [out_dim, hidden_dim, out_dim],
                activation=nn.ReLU,
                bias=False,
                batch_norm=True,
                last_batch_norm=last_batch_norm_of_predictor,
            )

    def forward(self, features: Tensor) -> Tensor:
        """[n, C] → [n, D], not normalised."""
        return torch.cat([self.predictor(self.projector(of_view)) for of_view in features.chunk(self.views)])
