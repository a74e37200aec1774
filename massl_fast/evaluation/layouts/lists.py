"""Names that a stranger's file lists: kept inside the folder that they belong to."""

from __future__ import annotations

from pathlib import Path, PurePosixPath


def inside(root: Path, name: str, said_by: Path | str) -> str:
    """`name` if it is a plain relative path that stays below `root`, links included.

    Raises:
        ValueError: it is absolute, climbs above the folder, holds a NUL, or leads out of it by a link.
    """
    path = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{said_by} names {name!r}, which is no file inside {root}; names must be relative and may not hold '..'.")
    resolved, top = (root / path).resolve(), root.resolve()
    if not resolved.is_relative_to(top):
        raise ValueError(f"{said_by} names {name!r}, which leads out of {root} to {resolved}. Put the images into the folder itself.")
    return name


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty, without the space around them.

    Raises:
        ValueError: the file is not there or is no text.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a list: {error}.") from None
    return [line.strip() for line in lines if line.strip()]
