"""Revisited Oxford and Paris: NAME/gnd_NAME.pkl and NAME/jpg/*.jpg, any NAME; distractors as FOLDER/FOLDER.txt and FOLDER/jpg.

The official annotation is a pickle, which could run code; ``models.plain_pickle`` reads it, and NumPy itself never sees the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from massl_fast.evaluation.layouts.lists import inside, read_lines
from massl_fast.evaluation.metrics.ranking import Judgement
from massl_fast.models.plain_pickle import PLAIN, Machine, NumpyArray, Refused

MOST_BYTES = 2**28
NAME_ENDINGS = ("", ".jpg", ".jpeg", ".JPG", ".JPEG", ".png")


@dataclass(frozen=True)
class Landmarks:
    """Database and queries of one set."""

    root: Path
    """Folder of the images."""
    database: tuple[str, ...]
    queries: tuple[str, ...]
    """Files relative to `root`."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """Left, top, right, bottom of the landmark in each query, pixels."""
    judgements: tuple[Judgement, ...]


def read_landmarks(root: Path) -> Landmarks:
    """The set in ROOT/gnd_NAME.pkl, where NAME is that of the folder.

    Raises:
        ValueError: the annotation is missing, holds more than plain values and arrays, does not fit together, or names missing files.
    """
    file = root / f"gnd_{root.resolve().name}.pkl"
    if not file.is_file():
        raise ValueError(f"There is no {file}. Name the folder of one set, such as roxford5k, which holds gnd_roxford5k.pkl and jpg.")
    content = load_plain(file)
    images = root / "jpg"

    def wrong(what: str) -> ValueError:
        return ValueError(f"{file} is no annotation of revisited Oxford or Paris: {what}.")

    if not isinstance(content, dict) or not {"imlist", "qimlist", "gnd"} <= content.keys():
        raise wrong("it needs imlist, qimlist and gnd")
    names = [_strings(content[key]) for key in ("imlist", "qimlist")]
    if names[0] is None or names[1] is None or not names[0] or not names[1]:
        raise wrong("imlist and qimlist are lists of names")
    truth = content["gnd"]
    if not isinstance(truth, list) or len(truth) != len(names[1]):
        raise wrong("gnd is a list with an entry for each query")
    judgements, boxes = [], []
    for number, entry in enumerate(truth):
        if not isinstance(entry, dict) or not {"bbx", "easy", "hard", "junk"} <= entry.keys():
            raise wrong(f"entry {number} of gnd needs bbx, easy, hard and junk")
        box = _numbers(entry["bbx"])
        if box is None or len(box) != 4 or not np.isfinite(box).all():
            raise wrong(f"bbx of entry {number} is not four numbers")
        lists = [_numbers(entry[key]) for key in ("easy", "hard", "junk")]
        if any(rows is None or (rows != rows.astype(np.int64)).any() for rows in lists):
            raise wrong(f"easy, hard and junk of entry {number} are lists of whole numbers")
        rows = [np.unique(part.astype(np.int64)) for part in lists]
        if any(len(part) and not 0 <= part.min() <= part.max() < len(names[0]) for part in rows):
            raise wrong(f"entry {number} points beyond the {len(names[0])} images of imlist")
        judgements.append(Judgement(*rows))
        boxes.append(tuple(box.tolist()))
    files = [tuple(_file_of(images, name, file) for name in part) for part in names]
    return Landmarks(images, files[0], files[1], tuple(boxes), tuple(judgements))


def read_distractors(root: Path) -> tuple[Path, list[str]]:
    """(folder, files in it): those that ROOT/ROOT.txt lists in ROOT/jpg, as revisitop1m has them; raises ValueError."""
    listed = root / f"{root.resolve().name}.txt"
    if not listed.is_file():
        raise ValueError(f"There is no {listed}. Distractors are a folder NAME with NAME.txt and jpg, such as revisitop1m.")
    names = [inside(root / "jpg", line.split()[0], listed) for line in read_lines(listed)]
    if not names:
        raise ValueError(f"{listed} lists no images.")
    return root / "jpg", names


def _file_of(images: Path, name: str, said_by: Path) -> str:
    inside(images, name, said_by)
    for ending in NAME_ENDINGS:
        if (images / f"{name}{ending}").is_file():
            return inside(images, f"{name}{ending}", said_by)
    raise ValueError(f"{said_by} names {name!r}, but {images} holds no {name}.jpg.")


def _strings(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(name, str) for name in value) else None


def _numbers(value: Any) -> np.ndarray | None:
    """float64 of a flat list of numbers or of an array; None for anything else."""
    if isinstance(value, NumpyArray):
        numbers = value.numbers()
        return None if np.iscomplexobj(numbers) else numbers.astype(np.float64)
    if not isinstance(value, list | tuple):
        return None
    if not all(isinstance(entry, int | float) and not isinstance(entry, bool) and abs(entry) < 2**53 for entry in value):
        return None
    return np.array(value, np.float64)


def load_plain(file: Path) -> Any:
    """What a pickle holds, if it is dictionaries, lists, tuples, strings, numbers and arrays of numbers (as ``NumpyArray``).

    Raises:
        ValueError: it holds anything else, is damaged, or is larger than 256 MiB.
    """
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; an annotation has at most {MOST_BYTES:,}.")
    try:
        return Machine(PLAIN).run(file.read_bytes())
    except Refused as refused:
        raise ValueError(
            f"{file} holds {refused}, and loading that could run code. An annotation holds dictionaries, lists, text, numbers and "
            f"arrays only; it was not loaded."
        ) from None
    except Exception as error:  # bytes that are no pickle fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file} cannot be read as an annotation ({reason}).") from None
