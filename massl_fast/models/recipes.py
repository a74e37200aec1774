"""Named features of timm networks: which tokens of which blocks make the vector (or the map) that an evaluation reads.

| name | what | shape |
| --- | --- | --- |
| cls | [CLS] of the last block | [N, C] |
| cls4 | [CLS] of the last 4 blocks, the last block's last (DINO, iBOT and MaSSL: linear probe of ViT-S) | [N, 4C] |
| mean | mean of the last block's patch tokens (MMC) | [N, C] |
| cls+mean | cls, then mean (DINO, iBOT: linear probe of ViT-B) | [N, 2C] |
| cls+gem4 | cls, then the generalised mean of the patch tokens, 4th root of the mean 4th power (copy detection) | [N, 2C] |
| patches | patch tokens of the last block, row by row | [N, h·w, C] |
| pooled | the network's own pooled output | [N, C] |

Every token goes through the network's *final* norm, that of earlier blocks too, as the published code does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RECIPES = ("cls", "cls4", "mean", "cls+mean", "cls+gem4", "patches", "pooled")
GEM_FLOOR, GEM_POWER = 1e-6, 4


def features_of(backbone: nn.Module, images: Tensor, recipe: str) -> Tensor:
    """Features of ``images`` [N, 3, H, W] by a recipe's name; the shapes are in the table above.

    H and W may be any that the network takes. Raises ValueError where the network has no such features (``demand_recipe``).
    """
    demand_recipe(backbone, recipe)
    if recipe == "pooled" or (recipe == "cls" and _pools_class_token(backbone)):
        return backbone(images)
    blocks = 4 if recipe == "cls4" else 1
    layers = backbone.forward_intermediates(
        images, indices=blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    if recipe == "cls4":
        return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)
    # A network without prefix tokens gives no pairs.
    patches, prefix = layers[-1] if backbone.num_prefix_tokens else (layers[-1], None)
    if recipe == "patches":
        return patches
    if recipe == "mean":
        return patches.mean(1)
    if recipe == "cls+mean":
        return torch.cat([prefix[:, 0], patches.mean(1)], dim=1)
    if recipe == "cls+gem4":
        pooled = patches.clamp(min=GEM_FLOOR).pow(GEM_POWER).mean(1).pow(1 / GEM_POWER)
        return torch.cat([prefix[:, 0], pooled], dim=1)
    return prefix[:, 0]


def default_recipe(backbone: nn.Module) -> str:
    """cls where the network's own output is its class token, pooled otherwise."""
    return "cls" if _pools_class_token(backbone) else "pooled"


def demand_recipe(backbone: nn.Module, recipe: str) -> None:
    """Raise ValueError, saying why, where ``backbone`` cannot give the features of ``recipe``."""
    if recipe not in RECIPES:
        raise ValueError(f"There are no features named {recipe!r}. Choose one of {', '.join(RECIPES)}.")
    if recipe == "pooled":
        return
    name = type(backbone).__name__
    if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "num_prefix_tokens"):
        raise ValueError(f"Features {recipe} are made of a transformer's tokens, and {name} has none. Choose --features pooled.")
    if "cls" in recipe and getattr(backbone, "cls_token", None) is None:
        raise ValueError(f"Features {recipe} need a class token, and this {name} has none. Choose --features pooled, mean or patches.")
    if not isinstance(getattr(backbone, "fc_norm", None), (nn.Identity, type(None))):
        raise ValueError(
            f"Features {recipe} are tokens after the final norm, and this {name} has its norm after pooling. Choose --features pooled."
        )
    if recipe == "cls4" and len(backbone.blocks) < 4:
        raise ValueError(f"Features cls4 need 4 blocks, and this {name} has {len(backbone.blocks)}. Choose --features cls.")


def _pools_class_token(backbone: nn.Module) -> bool:
    return getattr(backbone, "global_pool", None) == "token" and getattr(backbone, "cls_token", None) is not None
