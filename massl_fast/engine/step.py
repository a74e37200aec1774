"""One optimizer step, from crops to an updated student, teacher and objective.

Nothing in it waits for the device. Whether the step is sound is decided by a tensor: where the embeddings, the loss or a gradient is not
finite, optimizer, teacher and objective all leave things as they were, and the trainer learns of it when it next logs a line. Ranks agree
on it, and on whether one of them was asked to stop, in one small sum per step.

Shapes: V student views, T teacher views (the first T crops), N images of a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from massl_fast.distributed.flat_gradients import FlatGradients
from massl_fast.distributed.sharding import local
from massl_fast.distributed.world import World
from massl_fast.engine.fused_update import AdamWWithTeacher
from massl_fast.engine.optimizer import update_weights_
from massl_fast.engine.phases import BACKWARD, CLIP, COMMIT, LOSS, REST, STUDENT, TEACHER, Observer, unobserved
from massl_fast.engine.schedules import StepSettings
from massl_fast.models.backbone import patch_size
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import LossScaler, Precision
from massl_fast.objectives.base import At, Objective, Outcome


class StepResult(NamedTuple):
    """0-d tensors on the device."""

    loss: Tensor
    """A mean over this rank's images."""
    gradient_norm: Tensor
    """Norm of the whole step's gradient, before clipping."""
    metrics: dict[str, Tensor]
    """The objective's, by the keys of its declarations; those of ``forward`` are means over this rank's images."""

    def means(self, world: World) -> dict[str, float]:
        """``loss``, ``gradient_norm`` and the metrics as numbers, means over all ranks. A collective call that waits for the device."""
        values = {"loss": self.loss, "gradient_norm": self.gradient_norm, **self.metrics}
        return dict(zip(values, world.mean(torch.stack(list(values.values()))).tolist(), strict=True))


class Verdict(NamedTuple):
    """What all ranks agree on: bool 0-d tensors, whether something is not finite anywhere, and the number of ranks asked to stop."""

    teacher: Tensor
    student: Tensor
    loss: Tensor
    gradient: Tensor
    stop_votes: Tensor


NUM_VOTES = 4
"""Teacher, student and loss not finite, asked to stop: what rides with flat gradients."""


class TrainStep:
    """Student, teacher, objective and optimizer, moved on by one step a call."""

    def __init__(
        self,
        pair: StudentTeacher,
        objective: Objective,
        optimizer: Optimizer,
        *,
        world: World,
        precision: Precision,
        clip: float,
        clip_mode: str,
        before_exchange: Callable[[], None] = lambda: None,
        flat_gradients: bool = False,
        teacher_first: bool = False,
    ):
        """``before_exchange`` is called where a rank first waits for others: before the backward pass whose gradients are exchanged, with
        ``flat_gradients`` (see ``FlatGradients``) behind it. ``teacher_first``: see ``update_weights_``. ValueError where the optimizer
        moves the teacher itself, after the student."""
        if teacher_first and isinstance(optimizer, AdamWWithTeacher):
            raise ValueError(
                "teacher.moves is before_student, and optimizer.name adamw_with_teacher moves each weight of the teacher right after the "
                "student's. Choose optimizer.name adamw, or teacher.moves after_student."
            )
        self.pair = pair
        self.objective = objective
        self.optimizer = optimizer
        self.world = world
        self.precision = precision
        self.clip = clip
        self.clip_mode = clip_mode
        self.teacher_first = teacher_first
        self.scaler = LossScaler(precision, world.device)
        flat = flat_gradients and world.size > 1
        self.flat = FlatGradients(pair.student, world, votes=NUM_VOTES) if flat else None
        self.votes = torch.zeros(NUM_VOTES, device=world.device)
        """Votes of the last step, where they travelled with its gradients."""
        self.student: nn.Module = pair.student if flat else world.replicate(pair.student)
        self.sharded = isinstance(pair.student, FSDPModule)
        self.parameters = [(name, p) for name, p in pair.student.named_parameters() if p.requires_grad]
        # The first step that was not finite and which tensor began it here, [step, index into culprits]; -1 while there is none.
        self.first_failure = torch.full((2,), -1, dtype=torch.int64, device=world.device)
        self.culprits = ["the teacher's embeddings", "the student's embeddings", "the loss"]
        self.culprits += [f"the gradient of {name}" for name, _ in self.parameters]
        self.stop_votes = torch.zeros((), device=world.device)
        """After a step: how many ranks said ``stopping``, a 0-d tensor."""
        self.before_exchange = before_exchange
        self.patch = patch_size(pair.student.backbone)
        self.observe: Observer = unobserved

    @contextlib.contextmanager
    def observed(self, observe: Observer) -> Iterator[None]:
        """Inside, ``observe`` is called with the name of each of ``phases.PHASES`` as it begins."""
        self.observe = observe
        try:
            yield
        finally:
            self.observe = unobserved

    def __call__(
        self, micro_batches: Sequence[list[Tensor]], settings: StepSettings, step: int | Tensor, stopping: Tensor | None = None
    ) -> StepResult:
        """``micro_batches``: for each accumulated micro-batch its V crops, [N,3,H,W] each, on the device. ``step`` counts from 0.

        ``stopping``: 0-d tensor, 1 where this rank was asked to stop; no effect on the step. ``settings`` and ``step`` may be 0-d tensors
        on the device (float64, int64) where the optimizer is an ``AdamWWithTeacher``; then all that changes from step to step lies there.
        """
        carried, outcomes = [], []
        sound = torch.ones(3, dtype=torch.bool, device=self.world.device)
        images = micro_batches[0][0].shape[0]
        for index, crops in enumerate(micro_batches):
            first = (self.world.rank * len(micro_batches) + index) * images
            at = At(step, settings.own, images, first, settings.frozen, self.world, self.patch)
            last = index + 1 == len(micro_batches)
            with self._exchanging_gradients(now=last):
                outcome, sound_here = self._forward(crops, at)
                if last and self.flat is None:
                    self.before_exchange()
                self.observe(BACKWARD)
                (outcome.loss * (self.scaler.scale / len(micro_batches))).backward()
                self.observe(REST)
            sound &= sound_here
            carried.append(outcome.carried)
            outcomes.append(torch.stack([outcome.loss, *outcome.metrics.values()]).detach())
        if self.flat is not None:
            self.observe(BACKWARD)
            self.votes = self.flat.average_(torch.cat([~sound, self._vote(stopping)]), first=self.before_exchange)
            self.observe(REST)
        gradient_norm, finite = self._update(settings, step, sound, stopping)
        self.observe(COMMIT)
        committed = self.objective.commit_(carried, finite, at)
        self.observe(REST)
        self.optimizer.zero_grad(set_to_none=True)
        loss, *metrics = torch.stack(outcomes).mean(0).unbind()
        return StepResult(loss, gradient_norm, dict(zip(outcome.metrics, metrics, strict=True)) | committed)

    def exchange_by(self, exchange: Callable[[Callable[[], Any]], None]) -> None:
        """Have ``exchange`` call what this step exchanges between ranks (see ``World.exchange``)."""
        self.world = replace(self.world, exchange=exchange)
        if self.flat is not None:
            self.flat.exchange_over(self.world)

    def _exchanging_gradients(self, now: bool) -> contextlib.AbstractContextManager:
        """Ranks exchange gradients once per step, with the last micro-batch; until then each keeps its own sum."""
        if self.sharded:
            self.student.set_requires_gradient_sync(now)
        elif not now and isinstance(self.student, nn.parallel.DistributedDataParallel):
            return self.student.no_sync()
        return contextlib.nullcontext()

    def _forward(self, crops: list[Tensor], at: At) -> tuple[Outcome, Tensor]:
        """(outcome, whether what the teacher's and the student's head gave and the loss are finite, bool [3])."""
        with self.precision.autocast(self.world.device):
            self.observe(TEACHER)
            with torch.no_grad():
                teacher = self.pair.teacher(crops[: self.objective.teacher_views])
            self.observe(STUDENT)
            inputs = self.objective.student_inputs(crops, at)
            student = self.student(*inputs)
        self.observe(LOSS)
        outcome = self.objective(student, teacher, at._replace(inputs=inputs))
        self.observe(REST)
        # Asked here, so that the backward pass need not keep what the heads gave: prototypes may be the largest tensors of a step.
        return outcome, torch.stack([_finite(teacher), _finite(student), outcome.loss.isfinite()])

    @torch.no_grad()
    def _update(self, settings: StepSettings, step: int | Tensor, sound: Tensor, stopping: Tensor | None) -> tuple[Tensor, Tensor]:
        """Optimizer and teacher; returns (gradient norm before clipping, whether the step was finite on every rank)."""
        self.observe(CLIP)
        gradients, moving = [], []
        for index, (name, parameter) in enumerate(self.parameters):
            if name.startswith(settings.frozen):
                parameter.grad = None  # so that optimizers pass over it, moments and decay included
            else:
                assert parameter.grad is not None, f"{name} took no part in the loss"
                gradients.append(local(parameter.grad))
                moving.append(index)
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.scaler.enabled:
            norms = norms / self.scaler.scale
        flags = norms.isfinite()
        if settings.frozen:
            # By views alone: numbers from the host would make it wait, and could not be recorded.
            of_moving = dict(zip(moving, flags.unbind()))
            flags = torch.stack([of_moving.get(index, flags.new_ones(())) for index in range(len(self.parameters))])
        sound = torch.cat([sound, flags])
        norms, verdict = self._agree(norms, sound, stopping)
        self.stop_votes = verdict.stop_votes
        unsound = torch.stack(verdict[:4])
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
            teacher_first=self.teacher_first,
            observe=self.observe,
        )
        self.observe(REST)
        self.scaler.update(finite)
        return torch.linalg.vector_norm(norms), finite

    def _vote(self, stopping: Tensor | None) -> Tensor:
        return self.stop_votes.new_zeros((1,)) if stopping is None else stopping.view(1)

    def _agree(self, norms: Tensor, sound: Tensor, stopping: Tensor | None) -> tuple[Tensor, Verdict]:
        """One sum over ranks, or what rode with the gradients; returns norms [P] of whole gradients, and the verdict."""
        unsound = torch.cat([~sound[:3], ~sound[3:].all(0, keepdim=True)])
        if self.flat is not None:  # all ranks hold the same gradients, and have voted on the rest
            teacher, student, loss, votes = self.votes.double().unbind()
            return norms, Verdict(teacher > 0, student > 0, loss > 0, unsound[3], votes)
        parts = [unsound.double(), self._vote(stopping).double()]
        if self.sharded:  # each rank has the norms of its shards
            parts.append(norms.double().square())
        unsound, votes, *squares = self.world.sum(torch.cat(parts)).split([len(part) for part in parts])
        if self.sharded:
            norms = squares[0].sqrt().to(norms.dtype)
        return norms, Verdict(*(unsound > 0).unbind(), votes[0])

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
            where += "; gradients are summed over ranks, so the rank that it came from is not known"
        return f"Step {step} was not finite, beginning with {self.culprits[first]} ({where})."


def _finite(outputs: Any) -> Tensor:
    """Whether all tensors of a head's output are finite, a 0-d tensor: the least and the greatest value of each tell, and need no copy."""
    extremes = (extreme for leaf in tree_leaves(outputs) if leaf.numel() for extreme in leaf.detach().aminmax())
    return torch.stack(list(extremes)).isfinite().all()
