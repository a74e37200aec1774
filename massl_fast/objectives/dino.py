"""DINO: self-distillation over learned prototypes, kept apart by a centre (Caron et al., ICCV 2021) or by Sinkhorn-Knopp (DINOv2, 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from massl_fast.config import Config, ObjectiveSettings
from massl_fast.config.objectives import DinoSettings, PrototypeSettings
from massl_fast.kernels import available_backends, prototype_cross_entropy, sinkhorn_bias
from massl_fast.length import Length, linear
from massl_fast.models.heads import PrototypeHead
from massl_fast.models.precision import Precision
from massl_fast.objectives.base import At, Curve, Metric, Objective, Outcome, head_sizes, spread
from massl_fast.objectives.meters import assignment_meters

LAST_LAYER = "head.last_layer."


class DinoObjective(Objective):
    """Owns the centre [K]; the prototypes are the last layer of the heads, the teacher's a moving average of the student's."""

    Settings: ClassVar[type[ObjectiveSettings]] = DinoSettings
    METRICS: ClassVar[tuple[Metric, ...]] = (
        Metric("student_entropy_nats", "Entropy of the student's assignments", "nats", console="entropy", figure="Entropy"),
        Metric("teacher_entropy_nats", "Entropy of the teacher's assignments", "nats", console="entropy", figure="Entropy"),
        Metric(
            "assignment_information_nats",
            "What an assignment tells of its image",
            "nats",
            note="Entropy of the mean assignment less the mean entropy. Near 0 all images share one assignment: it has collapsed.",
            collapsed=("below", 0.01),
            console="information",
        ),
        spread("embedding_spread", "Spread of the teacher's embeddings"),
        Metric("center_norm", "Norm of the centre"),
        Metric("teacher_temperature", "Temperature of the teacher's softmax"),
    )
    REMEMBERS = "centre"

    center: Tensor

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.settings: PrototypeSettings = config.objective
        sinkhorn = isinstance(self.settings, DinoSettings) and self.settings.centering == "sinkhorn"
        self.sinkhorn_rounds = self.settings.sinkhorn_iterations if sinkhorn else 0  # 0: a centre
        self.register_buffer("center", torch.zeros(self.settings.prototypes))

    @classmethod
    def build(cls, config: Config, precision: Precision, rank: int) -> DinoObjective:
        return cls(config, precision.dtype)

    def heads(self, feature_dim: int) -> tuple[nn.Module, nn.Module]:
        sizes = head_sizes(self.config, feature_dim)
        student, teacher = (
            PrototypeHead(
                **sizes, prototypes=self.settings.prototypes, free_norm=not self.settings.freeze_norm, batch_norm=False, unit=True
            )
            for _ in range(2)
        )
        return student, teacher

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], at: At) -> Outcome:
        """``embeddings`` [V·N, D] and [T·N, D] unit rows, ``prototypes`` [K, D] of both sides."""
        z, w = (outputs["embeddings"].view(-1, at.images, outputs["embeddings"].shape[-1]) for outputs in (student, teacher))
        keys, teacher_keys = student["prototypes"], teacher["prototypes"]
        if LAST_LAYER in at.frozen and at.world.size == 1:
            keys = keys.detach()  # spares the read-back; replicas exchange gradients of all parameters, used or not
        temperature = at.schedules["teacher_temperature"]
        z, w, keys, teacher_keys = (tensor.to(self._dtype_of(tensor)) for tensor in (z, w, keys, teacher_keys))
        bias = self.teacher_bias(w, teacher_keys, temperature, at)
        found = prototype_cross_entropy(
            z,
            w,
            keys,
            teacher_keys,
            key_bias=bias,
            student_temp=self.settings.student_temperature,
            teacher_temp=temperature,
            backend=self.settings.backend,
        )
        metrics = {"student_entropy_nats": found.student_entropy} | assignment_meters(w, teacher_keys, temperature, bias)
        return Outcome(found.loss, metrics, {"mean": w.to(self.center.dtype).mean((0, 1)), "prototypes": teacher_keys})

    def teacher_bias(self, rows: Tensor, keys: Tensor, temperature: float | Tensor, at: At) -> Tensor:
        """What is added to the teacher's logits, [K]: the centre taken off, or Sinkhorn-Knopp's assignment of the rows of all ranks."""
        if self.sinkhorn_rounds:
            return sinkhorn_bias(
                rows,
                keys,
                temperature=temperature,
                iterations=self.sinkhorn_rounds,
                sum_over_ranks=at.world.sum,
                backend=self.settings.backend,
            )
        return -self.center / temperature

    def commit_(self, carried: Sequence[dict[str, Tensor]], finite: Tensor, at: At) -> dict[str, Tensor]:
        """centre ← m·centre + (1 − m)·mean(w)·C′ᵀ over all ranks; the mean embedding travels, not K logits."""
        mean = at.world.mean(torch.stack([each["mean"] for each in carried]).mean(0))
        if not self.sinkhorn_rounds:
            move_center_(self.center, self.settings.center_momentum, mean, carried[-1]["prototypes"], finite)
        return {"embedding_spread": 1 - mean.square().sum()}

    def readings(self, step: int, length: Length) -> dict[str, float]:
        return {"center_norm": self.center.norm().item()}

    def schedules(self, length: Length) -> dict[str, Curve]:
        settings = self.settings
        warm_up = settings.teacher_temperature_warmup_epochs * length.steps_per_epoch
        start, end = settings.teacher_temperature_start, settings.teacher_temperature
        return {"teacher_temperature": lambda step: linear(step, start, end, warm_up)}

    def frozen(self, step: int, length: Length) -> tuple[str, ...]:
        return (LAST_LAYER,) if step < self.settings.freeze_last_layer_epochs * length.steps_per_epoch else ()

    def metrics(self) -> tuple[Metric, ...]:
        level = ("ln(prototypes)", math.log(self.settings.prototypes))
        return tuple(replace(metric, level=level) if metric.figure == "Entropy" else metric for metric in self.METRICS)

    def loss_flops(self, views: int) -> float:
        """Two products per row forward, two more for the gradient of the prototypes."""
        return 8.0 * self.config.model.embedding_dim * (views + self.teacher_views) * self.settings.prototypes

    @property
    def backend(self) -> str:
        asked = self.settings.backend
        return asked if asked != "auto" else available_backends(self.center.device, self.dtype)[0]

    def line(self, world_size: int) -> str:
        settings = self.settings
        kept = f"{self.sinkhorn_rounds} rounds of Sinkhorn-Knopp" if self.sinkhorn_rounds else "the centre"
        return f"backend {self.backend}; {settings.prototypes} prototypes of width {self.config.model.embedding_dim}, apart by {kept}"

    def warnings(self, length: Length, num_images: int) -> list[str]:
        settings = self.settings
        problems = {
            f"objective.teacher_temperature {settings.teacher_temperature} is not below objective.student_temperature "
            f"{settings.student_temperature}: a teacher as soft as its student does not sharpen, and training tends to the uniform "
            f"assignment.": settings.teacher_temperature >= settings.student_temperature,
        }
        problems[
            f"Sinkhorn-Knopp sees one micro-batch of all ranks: a step of {length.accumulation} micro-batches differs from one of "
            f"{length.global_batch} images at once."
        ] = bool(self.sinkhorn_rounds) and length.accumulation > 1
        return [sentence for sentence, holds in problems.items() if holds]

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if tensor.dtype == torch.float64 else self.dtype


def move_center_(center: Tensor, momentum: float, mean: Tensor, prototypes: Tensor, finite: Tensor) -> None:
    """centre [K] ← momentum · centre + (1 − momentum) · prototypes [K, D] · mean [D] (DINO, equation 4), where ``finite`` is true."""
    moved = momentum * center + (1 - momentum) * (prototypes.to(mean.dtype) @ mean)
    center.copy_(torch.where(finite, moved, center))
