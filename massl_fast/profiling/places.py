"""Where in the source an operator was called from."""

from __future__ import annotations

import os
import sys

import torch

from massl_fast.kernels import cross_entropy

_PROFILING = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(_PROFILING)
_KERNELS = os.path.dirname(os.path.abspath(cross_entropy.__file__))
_NOT_CALLERS = (os.path.dirname(os.path.abspath(torch.__file__)), _PROFILING, "<")


def calling_line() -> str:
    """File and line of the innermost caller outside PyTorch and profiling: folder/file:line in this program, the whole path elsewhere.

    While autograd runs, that is the line that called ``backward``.
    """
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_CALLERS):
            for folder in (_PACKAGE, _KERNELS):
                if file.startswith(folder + os.sep):
                    return f"{os.path.relpath(file, os.path.dirname(folder))}:{frame.f_lineno}"
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "inside PyTorch"
