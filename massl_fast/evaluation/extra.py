"""Libraries of the extra ``massl-fast[eval]``, imported where they are needed; a sentence names what is missing."""

from __future__ import annotations

from types import ModuleType

from massl_fast import extras


def needs(module: str, purpose: str) -> ModuleType:
    """The module, or a ValueError that says what needs it and how it is installed."""
    return extras.needs(module, purpose, "eval")
