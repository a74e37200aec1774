"""Names that a setting may take and what each stands for: a dictionary that refuses in sentences."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

Entry = TypeVar("Entry")

LONGEST_SHOWN = 200
"""Characters of a value in a sentence."""


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def demand_whole(kind: type, contract: str, attributes: Iterable[str]) -> None:
    """Raise ValueError where a class that fulfils a contract lacks one of its ``attributes`` or does not override an abstract method."""
    lacking = [name for name in attributes if not hasattr(kind, name)] + sorted(getattr(kind, "__abstractmethods__", ()))
    if lacking:
        raise ValueError(f"{kind.__name__} lacks {', '.join(lacking)}, which {contract} must have. Its base class says what each is.")


class Registry(dict[str, Entry]):
    """What the names of ``setting`` stand for, in the order in which they were added."""

    def __init__(self, setting: str, entries: dict[str, Entry]) -> None:
        super().__init__(entries)
        self.setting = setting

    def add(self, name: str, entry: Entry) -> None:
        """Raises ValueError where another entry has the name already."""
        if self.setdefault(name, entry) is not entry:
            raise ValueError(f"{self.setting} {name} is taken already. Choose another name for what you register.")

    def chosen(self, name: str) -> Entry:
        """What ``name`` stands for; raises ValueError with the choices where it stands for nothing."""
        if name in self:
            return self[name]
        near = difflib.get_close_matches(name, self, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"{self.setting} is {shortened(repr(name))}.{hint} It can be {', '.join(self)}, or what a plugin (run.plugins) registers."
        )
