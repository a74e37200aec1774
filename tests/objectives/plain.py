"""Whole training steps in plain PyTorch, written from the papers' formulas: every probability laid out, nothing of massl_fast's engine."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pairs(student_views: int, teacher_views: int) -> list[tuple[int, int]]:
    return [(i, j) for i, j in itertools.product(range(student_views), range(teacher_views)) if i != j]


def dino_loss(z: Tensor, w: Tensor, c: Tensor, c_teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> Tensor:
    """z [V, N, D], w [T, N, D]; DINO, equations 2 and 3, and the centring of section 3.1."""
    targets = ((w @ c_teacher.T - center) / teacher_temp).softmax(-1)
    logits = (z @ c.T / student_temp).log_softmax(-1)
    of = pairs(len(z), len(w))
    return sum(-(targets[j] * logits[i]).sum(-1).mean() for i, j in of) / len(of)


def sinkhorn_targets(w: Tensor, c_teacher: Tensor, temperature: float, iterations: int) -> Tensor:
    """w [T, N, D] → [T, N, K]: rows and columns normalised in turn, rows last."""
    q = (w.flatten(0, 1) @ c_teacher.T / temperature).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q.view(*w.shape[:2], -1)


def carp_loss(z: Tensor, w: Tensor, c: Tensor, c_teacher: Tensor, order: Tensor, block: int, clamp: float = 2**-23) -> Tensor:
    """CARP, section 3, as its published code evaluates it: both sides' probabilities block by block."""
    blocks = order[: len(order) // block * block].long().view(-1, block)
    s = (z @ c.T)[..., blocks].softmax(-1)  # [V, N, B, block]
    t = (w @ c_teacher.T)[..., blocks].softmax(-1)
    of = pairs(len(z), len(w))
    consistency = sum(-(s[i] * t[j]).sum(-1).clamp(clamp, 1 - clamp).log().mean() for i, j in of) / len(of)
    mean = torch.cat([s.flatten(0, 1), t.flatten(0, 1)]).mean(0)  # [B, block]
    entropy = math.log(block) + (mean * mean.clamp(clamp, 1 - clamp).log()).sum(-1).mean()
    return consistency + entropy


def moco_loss(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """query, key [2, N, D]; MoCo v3, algorithm 1."""
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    target = torch.arange(query.shape[1])
    return sum(2 * temperature * F.cross_entropy(query[a] @ key[1 - a].T / temperature, target) for a in range(2))


def patch_contrast_loss(x: Tensor, y: Tensor, taken: Tensor, patches: int, temperature: float) -> Tensor:
    """x, y [2, N·P, D], ``taken`` bool [2, N·P]; MMC: each patch against its own key and other images' patches, mean over taken."""
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    image = torch.arange(x.shape[1]) // patches
    others_of_image = (image[:, None] == image) & ~torch.eye(len(image), dtype=torch.bool)
    logits = (x @ y.mT / temperature).masked_fill(others_of_image, -math.inf)
    rows = torch.stack([F.cross_entropy(each, torch.arange(len(image)), reduction="none") for each in logits])
    return (rows * taken).sum() / taken.sum()


class PlainStep:
    """AdamW, each parameter clipped by its own norm, and a moving average by name, of what the student is after or before its move."""

    def __init__(self, student: nn.Module, teacher: nn.Module, clip: float, teacher_first: bool = False):
        self.student, self.teacher, self.clip, self.teacher_first = student, teacher, clip, teacher_first
        trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith(".bias")]
        exempt = [p for name, p in trained if p.ndim <= 1 or name.endswith(".bias")]
        self.optimizer = torch.optim.AdamW([{"params": decayed}, {"params": exempt}])

    def __call__(self, loss: Tensor, rate: float, decay: float, momentum: float, frozen: tuple[str, ...] = ()) -> None:
        self.optimizer.param_groups[0].update(lr=rate, weight_decay=decay)
        self.optimizer.param_groups[1].update(lr=rate, weight_decay=0.0)
        self.optimizer.zero_grad()
        loss.backward()
        for name, parameter in self.student.named_parameters():
            if parameter.grad is None:
                continue
            factor = self.clip / (parameter.grad.norm() + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)
            if name.startswith(frozen):
                parameter.grad = None
        before = {name: parameter.detach().clone() for name, parameter in self.student.named_parameters()}
        self.optimizer.step()
        with torch.no_grad():
            student = before if self.teacher_first else dict(self.student.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.mul_(momentum).add_((1 - momentum) * student[name])
