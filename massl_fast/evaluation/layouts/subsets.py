"""Lists of training images: SimCLR's 1 % and 10 % of ImageNet, and ImageNet-LT's.

    1percent.txt, 10percent.txt (SimCLR)      n01440764_10026.JPEG          one file name per line, its class before the underscore
    ImageNet_LT_train.txt (Liu et al. 2019)   train/n01440764/n01440764_190.JPEG 0

The label of an image is that of its class folder; the number in ImageNet-LT's lines is not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from massl_fast.evaluation.layouts.lists import read_lines

if TYPE_CHECKING:
    from massl_fast.data.sources import Source

NAMES_SHOWN = 3


def positions_of_list(source: Source, file: Path) -> tuple[np.ndarray, list[str]]:
    """(positions in ``source`` of the listed images, ascending; notes on names that it does not have).

    A name is found by its folder and file name where it has a folder, otherwise by its file name.

    Raises ValueError for a file that cannot be read, none of whose names occur, or one of whose names could be several images.
    """
    with_folder: dict[str, list[int]] = {}
    alone: dict[str, list[int]] = {}
    for position in range(len(source)):
        parts = source.name(position).split("/")
        alone.setdefault(parts[-1], []).append(position)
        with_folder.setdefault("/".join(parts[-2:]), []).append(position)
    found, absent = [], []
    lines = read_lines(file)
    for line in lines:
        name, _, last = line.rpartition(" ")
        name = name.strip() if name and last.isdecimal() else line
        parts = name.split("/")
        places = with_folder.get("/".join(parts[-2:]), []) if len(parts) > 1 else alone.get(name, [])
        if len(places) > 1:
            raise ValueError(f"{file} lists {name}, and {source.path} has {len(places)} images of that name. Give a list with folders.")
        found += places
        if not places:
            absent.append(name)
    if not found:
        raise ValueError(
            f"None of the {len(lines)} images that {file} lists is in {source.path}; the first is {lines[0] if lines else 'missing'}. "
            f"Name the folder of class folders that the list is of."
        )
    shown = ", ".join(absent[:NAMES_SHOWN]) + (" …" if len(absent) > NAMES_SHOWN else "")
    notes = [f"{len(absent)} of the {len(lines)} images that {file} lists are not in {source.path}: {shown}."] if absent else []
    return np.unique(np.array(found, dtype=np.int64)), notes
