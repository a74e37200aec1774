"""Training steps of MaSSL, DINO, iBOT, CARP, MoCo v3 and MMC the way published code takes them: the reference paths of ``bench_step.py``,
written from descriptions. What they do where ``massl_fast.engine.step`` does otherwise:

- one forward pass per crop size; position embeddings interpolated in each; attention as an explicit softmax;
- gradients clipped one parameter at a time, each norm read by the host; the teacher moved one parameter at a time;
- AdamW as ``torch.optim.AdamW(groups)`` gives it; the loss read by the host.

What is each one's own:

- MaSSL: loss from materialised logits, a softmax and a log-softmax per pair of views (``kernels.reference``, whose entropies stand for the
  softmax over all views that the published code takes each step for its histograms), on a clone of the memory, which lies as columns
  [D, K]; its pointer read by the host; a random permutation drawn on the CPU and copied to the device.
- DINO: logits of all views, a log-softmax per pair of views; the centre from the teacher's logits.
- iBOT: every patch of every crop goes through the student's head and last layer, those of local crops to no use, and every patch of the
  global crops through the teacher's; the mask falls on the losses.
- CARP: probabilities of all blocks, of all views of both sides.
- MoCo v3: each crop through network and head by itself.
- MMC, whose code is not known: as MoCo v3; all patches through both heads and the decoder, similarities of all patches of a view laid out.

Left out, all in their favour: of MaSSL a pairwise-distance regulariser of weight 0, the teacher's softmax for every pair instead of every
view, and a second clone of the memory; of the others drawing of masks and corruption, which published code does in its loaders, and all
telemetry. Mathematics, schedules and what is remembered are those of ``TrainStep`` and ``massl_fast.objectives``, beside which
tests/engine/test_published_step.py and tests/objectives/test_published_ways.py hold every one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from massl_fast.benchmarks.objectives import cross_entropy, over_pairs, published_consistency, published_contrast
from massl_fast.engine.schedules import StepSettings
from massl_fast.kernels import reference
from massl_fast.models.backbone import Encoder
from massl_fast.models.precision import Precision


def published_encoder(backbone: torch.nn.Module, head: torch.nn.Module) -> Encoder:
    """One pass per crop size, attention as an explicit softmax."""
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return Encoder(backbone, head, crops_pass="separate")


T = 2
"""Teacher views."""


@dataclass
class Drawn:
    """What a loader brings beside the crops."""

    mask: Tensor | None = None
    """bool [2·N, P]: masked or corrupted patches of the global crops."""
    corrupted: list[Tensor] | None = None
    """Crops as the student sees them; None: as the teacher does."""
    partition: Tensor | None = None
    """int64 [K]."""


class Published:
    """Student, teacher and optimizer, moved on by one step per call; a subclass says what the loss is and what is remembered.

    ``student`` and ``teacher`` from ``published_encoder``; the teacher's parameters are a subset of the student's, by name. ``objective``
    are the settings of ``config.objective``; ``drawn(step)`` what a loader or the host drew.
    """

    def __init__(
        self, student: Encoder, teacher: Encoder, objective: Any, drawn: Callable[[int], Drawn], *, clip: float, precision: Precision
    ) -> None:
        self.student, self.teacher, self.clip, self.precision = student, teacher, clip, precision
        self.objective, self.drawn = objective, drawn
        whole = student.state_dict()
        teacher.load_state_dict({name: whole[name] for name in teacher.state_dict()})
        teacher.requires_grad_(False).train()  # batch norms of a teacher take the batch's own statistics
        trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.trained = [p for _, p in trained]
        self.device = self.trained[0].device
        decayed = [p for n, p in trained if p.ndim > 1 and not n.endswith(".bias")]
        exempt = [p for n, p in trained if p.ndim <= 1 or n.endswith(".bias")]
        self.optimizer = torch.optim.AdamW([{"params": decayed}, {"params": exempt}])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.name == "fp16")
        named = dict(student.named_parameters())
        self.twins = [(named[name], p) for name, p in teacher.named_parameters()]
        self.center = self.patch_center = torch.zeros((), device=self.device)
        self.seen: list[Tensor] = []

    def loss(self, crops: list[Tensor], settings: StepSettings, step: int) -> Tensor:
        """Of V crops [N, 3, H, W], the teacher's first; a 0-d tensor."""
        raise NotImplementedError

    def remember(self) -> None:
        """Called once the student has moved and the teacher followed: centres move by the logits that the loss has seen."""
        for name, momentum, logits in zip(("center", "patch_center"), ("center_momentum", "patch_center_momentum"), self.seen):
            share = getattr(self.objective, momentum)
            setattr(self, name, share * getattr(self, name) + (1 - share) * logits.flatten(0, -2).mean(0))
        self.seen = []

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


class Massl(Published):
    """``memory`` holds unit rows [K, D], K a multiple of the batch, as published."""

    def __init__(self, student: Encoder, teacher: Encoder, *others, memory: Tensor, **more) -> None:
        super().__init__(student, teacher, *others, **more)
        teacher.eval()
        self.memory = memory.T.contiguous()  # [D, K]
        self.pointer = torch.zeros(1, dtype=torch.int64)

    def loss(self, crops: list[Tensor], settings: StepSettings, step: int) -> Tensor:
        images = len(crops[0])
        student = self.student(crops)
        with torch.no_grad():
            teacher = self.teacher(crops[:T])
        memory = self.memory.clone()
        self.entering = teacher.chunk(T)[1]
        loss, *_ = reference.memory_cross_entropy(
            student.view(len(crops), images, -1).to(memory.dtype),
            teacher.view(T, images, -1).to(memory.dtype),
            memory.T,
            self.drawn(step).partition,
            self.objective.block_size,
            self.objective.student_temperature,
            settings.own["teacher_temperature"],
        )
        return loss

    def remember(self) -> None:
        position = int(self.pointer)
        self.memory[:, position : position + len(self.entering)] = F.normalize(self.entering, dim=1, eps=1e-6).T
        self.pointer[0] = (position + len(self.entering)) % self.memory.shape[1]


class Dino(Published):
    def loss(self, crops: list[Tensor], settings: StepSettings, step: int) -> Tensor:
        student = logits(self.student(crops))
        with torch.no_grad():
            teacher = logits(self.teacher(crops[:T]))
        self.seen = [teacher]
        return self.of_pairs(student.chunk(len(crops)), teacher, settings.own["teacher_temperature"])

    def of_pairs(self, students: tuple[Tensor, ...], teacher: Tensor, temperature: float) -> Tensor:
        scaled = [each / self.objective.student_temperature for each in students]
        targets = ((teacher - self.center) / temperature).softmax(-1).chunk(T)
        return over_pairs(scaled, targets, cross_entropy)


class Ibot(Dino):
    def loss(self, crops: list[Tensor], settings: StepSettings, step: int) -> Tensor:
        mask = self.drawn(step).mask
        token = self.student.head.mask_token
        classes, patches = self.all_tokens(self.student, torch.cat(crops[:T]), mask, token)
        if len(crops) > T:
            local, _ = self.all_tokens(self.student, torch.cat(crops[T:]))
            classes = torch.cat([classes, local])
        with torch.no_grad():
            of_teacher = self.all_tokens(self.teacher, torch.cat(crops[:T]))
        self.seen = list(of_teacher)
        of_classes = self.of_pairs(classes.chunk(len(crops)), of_teacher[0], settings.own["teacher_temperature"])
        targets = ((of_teacher[1] - self.patch_center) / settings.own["patch_teacher_temperature"]).softmax(-1)
        of_patches = -(targets * (patches / self.objective.student_temperature).log_softmax(-1)).sum(-1)
        of_patches = ((of_patches * mask).sum(-1) / mask.sum(-1).clamp_min(1)).mean()
        return self.objective.class_weight * of_classes + self.objective.patch_weight * of_patches

    @staticmethod
    def all_tokens(encoder: Encoder, images: Tensor, mask: Tensor | None = None, token: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of class tokens [n, K] and of patches [n, P, K]."""
        head = encoder.head
        rows = F.normalize(head.mlp(torch.cat(tokens(encoder, images, mask, token), 1)), dim=-1)
        of_patches = head.last_layer() if head.patch_last_layer is None else head.patch_last_layer()
        return rows[:, 0] @ head.last_layer().T, rows[:, 1:] @ of_patches.T


class Carp(Published):
    def loss(self, crops: list[Tensor], settings: StepSettings, step: int) -> Tensor:
        size = self.objective.block_size
        order = self.drawn(step).partition
        order = order[: len(order) // size * size]
        blocks = lambda encoder, views: logits(encoder(views))[:, order].unflatten(-1, (-1, size)).softmax(-1)  # noqa: E731
        student = blocks(self.student, crops)
        with torch.no_grad():
            teacher = blocks(self.teacher, crops[:T])
        return published_consistency(student.chunk(len(crops)), teacher.chunk(T))


class MocoV3(Published):
    def __init__(self, student: Encoder, teacher: Encoder, *others, **more) -> None:
        super().__init__(student, teacher, *others, **more)
        student.head.views = teacher.head.views = 1  # they come one at a time

    def loss(self, crops: list[Tensor], settings: StepSettings, step: int) -> Tensor:
        queries = [self.student([crop]) for crop in crops]
        with torch.no_grad():
            keys = [self.teacher([crop]) for crop in crops]
        return both_ways(queries, keys, self.objective.temperature)


class Mmc(Published):
    def loss(self, crops: list[Tensor], settings: StepSettings, step: int) -> Tensor:
        drawn, objective, temperature = self.drawn(step), self.objective, self.objective.temperature
        student = [tokens(self.student, crop) for crop in drawn.corrupted]
        with torch.no_grad():
            teacher = [tokens(self.teacher, crop) for crop in crops]
            keys = [self.teacher.head.class_mlp(rows[:, 0]) for rows, _ in teacher]
            patch_keys = [self.teacher.head.patch_mlp(rows) for _, rows in teacher]
        head = self.student.head
        of_classes = both_ways([head.class_mlp(rows[:, 0]) for rows, _ in student], keys, temperature)
        masks = drawn.mask.chunk(T)
        of_patches = sum(
            (self.of_patches(head.patch_mlp(x), y, temperature) * mask).sum() for (_, x), y, mask in zip(student, patch_keys, masks)
        )
        of_pixels = sum(
            ((head.decoder(x) - pixels(crop, x.shape[1])).abs().mean(-1) * mask).sum() for (_, x), crop, mask in zip(student, crops, masks)
        )
        count = drawn.mask.sum().clamp_min(1)
        weighted = objective.patch_weight * of_patches / count + objective.pixel_weight * of_pixels / count
        return objective.class_weight * of_classes + weighted

    @staticmethod
    def of_patches(x: Tensor, y: Tensor, temperature: float) -> Tensor:
        """[N, P] of patches [N, P, D]: each against its own key and those of other images."""
        images, patches, _ = x.shape
        x, y = (F.normalize(rows.flatten(0, 1), dim=-1) for rows in (x, y))
        image = torch.arange(images, device=x.device).repeat_interleave(patches)
        own = torch.arange(len(x), device=x.device)
        left_out = (image[:, None] == image) & (own[:, None] != own)
        return F.cross_entropy((x @ y.T / temperature).masked_fill(left_out, -math.inf), own, reduction="none").view(images, patches)


STEPS = {"massl": Massl, "dino": Dino, "ibot": Ibot, "carp": Carp, "moco_v3": MocoV3, "mmc": Mmc}


def logits(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["embeddings"] @ outputs["prototypes"].T


def both_ways(queries: list[Tensor], keys: list[Tensor], temperature: float) -> Tensor:
    """MoCo v3's loss of two views, times 2τ."""
    return 2 * temperature * published_contrast(queries, keys, temperature)


def pixels(images: Tensor, patches: int) -> Tensor:
    """[N, P, 3·side²] in the order channel, row, column."""
    side = images.shape[-1] // round(patches**0.5)
    cut = images.unflatten(-1, (-1, side)).unflatten(2, (-1, side))  # [N, 3, h, side, w, side]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def tokens(encoder: Encoder, images: Tensor, mask: Tensor | None = None, token: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Class token [n, 1, C] and patches [n, P, C] by timm's own parts; ``token`` [C] in place of patches where ``mask`` [n, P] is set."""
    backbone = encoder.backbone
    embedded = backbone.patch_embed(images)
    if mask is not None:
        embedded = torch.where(mask.view(*embedded.shape[:3], 1), token, embedded)
    rows = backbone.norm(backbone.blocks(backbone._pos_embed(embedded)))
    return rows[:, :1], rows[:, 1:]
