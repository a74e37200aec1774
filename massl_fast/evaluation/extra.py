"""Libraries of the extra ``massl-fast[eval]``, imported where they are needed and asked for in a sentence where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def needs(module: str, purpose: str) -> ModuleType:
    """The module, or a ValueError that says what needs it and how it is installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = {"sklearn": "scikit-learn", "scipy": "SciPy"}.get(module.split(".")[0], module)
        raise ValueError(f"{library} does not import ({error}), but {purpose} needs it: pip install 'massl-fast[eval]'.") from None
