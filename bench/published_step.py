"""A training step of MaSSL the way the published code takes it, written from its description: the reference path of ``bench_step.py``.
Those of the other objectives: ``published_objectives.py``.

What it does where ``massl_fast.engine.step`` does otherwise:

- one forward pass per crop size; position embeddings interpolated in each; attention as an explicit softmax;
- loss from materialised logits, a softmax and a log-softmax a pair of views (``kernels.reference``, whose entropies stand for the softmax
  over all views that the published code takes each step for its histograms), on a clone of the memory, which lies as columns [D, K];
- gradients clipped one parameter at a time, each norm read by the host; the teacher moved one parameter at a time;
- AdamW as ``torch.optim.AdamW(groups)`` gives it; the loss read by the host; the memory's pointer read by the host;
- a random permutation drawn on the CPU and copied to the device.

Left out, all in its favour: a pairwise-distance regulariser of weight 0, the teacher's softmax for every pair instead of every view, a
second clone of the memory. Mathematics, schedules and what enters the memory are those of ``TrainStep``, beside which
tests/engine/test_published_step.py holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from massl_fast.engine.schedules import StepSettings
from massl_fast.kernels import reference
from massl_fast.models.backbone import Encoder
from massl_fast.models.head import ProjectionHead
from massl_fast.models.precision import Precision


def published_encoder(backbone: torch.nn.Module, head: ProjectionHead) -> Encoder:
    """One pass per crop size, attention as an explicit softmax."""
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return Encoder(backbone, head, crops_pass="separate")


NUM_TEACHER_VIEWS = 2


class PlainStep:
    """Student, teacher and optimizer, moved on by one step a call; a subclass says what the loss is and what is remembered.

    ``student`` and ``teacher`` from ``published_encoder``; the teacher's parameters are a subset of the student's, by name.
    """

    def __init__(
        self, student: Encoder, teacher: Encoder, *, clip: float, precision: Precision, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self.student, self.teacher, self.clip, self.precision = student, teacher, clip, precision
        whole = student.state_dict()
        teacher.load_state_dict({name: whole[name] for name in teacher.state_dict()})
        teacher.requires_grad_(False)
        trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.trained = [p for _, p in trained]
        self.device = self.trained[0].device
        decayed = [p for n, p in trained if p.ndim > 1 and not n.endswith(".bias")]
        exempt = [p for n, p in trained if p.ndim <= 1 or n.endswith(".bias")]
        self.optimizer = torch.optim.AdamW([{"params": decayed}, {"params": exempt}], betas=betas)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.name == "fp16")
        named = dict(student.named_parameters())
        self.twins = [(named[name], p) for name, p in teacher.named_parameters()]

    def loss(self, crops: list[Tensor], settings: StepSettings, step: int) -> Tensor:
        """Of V crops [N, 3, H, W], the teacher's first; a 0-d tensor."""
        raise NotImplementedError

    def remember(self) -> None:
        """Called once the student has moved and the teacher followed."""

    def __call__(self, crops: list[Tensor], settings: StepSettings, step: int) -> float:
        """One step; returns the loss."""
        self.optimizer.param_groups[0].update(lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.optimizer.param_groups[1].update(lr=settings.learning_rate, weight_decay=0.0)
        with self.precision.autocast(self.device):
            loss = self.loss(crops, settings, step)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for ours, theirs in self.twins:
                theirs.mul_(settings.teacher_momentum).add_((1 - settings.teacher_momentum) * ours.detach())
            self.remember()
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"The loss of step {step} is {value}.")
        return value

    def _clip(self) -> None:
        for parameter in self.trained:
            norm = parameter.grad.norm(2).item()
            if (factor := self.clip / (norm + 1e-6)) < 1:
                parameter.grad.mul_(factor)


class PublishedStep(PlainStep):
    """MaSSL's. ``memory`` unit rows [K, D], K a multiple of the batch, as published; ``partition_of_step(step)`` a permutation of [0, K),
    by default a random one drawn on the CPU.
    """

    def __init__(
        self,
        student: Encoder,
        teacher: Encoder,
        memory: Tensor,
        *,
        block_size: int,
        student_temperature: float,
        clip: float,
        precision: Precision,
        betas: tuple[float, float] = (0.9, 0.999),
        partition_of_step: Callable[[int], Tensor] | None = None,
    ):
        super().__init__(student, teacher.eval(), clip=clip, precision=precision, betas=betas)
        self.memory = memory.T.contiguous()  # [D, K]
        self.pointer = torch.zeros(1, dtype=torch.int64)
        self.block_size, self.student_temperature = block_size, student_temperature
        self.weights = torch.ones(memory.shape[0])
        self.partition_of_step = partition_of_step or self._drawn

    def loss(self, crops: list[Tensor], settings: StepSettings, step: int) -> Tensor:
        images = len(crops[0])
        student = self.student(crops)
        with torch.no_grad():
            teacher = self.teacher(crops[:NUM_TEACHER_VIEWS])
        memory = self.memory.clone()
        self.entering = teacher.chunk(NUM_TEACHER_VIEWS)[1]
        loss, *_ = reference.memory_cross_entropy(
            student.view(len(crops), images, -1).to(memory.dtype),
            teacher.view(NUM_TEACHER_VIEWS, images, -1).to(memory.dtype),
            memory.T,
            self.partition_of_step(step),
            self.block_size,
            self.student_temperature,
            settings.own["teacher_temperature"],
        )
        return loss

    def remember(self) -> None:
        position = int(self.pointer)
        self.memory[:, position : position + len(self.entering)] = F.normalize(self.entering, dim=1, eps=1e-6).T
        self.pointer[0] = (position + len(self.entering)) % self.memory.shape[1]

    def _drawn(self, step: int) -> Tensor:
        return torch.multinomial(self.weights, len(self.weights)).to(self.device)
