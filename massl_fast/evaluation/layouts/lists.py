"""Names that a stranger's file lists: kept inside the folder that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np


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


def found_of(root: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names of files that are there, names of those that are not)."""
    present = [name for name in names if (root / name).is_file()]
    there = set(present)
    return present, [name for name in names if name not in there]


def listed_positions(file: Path, names: Sequence[str]) -> np.ndarray:
    """Positions in `names` of the images that a list names, in the order of `names`.

    The lists are those of SimCLR's subsets (1percent.txt: one file name per line) and of ImageNet-LT (ImageNet_LT_train.txt: a path and a
    number per line, of which the number is not needed).

    A line finds an image by its last parts: n01440764_10026.JPEG is train/n01440764/n01440764_10026.JPEG if no other image is called so.

    Raises:
        ValueError: a line names no image, or several.
    """
    by_last: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        by_last.setdefault(name.rsplit("/", 1)[-1], []).append(position)
    found, missing = [], []
    for line in read_lines(file):
        fields = line.rsplit(None, 1)
        name = fields[0] if len(fields) == 2 and fields[1].isdecimal() else line
        candidates = by_last.get(name.rsplit("/", 1)[-1], [])
        if len(candidates) > 1:
            candidates = [i for i in candidates if f"/{names[i]}".endswith(f"/{name}") or f"/{name}".endswith(f"/{names[i]}")]
        if len(candidates) > 1:
            raise ValueError(f"{file} names {name!r}, and {len(candidates)} images are called so, among them {names[candidates[0]]}.")
        if candidates:
            found.append(candidates[0])
        else:
            missing.append(name)
    if missing:
        total = len(found) + len(missing)
        raise ValueError(f"{len(missing)} of the {total} images that {file} names are not in the data, for instance {missing[0]}.")
    return np.unique(np.array(found, np.int64))
