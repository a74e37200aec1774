"""Lines of the program at which the host waits for the device, found by watching one step.

Watched are operators that give the host a value or a shape (``item()``, ``bool(tensor)``, ``nonzero``, indexing with a mask), copies
between host and device, methods that are such a copy on a GPU and nothing on a CPU (``cpu()``, ``tolist()``, ``numpy()``), and calls of
``torch.cuda``'s synchronisation. So the lines that read a value are found on a CPU, too, where nothing waits. Not seen: what C++ or a
compiled graph does without such an operator, and on a CPU ``tensor.to(device)``, since there is no other device.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from massl_fast.profiling.source_lines import calling_line
from massl_fast.profiling.synthetic import SyntheticRun

# Operators after which the host knows a value, or a shape, that only the device knew.
OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "equal",
    "is_nonzero",
    "bincount",
}
METHODS = {Tensor.cpu: "cpu", Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.__array__: "__array__"}
CALLS = ((torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize"))


@dataclass(frozen=True)
class Wait:
    """A place in the program where the host needs a value from the device."""

    operator: str
    line: str
    count: int
    """Waits per step."""


def find_waits(run: SyntheticRun) -> list[Wait]:
    """One step, watched; most frequent places first."""
    counts: Counter[tuple[str, str]] = Counter()
    with _Methods(counts), _Operators(counts), _calls(counts):
        run.step()
    return [Wait(operator, line, count) for (operator, line), count in counts.most_common()]


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counter[tuple[str, str]]):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        out = func(*args, **kwargs)
        if name in OPERATORS or (name in ("_to_copy", "copy_") and _waits_for_copy(args, kwargs, out)):
            self.counts[name, calling_line()] += 1
        return out


def _waits_for_copy(args: tuple, kwargs: dict[str, Any], out: Any) -> bool:
    """A copy between host and device that is not asked to run on its own, or that comes from or goes to ordinary (not pinned) memory."""
    tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)]
    kinds = {tensor.device.type for tensor in tensors}
    if kinds != {"cpu", "cuda"}:
        return False
    alone = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
    pinned = all(tensor.is_pinned() for tensor in tensors if tensor.device.type == "cpu")
    return not (alone and pinned)


class _Methods(TorchFunctionMode):
    """Methods of tensors on the host; on a device their copies are seen as operators."""

    def __init__(self, counts: Counter[tuple[str, str]]):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS and isinstance(args[0], Tensor) and args[0].device.type == "cpu":
            self.counts[METHODS[func], calling_line()] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _calls(counts: Counter[tuple[str, str]]) -> Iterator[None]:
    """Count calls that wait for a device, a stream or an event."""
    with contextlib.ExitStack() as undo:
        for owner, name in CALLS:
            inner = getattr(owner, name)

            @functools.wraps(inner)
            def counted(*args, inner=inner, name=f"{owner.__name__}.{name}", **kwargs):
                counts[name, calling_line()] += 1
                return inner(*args, **kwargs)

            setattr(owner, name, counted)
            undo.callback(setattr, owner, name, inner)
        yield
