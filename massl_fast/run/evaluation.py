"""k-NN of a run: when it is due, of which networks, what was found last, and which step was the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from massl_fast.config import Config
from massl_fast.data.loaders import open_together
from massl_fast.data.sources import Source
from massl_fast.distributed.world import World
from massl_fast.evaluation.knn import KnnEvaluator
from massl_fast.length import Length
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import Precision

HEADLINE_K = 20
NAMES_SHOWN = 5


class RunEvaluation:
    """Evaluates where ``evaluation.train`` is set; otherwise ``evaluator`` is None and nothing is ever due.

    Attributes:
        sources: (training images, test images), or (None, None).
        told_unreadable: names of images that were left out and told of.
        percents: k-NN by the keys of metrics.jsonl, as last found.
        best: the teacher's highest headline so far, %; -1 before there is one.
    """

    def __init__(self, config: Config, world: World, precision: Precision, length: Length, *, num_workers: int) -> None:
        evaluation = config.evaluation
        self.ks, self.total_steps = evaluation.ks, length.total_steps
        self.every_steps = length.steps(evaluation.every_epochs)
        self.percents: dict[str, float] = {}
        self.best = -1.0
        self.told_unreadable: set[str] = set()
        self.evaluator: KnnEvaluator | None = None
        self.sources: tuple[Source | None, Source | None] = (None, None)
        if not evaluation.train:
            return
        self.sources = (
            open_together(world, evaluation.train, "evaluation.train", "train"),
            open_together(world, evaluation.test, "evaluation.test", "test"),
        )
        self.evaluator = KnnEvaluator(
            *self.sources,
            image_size=evaluation.image_size or config.crops.global_size,
            device=world.device,
            mean=config.crops.mean,
            std=config.crops.std,
            ks=evaluation.ks,
            temperature=evaluation.temperature,
            num_workers=num_workers,
            amp_dtype=None if precision.name == "fp32" else precision.dtype,
            max_train_images=evaluation.max_train_images,
            rank=world.rank,
            world_size=world.size,
        )

    @property
    def notes(self) -> list[str]:
        return self.evaluator.notes if self.evaluator else []

    def due(self, step: int) -> bool:
        """Whether to evaluate after ``step`` steps: every ``evaluation.every_epochs``, and at the end of the run."""
        if self.evaluator is None:
            return False
        return step == self.total_steps or bool(self.every_steps and step % self.every_steps == 0)

    def of_untrained(self, pair: StudentTeacher) -> dict[str, float]:
        """k-NN before the first step, of the teacher: both networks are the same then. A collective call."""
        percents = self.evaluator.evaluate(pair.teacher.features)
        self.percents = {f"knn_untrained_k{k}_percent": round(value, 3) for k, value in percents.items()}
        return self.percents

    def of_both(self, pair: StudentTeacher) -> dict[str, float]:
        """k-NN of teacher and student. A collective call."""
        found = self.evaluator.evaluate_all({"teacher": pair.teacher.features, "student": pair.student.features})
        percents = {f"knn_{name}_k{k}_percent": round(value, 3) for name, of_k in found.items() for k, value in of_k.items()}
        self.percents |= percents
        return percents

    def unreadable(self) -> str | None:
        """A sentence about images that the last evaluation had to leave out and that have not been told of before; None without such."""
        names = [name for name in self.evaluator.unreadable if name not in self.told_unreadable]
        if not names:
            return None
        self.told_unreadable.update(names)
        count = "1 image" if len(names) == 1 else f"{len(names)} images"
        shown = ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
        paths = " and ".join(dict.fromkeys(str(source.path) for source in self.sources))
        return f"k-NN leaves out {count} of {paths} that cannot be read: {shown}. massl-fast data check says what is wrong with them."

    def headline(self, network: str) -> float | None:
        """k-NN of a network at k = 20, or at the k that comes first where 20 was not asked for."""
        return self.percents.get(f"knn_{network}_k{HEADLINE_K if HEADLINE_K in self.ks else self.ks[0]}_percent")

    def is_best(self) -> bool:
        """Whether the teacher's headline is higher than ever before; notes it if so."""
        value = self.headline("teacher")
        if value is None or value <= self.best:
            return False
        self.best = value
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; a copy, as it is written while training goes on."""
        return {"best_knn_percent": self.best, "knn_percent": dict(self.percents)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best, self.percents = state["best_knn_percent"], state["knn_percent"]
