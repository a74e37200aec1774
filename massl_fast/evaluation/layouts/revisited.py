"""Revisited Oxford and Paris: NAME/gnd_NAME.pkl and NAME/jpg/*.jpg, any NAME; distractors as FOLDER/FOLDER.txt and FOLDER/jpg.

The official annotation is a pickle, which could run code. It is read by an unpickler that knows nothing but plain values and, through
stand-ins of its own, the arrays of NumPy; NumPy itself never sees the stream.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from massl_fast.evaluation.layouts.lists import inside, read_lines
from massl_fast.evaluation.metrics.ranking import Judgement

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
    if isinstance(value, _Array):
        return value.numbers()
    if not isinstance(value, list | tuple):
        return None
    plain = [entry.number() if isinstance(entry, _Array) else entry for entry in value]
    if not all(isinstance(entry, int | float) and not isinstance(entry, bool) and abs(entry) < 2**53 for entry in plain):
        return None
    return np.array(plain, np.float64)


def load_plain(file: Path) -> Any:
    """What a pickle holds, if it is dictionaries, lists, tuples, strings, numbers and arrays of numbers (as ``_Array``).

    Raises:
        ValueError: it holds anything else, is damaged, or is larger than 256 MiB.
    """
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; an annotation has at most {MOST_BYTES:,}.")
    data = file.read_bytes()
    try:
        for operation, argument, _ in pickletools.genops(data):
            # The unpickler would make room for a memo of any size that a number in the stream asks for.
            if "PUT" in operation.name and isinstance(argument, int) and argument > len(data):
                raise _Refused("a memo larger than the file")
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _Refused as refused:
        raise ValueError(
            f"{file} holds {refused}, and loading that could run code. An annotation holds dictionaries, lists, text, numbers and "
            f"arrays only; it was not loaded."
        ) from None
    except Exception as error:  # bytes that are no pickle fail in the unpickler in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file} cannot be read as an annotation ({reason}).") from None


class _Refused(Exception):
    pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return _StandIn(_empty_array if name == "_reconstruct" else _scalar)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _StandIn(_Kind if name == "dtype" else None)
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return _StandIn(_from_buffer)
        if module == "_codecs" and name == "encode":
            return _StandIn(_latin1)
        if module in ("__builtin__", "builtins") and name == "bytes":
            return _StandIn(_no_bytes)
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a reference to something outside of it")


class _StandIn:
    """What a global of NumPy becomes: callable where it has to be, and nothing in the stream can change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            raise _Refused("a call of numpy.ndarray")
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a changed function")


class _Kind:
    """A dtype: whole numbers, floating-point numbers or booleans of some bytes."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "b1"):
            raise _Refused(f"an array of {code!r}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise _Refused("an array of an unknown kind")
        self.order = order

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """An array as its parts, checked when its numbers are asked for."""

    __slots__ = ("data", "kind", "shape")

    def __init__(self) -> None:
        self.shape, self.kind, self.data = (0,), _Kind("i8"), b""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("an array of an unknown form")
        _, shape, kind, _, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        if not (isinstance(shape, tuple) and all(isinstance(size, int) and size >= 0 for size in shape)):
            raise _Refused("an array of an unknown shape")
        if not (isinstance(kind, _Kind) and isinstance(data, bytes) and len(data) == math.prod(shape) * kind.dtype.itemsize):
            raise _Refused("an array that is not its own size")
        self.shape, self.kind, self.data = shape, kind, data

    def numbers(self) -> np.ndarray:
        """float64, flat."""
        return np.frombuffer(self.data, self.kind.dtype).astype(np.float64)

    def number(self) -> float | None:
        values = self.numbers()
        return float(values[0]) if len(values) == 1 else None


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: Any, data: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, (), kind, False, data))
    return array


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> _Array:
    if order != "C" or not isinstance(data, bytes | bytearray):
        raise _Refused("an array of an unknown form")
    array = _Array()
    array.__setstate__((1, shape, kind, False, bytes(data)))
    return array


def _no_bytes() -> bytes:
    """What older protocols write for an empty array's bytes."""
    return b""


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused("an encoding of its own")
    return text.encode("latin1")
