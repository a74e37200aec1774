"""Networks with a small head, and what a step on one process and a CPU stands on, as tests of several rooms build them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from massl_fast.distributed.world import World
from massl_fast.models.backbone import Encoder, build_backbone
from massl_fast.models.head import ProjectionHead
from massl_fast.models.precision import Precision

ONE_CPU = World(0, 1, 0, torch.device("cpu"))
FP32 = Precision("fp32", "test")


def with_head(backbone: nn.Module, hidden_dim: int = 16, out_dim: int = 8, **options: Any) -> Encoder:
    """``options``: of the encoder."""
    return Encoder(backbone, ProjectionHead(backbone.feature_dim, hidden_dim=hidden_dim, out_dim=out_dim), **options)


def small_encoder(architecture: str = "vit_tiny_patch16_224", *, image_size: int = 32, **options: Any) -> Encoder:
    """``options``: of ``build_backbone``."""
    return with_head(build_backbone(architecture, image_size=image_size, **options))
