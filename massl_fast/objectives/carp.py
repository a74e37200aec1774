"""CARP: consistent assignments over random partitions of learned prototypes (Silva and Ramírez Rivera, NeurIPS 2023)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from massl_fast.config import Config
from massl_fast.config.objectives import CarpSettings
from massl_fast.kernels import partition_consistency
from massl_fast.length import Length
from massl_fast.models.heads import PrototypeHead
from massl_fast.models.precision import Precision
from massl_fast.objectives.base import At, Metric, Objective, Outcome, head_sizes, spread

UNEVEN = "block_entropy_nats"


class CarpObjective(Objective):
    """Remembers nothing. Every step cuts the prototypes into random blocks; within a block views of an image must agree (consistency) and
    prototypes must be used alike over the images of all ranks (entropy).

    Rows stay in float32: embeddings are not normalised, and in bf16 −log⟨s,t⟩ errs by 0.2 at a length of 320.
    """

    Settings = CarpSettings
    METRICS = (
        Metric(
            "consistency_nats",
            "Disagreement of views",
            "nats",
            note="−log⟨s,t⟩, mean over pairs and blocks.",
            console="terms",
            figure="Terms",
        ),
        Metric(
            UNEVEN,
            "Uneven use of prototypes",
            "nats",
            note="log K_b less the entropy of the mean assignment: 0 where all prototypes are used alike, ln(block size) after a collapse.",
            console="terms",
            figure="Terms",
        ),
        Metric("embedding_norm", "Length of the student's embeddings", note="Nothing bounds it; from some hundreds on precision suffers."),
        spread("embedding_spread", "Spread of the teacher's embeddings"),
    )

    def __init__(self, config: Config, partition_seed: int):
        super().__init__()
        self.config, self.partition_seed = config, partition_seed
        self.settings: CarpSettings = config.objective

    @classmethod
    def build(cls, config: Config, precision: Precision, rank: int) -> CarpObjective:
        return cls(config, config.run.seed)

    def heads(self, feature_dim: int) -> tuple[nn.Module, nn.Module]:
        sizes = head_sizes(self.config, feature_dim)
        student, teacher = (
            PrototypeHead(**sizes, prototypes=self.settings.prototypes, free_norm=False, batch_norm=True, unit=False) for _ in range(2)
        )
        return student, teacher

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], at: At) -> Outcome:
        """``embeddings`` [V·N, D] and [T·N, D] of any length, ``prototypes`` [K, D] of both sides."""
        z, w = (outputs["embeddings"].view(-1, at.images, outputs["embeddings"].shape[-1]) for outputs in (student, teacher))
        found = partition_consistency(
            z,
            w,
            student["prototypes"],
            teacher["prototypes"],
            block_size=self.settings.block_size,
            seed=self.partition_seed,
            step=at.step,
            sum_over_ranks=at.world.sum if at.world.size > 1 else None,
            backend=self.backend,
        )
        unit = torch.nn.functional.normalize(w.detach(), dim=-1)
        metrics = {
            "consistency_nats": found.consistency,
            "block_entropy_nats": found.entropy,
            "embedding_norm": z.detach().norm(dim=-1).mean(),
            "embedding_spread": 1 - unit.mean((0, 1)).square().sum(),
        }
        return Outcome(found.loss, metrics, {})

    def metrics(self) -> tuple[Metric, ...]:
        most = math.log(self.settings.block_size)
        return tuple(
            replace(metric, level=("ln(block size)", most), collapsed=("above", 0.9 * most) if metric.key == UNEVEN else None)
            if metric.figure == "Terms"
            else metric
            for metric in self.METRICS
        )

    def loss_flops(self, views: int) -> float:
        """4V + 2T products of one view's rows with all prototypes (kernels.consistency)."""
        return 2.0 * self.config.model.embedding_dim * self.settings.prototypes * (4 * views + 2 * self.teacher_views)

    @property
    def backend(self) -> str:
        return self.settings.backend if self.settings.backend != "auto" else "streaming"

    def line(self, world_size: int) -> str:
        settings = self.settings
        width = self.config.model.embedding_dim
        return f"backend {self.backend}; {settings.prototypes} prototypes of width {width}, random blocks of {settings.block_size}"

    def warnings(self, length: Length, num_images: int) -> list[str]:
        settings, sentences = self.settings, []
        if length.accumulation > 1:
            sentences.append(
                f"The entropy term of carp sees one micro-batch of all ranks, not the whole batch: a step of {length.accumulation} "
                f"micro-batches differs from one of {length.global_batch} images at once."
            )
        if settings.prototypes % settings.block_size:
            sentences.append(
                f"objective.block_size {settings.block_size} does not divide objective.prototypes {settings.prototypes}: "
                f"{settings.prototypes % settings.block_size} random prototypes sit out each step."
            )
        return sentences
