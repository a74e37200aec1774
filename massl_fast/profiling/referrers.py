"""Which Python object keeps a storage alive: the containers and attributes that lead to its tensors."""

from __future__ import annotations

import gc
import types
from typing import Any

import torch

_DEPTH = 4
"""Containers in containers that are followed."""


def referrers_of(storages: set[int]) -> dict[int, str]:
    """For storages (by ``_cdata``) what keeps them, in words: ``a list of 5 in kept of a Leaky``; without those that no object keeps."""
    found: dict[int, str] = {}
    if not storages:
        return found
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    for tensor in tensors:
        try:
            key = tensor.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):  # a tensor without storage
            continue
        if key in storages and not found.get(key):
            found[key] = _referrer(tensor, [id(tensors)], _DEPTH)
    return {key: words for key, words in found.items() if words}


# No closures below: they would hold what is being searched for.


def _referrer(thing: Any, ignored: list[int], depth: int) -> str:
    """The way from ``thing`` to the first object with a name; empty where there is none."""
    if not depth:
        return ""
    unnamed = ""
    owners = gc.get_referrers(thing)
    ignored = [*ignored, id(owners)]
    for owner in owners:
        if id(owner) in ignored or isinstance(owner, types.FrameType):
            continue
        if isinstance(owner, dict):
            key = _key_of(owner, thing)
            if named := _named(owner, key):
                return named
            described = f"a dict under {key!r}"
        elif isinstance(owner, (list, tuple, set)):
            described = f"a {type(owner).__name__} of {len(owner)}"
        elif isinstance(owner, types.CellType):
            return _closure_of(owner)
        else:
            return _an(type(owner).__name__)
        above = _referrer(owner, [*ignored, id(owner)], depth - 1)
        if above:
            return f"{described} in {above}"
        unnamed = unnamed or described
    return unnamed


def _key_of(mapping: dict, thing: Any) -> Any:
    for key, value in mapping.items():
        if value is thing:
            return key
    return "?"


def _named(namespace: dict, key: Any) -> str:
    """``kept of a Leaky`` where the dict holds the attributes of an object, ``kept of module x`` where a module's globals."""
    if "__name__" in namespace and "__spec__" in namespace:
        return f"{key} of module {namespace['__name__']}"
    for owner in gc.get_referrers(namespace):
        if getattr(owner, "__dict__", None) is namespace:
            return f"{key} of {_an(type(owner).__name__)}"
    return ""


def _closure_of(cell: types.CellType) -> str:
    """The variable of a function that a cell is."""
    for cells in gc.get_referrers(cell):
        if not isinstance(cells, tuple):
            continue
        for function in gc.get_referrers(cells):
            if isinstance(function, types.FunctionType) and function.__closure__ is cells:
                name = function.__code__.co_freevars[[id(one) for one in cells].index(id(cell))]
                return f"{name}, a variable that {function.__qualname__} uses"
    return "a variable of a function"


def _an(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
