"""Every setting of a training run.

``sections`` holds the models that objectives share, ``whole`` puts them together, ``objectives`` adds one per objective, ``text`` reads
recipes, command lines and run folders.
"""

from massl_fast.config.objectives import MasslSettings
from massl_fast.config.sections import (
    LOADERS,
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
    register_loader_settings,
)
from massl_fast.config.text import (
    chosen_objective,
    config_text,
    describe_section,
    describe_settings,
    load_config,
    parse_overrides,
    parsed_yaml,
    read_config,
    recipe_names,
    validated,
    write_config,
)
from massl_fast.config.whole import SETTINGS, Config, ObjectiveSettings, register_settings
from massl_fast.registry import Registry

__all__ = [
    "LOADERS",
    "SETTINGS",
    "CheckpointSection",
    "Config",
    "CropsSection",
    "DataSection",
    "EvaluationSection",
    "LoggingSection",
    "MasslSettings",
    "ModelSection",
    "ObjectiveSettings",
    "OptimizerSection",
    "ParallelSection",
    "Registry",
    "RunSection",
    "Section",
    "TeacherSection",
    "TrainSection",
    "chosen_objective",
    "config_text",
    "describe_section",
    "describe_settings",
    "load_config",
    "parse_overrides",
    "parsed_yaml",
    "read_config",
    "recipe_names",
    "register_loader_settings",
    "register_settings",
    "validated",
    "write_config",
]
