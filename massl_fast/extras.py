"""Libraries that only some users want, imported where they are needed and named in a sentence where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

PROJECTS = {"pyarrow": "PyArrow", "sklearn": "scikit-learn", "scipy": "SciPy", "torch": "TensorBoard"}
"""What a module belongs to where its own name does not say it; ``torch.utils.tensorboard`` stands for TensorBoard."""


def importable(module: str) -> bool:
    """Whether a module is installed; nothing of it is imported but the packages around it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def needs(module: str, purpose: str, extra: str) -> ModuleType:
    """The module, or a ValueError that says what needs it and which extra of massl-fast installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        project = PROJECTS.get(module.split(".")[0], module)
        raise ValueError(f"{project} does not import ({error}), but {purpose} needs it: pip install 'massl-fast[{extra}]'.") from None
