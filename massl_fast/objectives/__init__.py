"""Every objective by its name. A new one is a file here, a settings model in ``config.objectives`` and a line below; one outside the
package calls ``register``."""

from __future__ import annotations

import importlib

from massl_fast.config import ObjectiveSettings, register_settings
from massl_fast.objectives.base import Objective
from massl_fast.registry import Registry, demand_whole

OBJECTIVES: Registry[str | type[Objective]] = Registry(
    "objective.name",
    {
        "massl": "massl_fast.objectives.massl:MasslObjective",
        "carp": "massl_fast.objectives.carp:CarpObjective",
        "dino": "massl_fast.objectives.dino:DinoObjective",
        "ibot": "massl_fast.objectives.ibot:IbotObjective",
        "mmc": "massl_fast.objectives.mmc:MmcObjective",
        "moco_v3": "massl_fast.objectives.moco_v3:MocoV3Objective",
    },
)
"""Classes, or where they are imported from when a run names them."""


def register(objective: type[Objective]) -> None:
    """Make ``objective`` known by the ``name`` of its ``Settings``; raises ValueError where the name is taken or something is lacking."""
    demand_whole(objective, "an objective", ("Settings",))
    field = objective.Settings.model_fields.get("name") if issubclass(objective.Settings, ObjectiveSettings) else None
    name = field.default if field else None
    if not isinstance(name, str):
        raise ValueError(
            f'{objective.__name__}.Settings must be an ObjectiveSettings with the objective\'s name as a default, name: str = "mine".'
        )
    register_settings(name, objective.Settings)
    OBJECTIVES.add(name, objective)


def objective_class(name: str) -> type[Objective]:
    """Raises ValueError for a name that nobody registered."""
    found = OBJECTIVES.chosen(name)
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    return found
