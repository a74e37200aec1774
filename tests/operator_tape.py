"""A CUDA graph's stand-in for CPUs: notes every operator that a function calls, and calls them again on the same tensors.

What a CUDA graph would freeze is frozen here, too: numbers from the host, shapes, the order of operators, the addresses of tensors. A step
that takes anything of this kind anew each time therefore goes wrong in a replay, here as on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class OperatorTape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.state: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # names of ranges, nothing that computes
            return func(*args, **kwargs)
        self.before |= {id(t): (t, t.detach().clone()) for t in self._written(func, args, kwargs) if id(t) not in self.before}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def warm_up(self, function):
        return function()

    def record(self, function):
        """Operators do run here, so what they have written in place is put back afterwards."""
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        generator = torch.get_rng_state()
        with self:
            result = function()
        torch.set_rng_state(generator)
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.copy_(value)
        return result

    def between(self, exchange):
        with _disable_current_modes():
            exchange()
        self.calls.append((exchange, (), {}, None))

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                            old.copy_(new)
                    else:
                        assert old == new, f"{func} gave the host {new} where it gave {old} when it was recorded"

    @staticmethod
    def _written(func, args, kwargs) -> list[Tensor]:
        """Arguments that the operator changes."""
        found = []
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return found
