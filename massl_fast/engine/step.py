"""One optimizer step of MaSSL, from crops to an updated student, teacher and memory.

Nothing in it waits for the device. Whether the step is sound is decided by a tensor: where the embeddings, the loss or a gradient is not
finite, optimizer, teacher and memory all leave things as they were, and the trainer learns of it when it next logs a line. Ranks agree on
it, and on whether one of them was asked to stop, in one small sum a step.

Shapes: V student views, T teacher views (the first T crops), N images of a micro-batch, D embedding width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from massl_fast.distributed.sharding import local
from massl_fast.distributed.world import World
from massl_fast.engine.optimizer import update_weights_
from massl_fast.engine.schedules import StepSettings
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import LossScaler, Precision
from massl_fast.objectives.massl import MasslObjective, unit_row_spread

NUM_TEACHER_VIEWS = 2


class StepResult(NamedTuple):
    """0-d tensors on the device; losses and entropies are means over this rank's images, the rest is of the whole step."""

    loss: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    kl: Tensor
    gradient_norm: Tensor
    embedding_spread: Tensor


class TrainStep:
    """Student, teacher, objective and optimizer, moved on by one step a call."""

    def __init__(
        self,
        pair: StudentTeacher,
        objective: MasslObjective,
        optimizer: Optimizer,
        *,
        world: World,
        precision: Precision,
        clip: float,
        clip_mode: str,
    ):
        self.pair = pair
        self.objective = objective
        self.optimizer = optimizer
        self.world = world
        self.precision = precision
        self.clip = clip
        self.clip_mode = clip_mode
        self.scaler = LossScaler(precision, world.device)
        self.student: nn.Module = world.replicate(pair.student)
        self.sharded = isinstance(pair.student, FSDPModule)
        self.parameters = [(name, p) for name, p in pair.student.named_parameters() if p.requires_grad]
        # The first step that was not finite and which tensor began it here, [step, index into culprits]; -1 while there is none.
        self.first_failure = torch.full((2,), -1, dtype=torch.int64, device=world.device)
        self.culprits = ["the teacher's embeddings", "the student's embeddings", "the loss"]
        self.culprits += [f"the gradient of {name}" for name, _ in self.parameters]
        self.stop_votes = torch.zeros((), device=world.device)
        """After a step: how many ranks said ``stopping``, a 0-d tensor."""
        self.before_exchange: Callable[[], None] = lambda: None
        """Called where a rank first waits for others: before the backward pass whose gradients are exchanged."""

    def __call__(
        self, micro_batches: Sequence[list[Tensor]], settings: StepSettings, step: int | Tensor, stopping: Tensor | None = None
    ) -> StepResult:
        """``micro_batches``: for each accumulated micro-batch its V crops, [N,3,H,W] each, on the device. ``step`` counts from 0.

        ``stopping``: 0-d tensor, 1 where this rank was asked to stop; no effect on the step. ``settings`` and ``step`` may be 0-d tensors
        on the device (float64, int64) where the optimizer is an ``AdamWWithTeacher``; then all that changes from step to step lies there.
        """
        entering, outcomes = [], []
        sound = torch.ones(3, dtype=torch.bool, device=self.world.device)
        for index, crops in enumerate(micro_batches):
            last = index + 1 == len(micro_batches)
            with self._exchanging_gradients(now=last):
                outcome, teacher, student = self._forward(crops, settings, step)
                if last:
                    self.before_exchange()
                (outcome.loss * (self.scaler.scale / len(micro_batches))).backward()
            sound &= torch.stack([teacher.isfinite().all(), student.isfinite().all(), outcome.loss.isfinite()])
            entering.append(self.objective.entering(teacher))
            outcomes.append(torch.stack([outcome.loss, outcome.student_entropy, outcome.teacher_entropy, outcome.kl]).detach())
        gradient_norm, finite = self._update(settings, step, sound, stopping)
        rows = self.world.gather_rows(torch.cat(entering))
        self.objective.enqueue_(rows, finite)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(*torch.stack(outcomes).mean(0).unbind(), gradient_norm, unit_row_spread(rows))

    def _exchanging_gradients(self, now: bool) -> contextlib.AbstractContextManager:
        """Ranks exchange gradients once a step, with the last micro-batch; until then each keeps its own sum."""
        if self.sharded:
            self.student.set_requires_gradient_sync(now)
        elif not now and isinstance(self.student, nn.parallel.DistributedDataParallel):
            return self.student.no_sync()
        return contextlib.nullcontext()

    def _forward(self, crops: list[Tensor], settings: StepSettings, step: int | Tensor):
        views, images = len(crops), crops[0].shape[0]
        with self.precision.autocast(self.world.device):
            with torch.no_grad():
                teacher = self.pair.teacher(crops[:NUM_TEACHER_VIEWS]).view(NUM_TEACHER_VIEWS, images, -1)
            student = self.student(crops).view(views, images, -1)
        outcome = self.objective(student, teacher, step=step, teacher_temperature=settings.teacher_temperature)
        return outcome, teacher, student.detach()

    @torch.no_grad()
    def _update(self, settings: StepSettings, step: int | Tensor, sound: Tensor, stopping: Tensor | None) -> tuple[Tensor, Tensor]:
        """Optimizer and teacher; returns (gradient norm before clipping, whether the step was finite on every rank)."""
        gradients = []
        for name, parameter in self.parameters:
            assert parameter.grad is not None, f"{name} took no part in the loss"
            gradients.append(local(parameter.grad))
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.scaler.enabled:
            norms = norms / self.scaler.scale
        sound = torch.cat([sound, norms.isfinite()])
        norms, unsound = self._agree(norms, sound, stopping)
        finite = ~unsound.any()
        self._remember_failure(step, sound, unsound)
        update_weights_(
            self.pair,
            self.optimizer,
            gradients,
            norms,
            finite,
            settings,
            clip=self.clip,
            clip_mode=self.clip_mode,
            loss_scale=self.scaler.scale if self.scaler.enabled else None,
        )
        self.scaler.update(finite)
        return torch.linalg.vector_norm(norms), finite

    def _agree(self, norms: Tensor, sound: Tensor, stopping: Tensor | None) -> tuple[Tensor, Tensor]:
        """One sum over ranks; leaves the votes in ``stop_votes``.

        Returns norms [P] of whole gradients and a bool tensor [4], the same on every rank: whether the teacher's embeddings, the
        student's, the loss or a gradient are not finite anywhere.
        """
        bad = torch.cat([~sound[:3], ~sound[3:].all(0, keepdim=True)]).double()
        votes = self.stop_votes.new_zeros((1,)) if stopping is None else stopping.view(1)
        message = torch.cat([bad, votes.double()])
        if self.sharded:  # each rank has the norms of its shards
            message = torch.cat([message, norms.double().square()])
        message = self.world.sum(message)
        self.stop_votes = message[4]
        if self.sharded:
            norms = message[5:].sqrt().to(norms.dtype)
        return norms, message[:4] > 0

    def _remember_failure(self, step: int | Tensor, sound: Tensor, unsound: Tensor) -> None:
        """Note the first non-finite step. With loss scaling, gradients may overflow; only a vanishing scale makes that a failure."""
        failed = unsound.any()
        if self.scaler.enabled:
            failed = unsound[:3].any() | (failed & (self.scaler.scale <= 2.0**-14))
        culprit = torch.where(sound.all(), -1, sound.to(torch.int8).argmin())
        found = torch.stack([step if isinstance(step, Tensor) else torch.full_like(culprit, step), culprit])
        self.first_failure.copy_(torch.where(failed & (self.first_failure[0] < 0), found, self.first_failure))

    def failure(self) -> str | None:
        """What went wrong first and on which ranks, as a sentence, or None. Waits for the device; a collective call."""
        step = self.first_failure[0].item()
        if step < 0:
            return None
        culprits = self.world.gather_rows(self.first_failure[None])[:, 1].tolist()
        first = min(culprit for culprit in culprits if culprit >= 0)
        ranks = [str(rank) for rank, culprit in enumerate(culprits) if culprit == first]
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
        if self.world.size > 1 and first >= 3:
            where += "; gradients are summed over ranks, so which one it came from cannot be told"
        return f"Step {step} was not finite, beginning with {self.culprits[first]} ({where})."
