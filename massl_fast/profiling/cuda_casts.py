"""What CUDA's autocast casts, on tensors of a CPU: a step that is counted in shapes is counted as a GPU takes it.

The lists of the two differ: CUDA's has norms, sums, powers and softmax give float32 and casts the arguments of ``addcmul`` and its like to
the widest (documentation of torch.amp, "CUDA Op-Specific Behavior"); a CPU's does neither. Matrix products are in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NARROW = (torch.float16, torch.bfloat16)
FLOAT32 = (
    *("layer_norm", "group_norm", "rms_norm", "exp", "expm1", "log", "log1p", "log2", "log10", "logsumexp", "reciprocal", "rsqrt"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "cosine_similarity", "dist", "softplus"),
)
"""Operators whose arguments are cast to float32."""
FLOAT32_RESULT = {
    **{name: name for name in ("sum", "sum.dim_IntList", "softmax.int", "log_softmax.int", "cumsum", "cumprod", "linalg_vector_norm")},
    "norm.Scalar": "norm.ScalarOpt_dtype",
    "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype",
}
"""Operators that read what they are given and are told to give float32."""
WIDEST = ("addcmul", "addcdiv", "atan2", "bilinear", "cross", "dot", "vdot", "index_put", "scatter_add", "tensordot")
"""Operators whose arguments are cast to the widest of them."""


@contextlib.contextmanager
def cuda_casts() -> Iterator[None]:
    """Inside, ``torch.autocast("cpu", …)`` casts as CUDA's does. Not for several threads at a time.

    An operator that CUDA casts and this module does not know raises NotImplementedError, so that nothing is counted as it is not.
    """
    library = torch.library.Library("aten", "IMPL")  # a fragment: gone with ``_destroy``
    try:
        for name in FLOAT32:
            library.impl(name, _casting(name, lambda tensors: torch.float32), "AutocastCPU")
        for name in WIDEST:
            library.impl(name, _casting(name, _widest), "AutocastCPU")
        for name, overload in FLOAT32_RESULT.items():
            library.impl(name, _giving_float32(name, overload), "AutocastCPU")
        for name in unknown():
            library.impl(name, _refusing(name), "AutocastCPU")
        yield
    finally:
        library._destroy()


def unknown() -> list[str]:
    """Operators that CUDA's autocast handles, a CPU's does not and this module does not."""
    known = {*FLOAT32, *FLOAT32_RESULT, *WIDEST}
    names = [name[len("aten::") :] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    return [name for name in names if _handles("AutocastCUDA", name) and not _handles("AutocastCPU", name) and name not in known]


def _handles(key: str, name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _casting(name: str, chosen: Callable[[list[Tensor]], torch.dtype]) -> Callable[..., Any]:
    operator = _operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        floating = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        dtype = chosen(floating)

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.dtype in (*NARROW, torch.float32) else value

        with torch.autocast("cpu", enabled=False):
            args, kwargs = tree_map(cast, (args, kwargs))
            return operator(*args, **kwargs)

    return kernel


def _widest(tensors: list[Tensor]) -> torch.dtype:
    found = {tensor.dtype for tensor in tensors}
    return found.pop() if len(found) == 1 else torch.float32


def _giving_float32(name: str, overload: str) -> Callable[..., Any]:
    usual, told = _operator(name), _operator(overload)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            narrow = args[0].dtype in NARROW and kwargs.get("dtype") is None
            # softmax(input, dim, dtype) and its like may be given the format by position.
            narrow = narrow and not any(isinstance(argument, torch.dtype) for argument in args)
            return told(*args, **{**kwargs, "dtype": torch.float32}) if narrow else usual(*args, **kwargs)

    return kernel


def _refusing(name: str) -> Callable[..., Any]:
    operator = _operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, Tensor) and leaf.dtype in NARROW for leaf in tree_leaves((args, kwargs))):
            raise NotImplementedError(f"How CUDA's autocast treats aten::{name} is not in profiling/cuda_casts.py.")
        with torch.autocast("cpu", enabled=False):
            return operator(*args, **kwargs)

    return kernel
