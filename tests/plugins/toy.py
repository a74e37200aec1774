"""An objective and a loader in one file outside the package: prototypes, a predictor, a buffer and a metric of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from massl_fast.config import ObjectiveSettings
from massl_fast.data import loaders
from massl_fast.data.loader import Loader
from massl_fast.data.order import Batch
from massl_fast.models.heads import perceptron
from massl_fast.objectives import register
from massl_fast.objectives.base import Metric, Objective, Outcome


class ToySettings(ObjectiveSettings):
    """A toy: predicted assignments to a few prototypes agree with the teacher's, less a remembered mean."""

    name: str = "toy"
    prototypes: int = Field(6, ge=2)
    """Number of prototypes."""


class ToyHead(nn.Module):
    def __init__(self, width: int, prototypes: int, predicts: bool):
        super().__init__()
        self.mlp = perceptron([width, 8, 8])
        self.prototypes = nn.Parameter(torch.randn(prototypes, 8))
        self.predictor = perceptron([8, 8, 8]) if predicts else None

    def forward(self, features):
        rows = self.mlp(features)
        rows = rows if self.predictor is None else rows + self.predictor(rows)
        return {"logits": F.normalize(rows, dim=-1) @ F.normalize(self.prototypes, dim=-1).T}


class ToyObjective(Objective):
    Settings = ToySettings
    METRICS = (Metric("toy_agreement", "Agreement of toy assignments", note="Share of images with one assignment.", console="agreement"),)
    REMEMBERS = "toy mean"

    def __init__(self, prototypes: int):
        super().__init__()
        self.prototypes = prototypes
        self.register_buffer("mean", torch.zeros(prototypes))

    @classmethod
    def build(cls, config, precision, rank):
        return cls(config.objective.prototypes)

    def heads(self, feature_dim):
        return ToyHead(feature_dim, self.prototypes, True), ToyHead(feature_dim, self.prototypes, False)

    def forward(self, student, teacher, at):
        ours, theirs = student["logits"].view(-1, at.images, self.prototypes), teacher["logits"].view(-1, at.images, self.prototypes)
        targets = ((theirs - self.mean) / 0.1).softmax(-1)
        loss = -(targets[[1, 0]] * (ours[:2] / 0.2).log_softmax(-1)).sum(-1).mean()
        loss = loss - (targets[0] * (ours[2:] / 0.2).log_softmax(-1)).sum(-1).mean()
        agreement = (ours[0].argmax(-1) == ours[1].argmax(-1)).float().mean()
        return Outcome(loss, {"toy_agreement": agreement}, {"mean": theirs.mean((0, 1))})

    def commit_(self, carried, finite, at):
        seen = at.world.mean(torch.stack([each["mean"] for each in carried]).mean(0))
        self.mean.copy_(torch.where(finite, 0.9 * self.mean + 0.1 * seen, self.mean))
        return {}

    def loss_flops(self, views):
        return 0.0

    def line(self, world_size):
        return f"{self.prototypes} toy prototypes"


class ToyLoader(Loader):
    """Crops of noise, by (seed, step) alone."""

    name = "toy_noise"

    def _batches(self, start_step):
        for _, indices in self.order.micro_batches(start_step):
            crops = []
            for view, kind in enumerate(self.views):
                images = []
                for index in indices.tolist():
                    generator = torch.Generator().manual_seed(self.seed + 1000 * index + view)
                    images.append(torch.randn(3, kind.size, kind.size, generator=generator))
                crops.append(torch.stack(images).contiguous(memory_format=torch.channels_last))
            yield Batch(crops, torch.as_tensor(indices))


register(ToyObjective)
loaders.register(ToyLoader)
