"""What an objective is: the contract by which step, trainer, outputs, checkpoints, reports and profilers know it, and none by its name.

Two laws keep the rest of the house free of exceptions:

1. All that learns lives in the student. ``heads`` gives the student's head, which may hold prototypes, a predictor, a decoder or mask
   tokens, and the teacher's, whose parameters are a subset matched by name. Gradients, clipping, optimizer state, sharding and checkpoints
   follow.
2. All that is remembered is a buffer of the objective and changes only in ``commit_``, after the verdict on the step. Nothing of a step
   that was not finite is kept.

Shapes: V student views, T teacher views (the first T crops), N images of a micro-batch, D embedding width, C feature width.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from massl_fast.config import Config, ObjectiveSettings
from massl_fast.distributed.world import World
from massl_fast.length import Length
from massl_fast.models.backbone import Masks
from massl_fast.models.flops import linear_flops
from massl_fast.models.precision import Precision

Curve = Callable[[int], float]
"""The value of a schedule at a step."""


@dataclass(frozen=True)
class Metric:
    """A number that a run logs. Console, metrics.jsonl, TensorBoard, Weights & Biases and the report read this one declaration."""

    key: str
    """Its key in metrics.jsonl."""
    title: str
    """What a plot of it is called."""
    unit: str = ""
    note: str = ""
    """One sentence for the report: what values mean, and which of them are bad news."""
    console: str = ""
    """Name in the line that a run prints without a terminal, where metrics of one name stand together; empty: not printed."""
    figure: str = ""
    """Metrics of one figure are drawn in one plot; empty: a plot of its own."""
    level: tuple[str, float] | None = None
    """A value that a plot marks with a dashed line, and its name."""
    collapsed: tuple[Literal["below", "above"], float] | None = None
    """Values below, or above, this one say that all images get nearly the same representation; None: the metric does not say."""

    collapsed_from: float = 0.5
    """Share of a run from which on a run warns of ``collapsed``: before, a network that has not begun to learn may look the same."""

    def shows_collapse(self, value: float | None, share: float) -> bool:
        """Whether a value says so after this ``share`` of a run."""
        return self.collapsed is not None and value is not None and share >= self.collapsed_from and is_beyond(value, *self.collapsed)


def is_beyond(value: float, side: str, limit: float) -> bool:
    """Whether a value lies ``below``, or ``above``, a limit (``Metric.collapsed``)."""
    return value < limit if side == "below" else value > limit


COLLAPSED_SPREAD = 0.01
"""Recorded runs that kept their embeddings apart stay above 0.04 from a tenth of the run on; those that did not end
below 0.005 (docs/demo.md, docs/learning.md)."""


def spread(key: str, title: str, figure: str = "") -> Metric:
    """The declaration of a spread, 1 − ‖mean‖² of unit rows: 0 where all are equal."""
    note = "Near 0 the representation has collapsed."
    return Metric(key, title, note=note, figure=figure, collapsed=("below", COLLAPSED_SPREAD), collapsed_from=0.1)


class Inputs(NamedTuple):
    """What the student sees of a micro-batch."""

    crops: list[Tensor]
    """V crops [N, 3, H, W]."""
    masks: Masks | None = None
    """What is hidden of them; None for objectives without masks."""


class At(NamedTuple):
    """The place of a forward pass in a run."""

    step: int | Tensor
    """Steps taken before; a 0-d int64 tensor in a recorded step."""
    schedules: Mapping[str, float | Tensor]
    """The values of ``Objective.schedules`` in this step."""
    images: int
    """N."""
    first: int
    """Place in the global batch of this micro-batch's first image."""
    frozen: tuple[str, ...]
    """What ``Objective.frozen`` gave for this step."""
    world: World
    patch: int | None = None
    """Side of a patch in pixels; None for networks without patches."""
    inputs: Inputs | None = None
    """What ``student_inputs`` gave; there in ``forward``."""


class Outcome(NamedTuple):
    """What ``Objective.forward`` makes of a micro-batch."""

    loss: Tensor
    """0-d, a mean over this rank's images."""
    metrics: dict[str, Tensor]
    """0-d tensors by keys of ``METRICS``, without gradient; averaged over micro-batches and ranks."""
    carried: dict[str, Tensor]
    """What ``commit_`` takes, without gradient."""


class Objective(nn.Module, ABC):
    """One way to learn without labels. A subclass is one file: settings, heads, loss, memory, metrics, words."""

    Settings: ClassVar[type[ObjectiveSettings]]
    """The model of ``config.objective``; its ``name`` is the objective's."""
    METRICS: ClassVar[tuple[Metric, ...]] = ()
    """Declarations of every key that ``forward``, ``commit_``, ``readings`` and ``schedules`` may give."""
    REMEMBERS: ClassVar[str] = ""
    """What its buffers are called in sentences, such as "memory"; empty where nothing is remembered."""
    REMEDY: ClassVar[str] = "a lower optimizer.learning_rate, a longer optimizer.warmup_epochs, or a network with batch norms"
    """What helps when all embeddings have become one, for a sentence."""
    needs_patches: ClassVar[bool] = False
    """Whether heads are given patch tokens of the global crops beside pooled features."""

    teacher_views: int = 2
    """T: the teacher sees the first T crops."""

    @property
    def backend(self) -> str:
        """Implementation of the loss, for the banner and the summary."""
        return "PyTorch"

    @classmethod
    @abstractmethod
    def build(cls, config: Config, precision: Precision, rank: int) -> Objective:
        """The objective that ``config.objective`` describes, on the CPU. What it draws depends on ``run.seed`` alone (and on ``rank`` where
        its settings say so), never on PyTorch's global generator."""

    @abstractmethod
    def heads(self, feature_dim: int) -> tuple[nn.Module, nn.Module]:
        """The student's and the teacher's head for features of width C. Called once, right after the student's backbone was drawn from the
        global generator."""

    @abstractmethod
    def forward(self, student: Any, teacher: Any, at: At) -> Outcome:
        """``student`` and ``teacher`` are what the heads gave for all crops of a micro-batch, view-major: V·N and T·N rows."""

    def student_inputs(self, crops: list[Tensor], at: At) -> Inputs:
        """What the student sees; drawn on the device from (seed, step, rank), so that loaders need not know of it."""
        return Inputs(crops)

    def commit_(self, carried: Sequence[dict[str, Tensor]], finite: Tensor, at: At) -> dict[str, Tensor]:
        """Take what the micro-batches of a step carried into the buffers; where ``finite`` (bool 0-d tensor) is false nothing changes.

        Returns metrics, the same on every rank. The host must not wait for the device here.
        """
        return {}

    def readings(self, step: int, length: Length) -> dict[str, float]:
        """Metrics of the buffers after ``step`` steps, taken at logged lines only; they may wait for the device."""
        return {}

    def schedules(self, length: Length) -> dict[str, Curve]:
        """Curves beyond learning rate, weight decay and teacher momentum, logged under their names."""
        return {}

    def frozen(self, step: int, length: Length) -> tuple[str, ...]:
        """Prefixes of names of the student's parameters that stand still in this step."""
        return ()

    def metrics(self) -> tuple[Metric, ...]:
        """``METRICS``, with levels that depend on the settings."""
        return self.METRICS

    @abstractmethod
    def loss_flops(self, views: int) -> float:
        """Operations of loss and gradients per image, for V = ``views``, heads excluded."""

    def head_flops(self, student: nn.Module, teacher: nn.Module, views: int) -> float:
        """Operations of both heads per image, backward pass included: one row per view unless overridden."""
        return 3 * views * linear_flops(student) + self.teacher_views * linear_flops(teacher)

    @abstractmethod
    def line(self, world_size: int) -> str:
        """One line of the banner: backend, what is remembered, and its sizes."""

    def warnings(self, length: Length, num_images: int) -> list[str]:
        """Settings that are known to train badly, a sentence each, said before they cost GPU hours."""
        return []

    def drawn_per_rank(self) -> list[str]:
        """What differs when a run continues on another number of processes, such as "partitions"."""
        return []

    def remembered(self) -> list[Tensor]:
        """The buffers that every rank must hold equal and that checkpoints keep."""
        persistent = self.state_dict(keep_vars=True)
        return [persistent[name] for name, _ in self.named_buffers() if name in persistent]


def head_sizes(config: Config, feature_dim: int) -> dict[str, int]:
    """What all heads take from the section ``model``, by the names of their arguments, for features of width C."""
    model = config.model
    return {"in_dim": feature_dim, "hidden_dim": model.head_hidden_dim, "out_dim": model.embedding_dim, "num_layers": model.head_layers}


def patch_side(config: Config) -> int:
    """Side of a patch in pixels, from ``model.model_args`` or else from timm's name of the transformer."""
    named = re.search(r"patch(\d+)", config.model.architecture)
    return config.model.model_args.get("patch_size", int(named[1]) if named else 16)


def patches_of(config: Config) -> int:
    """Patches of a global crop."""
    return (config.crops.global_size // patch_side(config)) ** 2
