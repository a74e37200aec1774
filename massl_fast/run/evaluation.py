"""Evaluations of a run: which are due when, of which networks, what they found last, and which step was the best by the named metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from massl_fast.config import Config
from massl_fast.data.loaders import open_together
from massl_fast.data.sources import Source
from massl_fast.distributed.world import World
from massl_fast.evaluation.base import Protocol, checked_settings, flat
from massl_fast.evaluation.registry import protocol_named
from massl_fast.evaluation.subject import Subject
from massl_fast.length import Length
from massl_fast.models.pair import StudentTeacher
from massl_fast.models.precision import Precision
from massl_fast.objectives.base import Metric
from massl_fast.run.rank_measures import RANK_METRICS, RankMeasures

NAMES_SHOWN = 5
KNN = "knn"


class RunEvaluation:
    """Evaluates by the protocols of ``evaluation.protocols``; k-NN takes part where ``evaluation.train`` is set.

    Attributes:
        protocols: those that take part; where there are none, nothing is ever due.
        notes: sentences to tell the user once, known before the first evaluation.
        figures: what protocols found last, by the keys of metrics.jsonl.
        best_metric: key of the metric by which the best checkpoint is chosen; None where nothing is evaluated.
        best: the best value of it so far; None before there is one.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        precision: Precision,
        length: Length,
        *,
        num_workers: int,
        rank_measures: RankMeasures | None = None,
    ) -> None:
        evaluation = config.evaluation
        self.world, self.rank_measures = world, rank_measures
        self.total_steps = length.total_steps
        self.every_steps = length.steps(evaluation.every_epochs)
        self.subject = Subject(
            networks={},
            image_size=evaluation.image_size or config.crops.global_size,
            mean=config.crops.mean,
            std=config.crops.std,
            device=world.device,
            num_workers=num_workers,
            precision=precision.name,
            seed=config.run.seed,
            raw_pixels=False,
            shard=(world.rank, world.size),
            keep_images=True,
            option="evaluation.{}".format,
            open_source=partial(open_together, world),
        )
        self._labelled = (evaluation.train, evaluation.test)
        self.protocols = _protocols_of(config)
        self.notes = list(dict.fromkeys(note for protocol in self.protocols for note in protocol.prepare(self.subject)))
        self.figures: dict[str, float] = {}
        self.best_metric, self.higher_is_better = self._best_by(evaluation.best_metric)
        self.best: float | None = None
        self.told_unreadable: set[str] = set()
        self._unreadable: list[str] = []

    @property
    def active(self) -> bool:
        return bool(self.protocols)

    @property
    def sources(self) -> tuple[Source | None, Source | None]:
        """(training images, test images) of ``evaluation.train`` and ``evaluation.test``; None where no protocol has opened them."""
        opened = self.subject.opened
        return tuple(opened.get(("source", path, role)) for path, role in zip(self._labelled, ("train", "test")))

    def metrics(self) -> list[Metric]:
        """What the report should draw: rank measures, and the figures of all protocols but k-NN, which has a place of its own there."""
        of_ranks = list(RANK_METRICS) if self.rank_measures else []
        return of_ranks + [
            Metric(f"{protocol.name}_{network}_{figure.key}", f"{protocol.title}, {network}: {figure.title}", figure.unit)
            for protocol in self.protocols
            if protocol.name != KNN
            for network in ("teacher", "student")
            for figure in protocol.figures()
        ]

    def headlines(self) -> dict[str, str]:
        """Keys in metrics.jsonl of the figures that stand for each protocol, with their units."""
        return {
            f"{protocol.name}_{network}_{protocol.headline.key}": protocol.headline.unit
            for protocol in self.protocols
            for network in ("untrained", "teacher", "student")
        }

    def due(self, step: int) -> bool:
        """Whether to evaluate after ``step`` steps: every ``evaluation.every_epochs``, and at the end of the run."""
        if not self.active and not self.rank_measures:
            return False
        return step == self.total_steps or bool(self.every_steps and step % self.every_steps == 0)

    def of_untrained(self, pair: StudentTeacher) -> dict[str, float]:
        """Figures before the first step, of the teacher: both networks are the same then. A collective call."""
        self.figures = self._evaluate({"untrained": pair.teacher})
        return self.figures

    def of_both(self, pair: StudentTeacher) -> dict[str, float]:
        """Figures of teacher and student. A collective call."""
        found = self._evaluate({"teacher": pair.teacher, "student": pair.student})
        self.figures |= found
        return found

    def readings(self) -> dict[str, float]:
        """Rank measures of the last step, for every logged line; nothing where ``rank_measures`` is off. A collective call."""
        found = self.rank_measures.read(self.world) if self.rank_measures else {}
        self.figures |= found
        return found

    def _evaluate(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        subject, found, unreadable = self.subject.of(networks), {}, []
        for protocol in self.protocols:
            result = protocol.run(subject)
            found |= flat(result.results, protocol.name, protocol.figures())
            unreadable += result.unreadable
        self.take_note_of(unreadable)
        return found

    def take_note_of(self, unreadable: list[str]) -> None:
        """These images could not be read in the last evaluation."""
        self._unreadable = list(dict.fromkeys(unreadable))

    def unreadable(self) -> str | None:
        """A sentence about images that the last evaluation had to leave out and that no sentence has named before; None without such."""
        names = [name for name in self._unreadable if name not in self.told_unreadable]
        if not names:
            return None
        self.told_unreadable.update(names)
        who = "k-NN" if [protocol.name for protocol in self.protocols] == [KNN] else "Evaluation"
        count = "1 image" if len(names) == 1 else f"{len(names)} images"
        shown = ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
        paths = " and ".join(dict.fromkeys(str(source.path) for source in self.subject.opened.values() if isinstance(source, Source)))
        return f"{who} leaves out {count} of {paths} that cannot be read: {shown}. massl-fast data check says what is wrong with them."

    def headline(self, network: str) -> float | None:
        """k-NN of a network at k = 20, or at the first k where 20 is not among them; None without k-NN."""
        knn = next((protocol for protocol in self.protocols if protocol.name == KNN), None)
        return self.figures.get(f"{KNN}_{network}_{knn.headline.key}") if knn else None

    def is_best(self) -> bool:
        """Whether the named metric is better than ever before; notes it if so."""
        value = self.figures.get(self.best_metric) if self.best_metric else None
        if (
            value is None
            or math.isnan(value)
            or (self.best is not None and (value <= self.best if self.higher_is_better else value >= self.best))
        ):
            return False
        self.best = value
        return True

    def _best_by(self, key: str) -> tuple[str | None, bool]:
        """(key of the metric that names the best checkpoint, whether more of it is better)."""
        higher_is_better = {
            f"{protocol.name}_{network}_{figure.key}": figure.higher_is_better
            for protocol in self.protocols
            for network in ("teacher", "student")
            for figure in protocol.figures()
        } | ({metric.key: True for metric in RANK_METRICS} if self.rank_measures else {})
        if not key:
            key = f"{self.protocols[0].name}_teacher_{self.protocols[0].headline.key}" if self.protocols else ""
        if key and key not in higher_is_better:
            choices = f"It can be {', '.join(higher_is_better)}." if higher_is_better else "Set evaluation.train and evaluation.test."
            raise ValueError(f"evaluation.best_metric is {key!r}, which no evaluation of this run finds. {choices}")
        return key or None, higher_is_better.get(key, True)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; a copy, as it is written while training goes on."""
        return {"best_metric": self.best_metric, "best_value": self.best, "evaluated": dict(self.figures)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; one by another metric leaves the best open. Older checkpoints name theirs differently."""
        self.figures = dict(state["evaluated"] if "evaluated" in state else state["knn_percent"])
        if "best_value" in state:
            self.best = state["best_value"] if state["best_metric"] == self.best_metric else None
        elif (self.best_metric or "").startswith(f"{KNN}_teacher_"):
            self.best = state["best_knn_percent"] if state["best_knn_percent"] >= 0 else None


def _protocols_of(config: Config) -> list[Protocol]:
    evaluation = config.evaluation
    given = {"train": evaluation.train, "test": evaluation.test, "max_train_images": evaluation.max_train_images}
    of_knn = {"k": evaluation.ks, "temperature": evaluation.temperature}
    for name in evaluation.settings:
        if name not in evaluation.protocols:
            raise ValueError(f"evaluation.settings names {name}, which is not among evaluation.protocols. Add it there, or remove it.")
    protocols = []
    for name in dict.fromkeys(evaluation.protocols):
        if name == KNN and not evaluation.train:
            continue
        kind = protocol_named(name)
        fields = kind.Settings.model_fields
        defaults = {key: value for key, value in {**given, **(of_knn if name == KNN else {})}.items() if key in fields and value != ""}
        settings = {**defaults, **evaluation.settings.get(name, {})}
        protocols.append(kind(checked_settings(settings, kind.Settings, f"evaluation.settings.{name}.{{}}".format)))
    return protocols
