"""Position embeddings at image sizes other than the stored one: timm's resampling, or that of DINO's code.

timm resizes bicubically with antialiasing to the exact grid. The code of DINO, iBOT and MaSSL (and DINOv2 without registers) resizes
bicubically without antialiasing, and by a factor of (patches + 0.1)/stored patches in each direction, so that the grid of places is not
quite the one of the patches (dino: vision_transformer.py, interpolate_pos_encoding).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from massl_fast.models.backbone import patch_size

DINO_OFFSET = 0.1


def prepare(backbone: nn.Module, image_size: int, method: str) -> list[str]:
    """Make ``backbone`` resample its position embeddings by ``method``, "timm" or "dino"; returns what there is to say at ``image_size``.

    Raises ValueError where patches do not divide ``image_size``, or where the network has no position embeddings that DINO's way fits.
    """
    patch, architecture = patch_size(backbone), backbone.timm_args["architecture"]
    if patch and image_size % patch:
        lower = image_size // patch * patch
        choices = " or ".join(str(side) for side in (lower, lower + patch) if side)
        raise ValueError(f"Images of {image_size} px are not divisible by the patch of {architecture}, {patch} px. Take {choices}.")
    if method == "dino":
        if type(backbone) is not VisionTransformer or backbone.pos_embed is None or not backbone.dynamic_img_size:
            raise ValueError(
                f"--position-embedding dino is for vision transformers with position embeddings of their own, and {architecture} is none. "
                "Leave it out."
            )
        backbone.__class__ = DinoPositions
        backbone.timm_args["position_embedding"] = "dino"
    elif method != "timm":
        raise ValueError(f"Position embeddings are resampled as timm or dino does, not {method!r}.")
    stored = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if not patch or stored is None or getattr(backbone, "pos_embed", None) is None or image_size // patch == stored[0]:
        return []
    way = "as DINO's code does" if method == "dino" else "as timm does; --position-embedding dino does it as DINO's code does"
    side = image_size // patch
    return [f"Position embeddings are resampled from {stored[0]}×{stored[1]} to {side}×{side} patches, {way}."]


class DinoPositions(VisionTransformer):
    """timm's vision transformer with DINO's resampling. A network becomes one by its ``__class__``; weights and names stay."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches [N, h, w, C] → tokens [N, P + h·w, C]."""
        old, new = tuple(self.patch_embed.grid_size), tuple(x.shape[1:3])
        count = 0 if self.no_embed_class else self.num_prefix_tokens
        prefix, patches = self.pos_embed[:, :count], self.pos_embed[:, count:]
        if new != old:
            with torch.autocast(x.device.type, enabled=False):
                patches = (dino_matrix(old, new, x.device) @ patches.float()).to(patches.dtype)
        tokens = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if count:
            tokens = [torch.cat(tokens, dim=1) + prefix]
        return self.pos_drop(torch.cat([*tokens, x.flatten(1, 2) + patches], dim=1))


@lru_cache(maxsize=16)
def dino_matrix(old: tuple[int, int], new: tuple[int, int], device: torch.device) -> Tensor:
    """DINO's resampling of a grid of position embeddings as a matrix, [h·w new, h·w old], float32."""
    basis = torch.eye(old[0] * old[1], device=device).view(1, -1, *old)
    factors = [(there + DINO_OFFSET) / here for there, here in zip(new, old)]
    resized = F.interpolate(basis, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
    return resized[0].flatten(1).T.contiguous()
