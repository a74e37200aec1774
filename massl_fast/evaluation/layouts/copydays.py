"""INRIA Copydays (original/, strong/, jpegqual/Q/, crops/C/) and folders of the user's own pairs (pairs.csv)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from massl_fast.data.sources import is_image_name
from massl_fast.evaluation.layouts.lists import inside

PREFIX = 4
PAIRS = "pairs.csv"


@dataclass(frozen=True)
class Block:
    """Altered images of one kind."""

    name: str
    files: tuple[str, ...]
    """Relative to the root."""
    originals: tuple[int, ...]
    """For each of the files, the position of the image that it is a copy of."""


@dataclass(frozen=True)
class CopySet:
    root: Path
    originals: tuple[str, ...]
    blocks: tuple[Block, ...]
    own_pairs: bool
    """Whether these are the user's own pairs and not Copydays."""


def read_copies(root: Path) -> CopySet:
    """Originals and their copies: of pairs.csv where there is one (two columns, copy and original, paths below ROOT), else of Copydays,
    where the first four characters of a name tell the original. Which blocks exist is looked up.

    Raises:
        ValueError: there is neither, a copy has no original, or a name leads out of the folder.
    """
    if (root / PAIRS).is_file():
        return _own_pairs(root)
    originals = tuple(_images(root, "original"))
    if not originals:
        raise ValueError(
            f"{root} holds neither {PAIRS} (two columns: copy, original) nor images in original/ as Copydays has them. Name such a folder."
        )
    known: dict[str, int] = {}
    for position, file in enumerate(originals):
        prefix = Path(file).name[:PREFIX]
        if prefix in known:
            raise ValueError(
                f"{originals[known[prefix]]} and {file} in {root} begin with the same {PREFIX} characters, which tell an original. "
                f"Give your own pairs in {PAIRS}."
            )
        known[prefix] = position
    names = ["strong", *(f"{kind}/{level}" for kind in ("jpegqual", "crops") for level in _levels(root / kind))]
    blocks = [Block("original", originals, tuple(range(len(originals))))]
    for name in names:
        files = tuple(_images(root, name))
        without = next((file for file in files if Path(file).name[:PREFIX] not in known), None)
        if without is not None:
            raise ValueError(f"{root / without} begins with {Path(without).name[:PREFIX]!r}, as no image in {root / 'original'} does.")
        if files:
            blocks.append(Block(name, files, tuple(known[Path(file).name[:PREFIX]] for file in files)))
    if len(blocks) == 1:
        raise ValueError(f"{root} holds originals but no copies: none of strong/, jpegqual/Q/ and crops/C/ has images.")
    return CopySet(root, originals, tuple(blocks), own_pairs=False)


def _own_pairs(root: Path) -> CopySet:
    file = root / PAIRS
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from None
    if rows and rows[0] == ["copy", "original"]:
        rows = rows[1:]
    wrong = next((row for row in rows if len(row) != 2), None)
    if not rows or wrong is not None:
        raise ValueError(f"{file} should have two columns, copy and original, in every line" + (f", not {wrong}." if wrong else "."))
    for name in (name for row in rows for name in row):
        if not (root / inside(root, name, file)).is_file():
            raise ValueError(f"{file} names {name!r}, which is not in {root}.")
    # Originals without a copy of their own stand among the database, too.
    originals = list(dict.fromkeys([original for _, original in rows] + list(_images(root, "original"))))
    position = {name: number for number, name in enumerate(originals)}
    block = Block("pairs", tuple(copy for copy, _ in rows), tuple(position[original] for _, original in rows))
    return CopySet(root, tuple(originals), (block,), own_pairs=True)


def _images(root: Path, folder: str) -> Iterator[str]:
    if (root / folder).is_dir():
        for path in sorted((root / folder).iterdir()):
            if is_image_name(path.name) and not path.name.startswith("."):
                yield inside(root, f"{folder}/{path.name}", root / folder)


def _levels(folder: Path) -> list[str]:
    """Names of sub-folders, numbers in their order."""
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")] if folder.is_dir() else []
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
