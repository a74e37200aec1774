"""MoCo v3: contrast of a predictor's queries with a moving average's keys of the same batch (Chen, Xie, He, ICCV 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from massl_fast.config import Config
from massl_fast.config.objectives import MocoV3Settings
from massl_fast.kernels import available_backends, contrast
from massl_fast.length import Length
from massl_fast.models.heads import ContrastHead
from massl_fast.models.precision import Precision
from massl_fast.objectives.base import At, Metric, Objective, Outcome, head_sizes, spread
from massl_fast.objectives.meters import positive_rank


class MocoV3Objective(Objective):
    """Remembers nothing: the keys are those of the step, of all ranks."""

    Settings = MocoV3Settings
    METRICS = (
        Metric("contrast_entropy_nats", "Entropy over keys", "nats", console="entropy"),
        Metric("positive_similarity", "Cosine of query and own key", figure="Similarity"),
        Metric(
            "positive_rank_percent",
            "Keys nearer to a query than its own",
            "%",
            note="Mean over the first queries of a rank. Near 50 queries tell nothing of their image: the representation has collapsed.",
            console="rank",
            collapsed=("above", 35.0),
        ),
        spread("embedding_spread", "Spread of the keys", figure="Similarity"),
    )

    place: Tensor

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.settings: MocoV3Settings = config.objective
        self.register_buffer("place", torch.zeros(()), persistent=False)  # moves with the objective, so that it knows its device

    @classmethod
    def build(cls, config: Config, precision: Precision, rank: int) -> MocoV3Objective:
        return cls(config, precision.dtype)

    def heads(self, feature_dim: int) -> tuple[nn.Module, nn.Module]:
        sizes = head_sizes(self.config, feature_dim)
        student, teacher = (
            ContrastHead(
                **sizes, predictor=predictor, last_batch_norm_of_predictor=self.settings.predictor_batch_norm, views=self.teacher_views
            )
            for predictor in (True, False)
        )
        return student, teacher

    def forward(self, student: Tensor, teacher: Tensor, at: At) -> Outcome:
        """Queries [2·N, D] and keys [2·N, D], not normalised: view a against the keys of view b ≠ a, both directions, times 2τ."""
        wide = torch.promote_types(student.dtype, torch.float32)
        query, key = (rows.to(wide).view(self.teacher_views, at.images, rows.shape[-1]) for rows in (student, teacher))
        own = torch.arange(at.images, device=query.device) + at.world.rank * at.images
        temperature = self.settings.temperature
        keys = [at.world.gather_rows(of_view) for of_view in key]
        found = [
            contrast(query[a], keys[1 - a], own, temperature=temperature, backend=self.settings.backend) for a in range(self.teacher_views)
        ]
        loss = 2 * temperature * (found[0].loss + found[1].loss)
        unit = torch.nn.functional.normalize(torch.cat(keys).detach(), dim=-1)
        metrics = {
            "contrast_entropy_nats": (found[0].entropy + found[1].entropy) / 2,
            "positive_similarity": (found[0].similarity + found[1].similarity) / 2,
            "positive_rank_percent": positive_rank(query[0], keys[1], own),
            "embedding_spread": 1 - unit.mean(0).square().sum(),
        }
        return Outcome(loss, metrics, {})

    def frozen(self, step: int, length: Length) -> tuple[str, ...]:
        return ("backbone.patch_embed.",) if self.settings.freeze_patch_embedding else ()

    def loss_flops(self, views: int) -> float:
        """Two products of each query with the keys of the global batch."""
        return 4.0 * self.config.model.embedding_dim * views * self.config.train.global_batch

    @property
    def backend(self) -> str:
        asked = self.settings.backend
        return asked if asked != "auto" else available_backends(self.place.device, self.dtype)[0]

    def line(self, world_size: int) -> str:
        return f"backend {self.backend}; contrast with the keys of the step, temperature {self.settings.temperature}"

    def warnings(self, length: Length, num_images: int) -> list[str]:
        if length.accumulation == 1:
            return []
        return [
            f"The contrast of moco_v3 sees the keys of one micro-batch of all ranks: a step of {length.accumulation} micro-batches differs "
            f"from one of {length.global_batch} images at once."
        ]
