"""Definition of this package's PyTorch operators, and a way for profilers to find the Python function behind one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def operator(name: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Decorator: ``torch.library.custom_op`` of a function that changes none of its arguments."""

    def define(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        _FUNCTIONS[name] = function
        return torch.library.custom_op(name, mutates_args=())(function)

    return define


def implementation(overload: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """The Python function behind an operator of this package; None for any other."""
    return _FUNCTIONS.get(overload._schema.name)
