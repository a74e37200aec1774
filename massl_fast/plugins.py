"""Python files of the user that add objectives, evaluations or loaders, imported because ``run.plugins`` names them.

A plugin is a program: it runs with all rights of the user. Only the command line, a recipe and the user's own run folder name plugins; the
settings in a checkpoint never do.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

LONGEST_SHOWN = 200
"""Characters of a path in a sentence."""


def load_plugins(paths: Iterable[str | Path]) -> None:
    """Import each file, once per process, under the name of the file.

    Its folder goes to the end of the module search path, so that it may import files beside it and processes of a loader find its classes.

    Raises ValueError for a file that is absent or whose name is not free, and with the traceback for one that raises.
    """
    for path in map(Path, paths):
        _load(path)


def _load(path: Path) -> None:
    if not _is_file(path) or path.suffix != ".py":
        raise ValueError(f"run.plugins names {str(path)[:LONGEST_SHOWN]}, which is not a Python file here. Name an existing .py file.")
    path = path.resolve()
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path):
        return
    if not name.isidentifier():
        raise ValueError(f"run.plugins names {path}, but {name} cannot be the name of a Python module. Rename the file.")
    if name in sys.modules or not _is_free(name, path):
        raise ValueError(f"run.plugins names {path}, but there is another Python module named {name}. Rename the file.")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"The plugin {path} cannot be imported; this is where it fails:\n{_told_from(path, error)}") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # names that no file can have
        return False


def _is_free(name: str, path: Path) -> bool:
    """Whether an import of ``name`` gives nothing, or this very file."""
    spec = importlib.util.find_spec(name)
    return spec is None or (spec.origin is not None and Path(spec.origin).resolve() == path)


def _told_from(path: Path, error: BaseException) -> str:
    """The traceback from the plugin's first line on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != str(path):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
