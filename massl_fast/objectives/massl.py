"""The MaSSL objective: a memory of past teacher embeddings, compared in random blocks (Silva et al., ICML 2024, section 3)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from massl_fast.config import Config
from massl_fast.config.objectives import MasslSettings
from massl_fast.kernels import available_backends, enqueue_, memory_cross_entropy
from massl_fast.length import Length, linear
from massl_fast.models.head import ProjectionHead
from massl_fast.models.precision import DTYPES, Precision
from massl_fast.objectives.base import At, Curve, Metric, Objective, Outcome, head_sizes, spread


class MasslObjective(Objective):
    """Owns the memory [K, D] (unit rows) and the position of the oldest entry.

    ``partition_of_step(step)`` gives an int tensor [K] to be used instead of the keyed random partition of (partition_seed, step); by
    default there is none for stochastic blocks and the memory's own order for contiguous ones. ``seed`` fills the memory and is the
    partition's seed, too, unless that has its own.
    """

    Settings = MasslSettings
    METRICS = (
        Metric("student_entropy_nats", "Entropy of the student's distributions", "nats", console="entropy", figure="Entropy"),
        Metric("teacher_entropy_nats", "Entropy of the teacher's distributions", "nats", console="entropy", figure="Entropy"),
        Metric("kl_nats", "Divergence of the student's from the teacher's distributions", "nats"),
        spread("embedding_spread", "Spread of the step's embeddings", figure="Spread"),
        spread("memory_spread", "Spread of the memory", figure="Spread"),
        Metric("memory_age_steps", "Age of the oldest memory entry", "steps"),
        Metric("teacher_temperature", "Temperature of the teacher's softmax"),
    )
    REMEMBERS = "memory"
    REMEDY = (
        "objective.partition stochastic, an objective.teacher_temperature_start further below objective.student_temperature, a lower "
        "optimizer.learning_rate, or a network with batch norms"
    )

    memory: Tensor
    pointer: Tensor
    own_order: Tensor
    config: Config
    """Set by ``build``; the parts that a run asks for need it."""

    def __init__(
        self,
        memory_size: int,
        embedding_dim: int,
        *,
        block_size: int,
        student_temperature: float,
        block_reduction: str = "mean",
        enqueue_view: str = "second",
        partition: str = "stochastic",
        partition_of_step: Callable[[int | Tensor], Tensor | None] | None = None,
        seed: int = 0,
        partition_seed: int | None = None,
        memory_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ):
        super().__init__()
        self.block_size = block_size
        self.student_temperature = student_temperature
        self.block_reduction = block_reduction
        self.teacher_view = {"first": 0, "second": 1}[enqueue_view]
        self.partition_seed = seed if partition_seed is None else partition_seed
        self.asked_backend = backend
        # A random memory, as published: uniform on the sphere, the same on every rank and device.
        rows = torch.randn(memory_size, embedding_dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("memory", F.normalize(rows, dim=1).to(memory_dtype))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        if partition == "blockwise" and partition_of_step is None:
            self.register_buffer("own_order", torch.arange(memory_size, dtype=torch.int32), persistent=False)
            partition_of_step = lambda step: self.own_order  # noqa: E731
        self.partition_of_step = partition_of_step or (lambda step: None)

    @classmethod
    def build(cls, config: Config, precision: Precision, rank: int) -> MasslObjective:
        settings, seed = config.objective, config.run.seed
        shared = settings.partition_scope == "shared"
        objective = cls(
            settings.memory_size,
            config.model.embedding_dim,
            block_size=settings.block_size,
            student_temperature=settings.student_temperature,
            block_reduction=settings.block_reduction,
            enqueue_view=settings.enqueue_view,
            partition=settings.partition,
            seed=seed,
            partition_seed=seed if shared else zlib.crc32(f"{seed}/partition/{rank}".encode()),
            memory_dtype=precision.dtype if settings.memory_dtype == "auto" else DTYPES[settings.memory_dtype],
            backend=settings.backend,
        )
        objective.config = config
        return objective

    def heads(self, feature_dim: int) -> tuple[nn.Module, nn.Module]:
        student, teacher = (ProjectionHead(**head_sizes(self.config, feature_dim)) for _ in range(2))
        return student, teacher

    def forward(self, student: Tensor, teacher: Tensor, at: At) -> Outcome:
        """``student`` [V·N, D] and ``teacher`` [T·N, D], unit rows (see ``memory_cross_entropy``)."""
        student, teacher = (rows.view(-1, at.images, rows.shape[-1]) for rows in (student, teacher))
        dtype = self.memory.dtype
        found = memory_cross_entropy(
            student.to(dtype),
            teacher.to(dtype),
            self.memory,
            block_size=self.block_size,
            student_temp=self.student_temperature,
            teacher_temp=at.schedules["teacher_temperature"],
            partition=self.partition_of_step(at.step),
            seed=self.partition_seed,
            step=at.step,
            block_reduction=self.block_reduction,
            backend=self.asked_backend,
        )
        metrics = {"student_entropy_nats": found.student_entropy, "teacher_entropy_nats": found.teacher_entropy, "kl_nats": found.kl}
        return Outcome(found.loss, metrics, {"entering": teacher[self.teacher_view]})

    def commit_(self, carried: Sequence[dict[str, Tensor]], finite: Tensor, at: At) -> dict[str, Tensor]:
        """The embeddings of one global view of every image, of all ranks, take the places of the oldest entries."""
        rows = at.world.gather_rows(torch.cat([each["entering"] for each in carried]))
        enqueue_(self.memory, self.pointer, rows, enabled=finite)
        return {"embedding_spread": unit_row_spread(rows)}

    def readings(self, step: int, length: Length) -> dict[str, float]:
        """Entries of the random start count as old as the run."""
        age = min(step, self.memory.shape[0] / length.global_batch)
        return {"memory_spread": unit_row_spread(self.memory).item(), "memory_age_steps": round(age, 2)}

    def schedules(self, length: Length) -> dict[str, Curve]:
        settings = self.config.objective
        start, end = settings.teacher_temperature_start, settings.teacher_temperature
        warm_up = settings.teacher_temperature_warmup_epochs * length.steps_per_epoch
        return {"teacher_temperature": lambda step: linear(step, start, end, warm_up)}

    def metrics(self) -> tuple[Metric, ...]:
        level = ("ln(block size)", math.log(self.block_size))
        return tuple(replace(metric, level=level) if metric.figure == "Entropy" else metric for metric in self.METRICS)

    def loss_flops(self, views: int) -> float:
        """Two products with the entries in blocks per row, gradient included."""
        entries, width = self.memory.shape
        return 4.0 * width * (views + self.teacher_views) * (entries // self.block_size * self.block_size)

    @property
    def backend(self) -> str:
        return self.asked_backend if self.asked_backend != "auto" else available_backends(self.memory.device, self.memory.dtype)[0]

    def line(self, world_size: int) -> str:
        settings = self.config.objective
        scope = f", the same on all {world_size} ranks" if settings.partition_scope == "shared" else ", another on each rank"
        return (
            f"backend {self.backend}; memory {self.memory.shape[0]} × {self.memory.shape[1]}, "
            f"blocks of {self.block_size}, {settings.partition}{scope if world_size > 1 else ''}"
        )

    def warnings(self, length: Length, num_images: int) -> list[str]:
        size, block, batch, settings = self.memory.shape[0], self.block_size, length.global_batch, self.config.objective
        remainder = size % block
        problems = {
            f"objective.memory_size {size} exceeds the {num_images} training images: the memory will hold several embeddings "
            f"of the same image.": size > num_images,
            f"objective.memory_size {size} holds only {size / batch:.1f} steps of {batch} images.": size < 8 * batch,
            f"objective.block_size {block} does not divide objective.memory_size {size}: {remainder} random "
            f"entries ({100 * remainder / size:.1f}%) sit out each step.": remainder > 0,
            f"One block holds the whole memory (objective.block_size {block}): nothing is random about it, and in the paper it is the "
            f"random blocks that keep the representation from collapsing.": block == size,
            "objective.partition is blockwise: contiguous blocks collapse in the paper (table 13) and in docs/demo.md, though not in every "
            "short run (docs/learning.md). Choose stochastic to train.": settings.partition == "blockwise",
            f"objective.teacher_temperature {settings.teacher_temperature} is not below objective.student_temperature "
            f"{settings.student_temperature}: such a teacher asks the student for smaller differences between images, and in the end there "
            f"are none. Choose a lower one; half of the student's or less gets short runs off the ground.": (
                settings.teacher_temperature >= settings.student_temperature
            ),
            f"The memory of {size} entries takes {size / batch:.0f} of this run's {length.total_steps} steps to fill with embeddings; "
            f"until then it holds random directions. Choose a smaller objective.memory_size, or train longer.": (
                size / batch > length.total_steps / 4
            ),
        }
        return [sentence for sentence, holds in problems.items() if holds]

    def drawn_per_rank(self) -> list[str]:
        return ["partitions"] if self.config.objective.partition_scope == "rank" else []


def unit_row_spread(rows: Tensor) -> Tensor:
    """1 − ‖mean row‖² of unit rows [n, D]: the part of their energy that is not common to all."""
    return 1 - rows.float().mean(0).square().sum()
