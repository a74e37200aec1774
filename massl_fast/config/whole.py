"""All sections of a run's settings together, what an objective's settings have in common, and what has to fit between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr, SerializeAsAny, field_validator, model_validator

from massl_fast.config.sections import (
    CheckpointSection,
    CropsSection,
    DataSection,
    EvaluationSection,
    LoggingSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    Section,
    TeacherSection,
    TrainSection,
)
from massl_fast.registry import Registry, shortened

DEFAULT_OBJECTIVE = "massl"


class ObjectiveSettings(Section):
    """What all objectives' settings have. The first line of a model's docstring is its line in ``massl-fast train --help``."""

    name: str
    """Which objective is trained."""

    def check(self, config: Config) -> None:
        """Raise ValueError where these settings do not fit together or do not fit ``config``, whose sections are valid by themselves."""


SETTINGS: Registry[type[ObjectiveSettings]] = Registry("objective.name", {})
"""Every objective's settings by its name; ``config.objectives`` fills it."""


def register_settings(name: str, model: type[ObjectiveSettings]) -> None:
    """Make ``model`` the settings of ``objective.name`` ``name``; raises ValueError where the name is taken."""
    SETTINGS.add(name, model)


if TYPE_CHECKING:
    NamedObjective = Any  # which model it is, and so which keys it has, objective.name says when settings are read
else:
    NamedObjective = SerializeAsAny[ObjectiveSettings]


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    crops: CropsSection = CropsSection()
    model: ModelSection = ModelSection()
    objective: NamedObjective = Field(default_factory=lambda: SETTINGS[DEFAULT_OBJECTIVE].model_validate({}))
    optimizer: OptimizerSection = OptimizerSection()
    teacher: TeacherSection = TeacherSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()
    checkpoint: CheckpointSection = CheckpointSection()

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What a user should know about how these settings were read, a sentence each."""
        return self._notes

    @field_validator("objective", mode="before")
    @classmethod
    def _of_the_named_objective(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = {"name": DEFAULT_OBJECTIVE, **value}
        if not isinstance(value["name"], str):
            raise ValueError(f"objective.name is {shortened(repr(value['name']))}; it is one of {', '.join(SETTINGS)}.")
        return SETTINGS.chosen(value["name"]).model_validate(value)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Config:
        self.objective.check(self)
        evaluation = self.evaluation
        if bool(evaluation.train) != bool(evaluation.test):
            missing = "test" if evaluation.train else "train"
            raise ValueError(
                f"evaluation.{missing} is empty: k-NN needs labelled images to compare with and to classify. Set both, or neither."
            )
        for name in ("global_scale", "local_scale", "blur_sigma"):
            low, high = getattr(self.crops, name)
            if not 0 < low <= high:
                raise ValueError(f"crops.{name} is ({low}, {high}); it takes two positive numbers, the smaller first.")
        return self
