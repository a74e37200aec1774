"""Where in the source an operator was called from."""

from __future__ import annotations

import os
import sys

import torch

from massl_fast import kernels

_PROFILING = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(_PROFILING)
_KERNELS = os.path.dirname(os.path.abspath(kernels.__file__))
_LINEAR = os.path.join(_PACKAGE, "models", "products.py")  # stands where PyTorch's linear layer would
_NOT_CALLERS = (os.path.dirname(os.path.abspath(torch.__file__)), _PROFILING, _LINEAR, "<")


def calling_line() -> str:
    """File and line of the innermost caller outside PyTorch, linear layers and profiling: massl_fast/engine/step.py:92.

    While autograd runs, that is the line that called ``backward``. Paths are relative to where packages lie or to the current folder, so
    that records tell nothing of the machine.
    """
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_CALLERS):
            return f"{_shortened(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return "inside PyTorch"


def _shortened(file: str) -> str:
    for folder in (_PACKAGE, _KERNELS):
        if file.startswith(folder + os.sep):
            return os.path.relpath(file, os.path.dirname(folder))
    for folder in ("site-packages", "dist-packages"):
        _, found, rest = file.rpartition(f"{os.sep}{folder}{os.sep}")
        if found:
            return rest
    inside = os.path.relpath(file)
    return os.path.basename(file) if inside.startswith(os.pardir) else inside
