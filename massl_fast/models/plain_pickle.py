"""Pickles read as data: no code of theirs runs.

A pickle is a program for a small stack machine. ``Machine`` runs that program and can build numbers, texts, bytes, lists, dictionaries,
sets and NumPy's numbers and arrays, and nothing else: it imports nothing, and each global that a pickle names is looked up in the one list
that the machine was given. What is not on the list is refused by its name. ``foreign_file`` (checkpoints) and the evaluations'
``layouts/revisited.py`` (annotations) have a list each.
"""

from __future__ import annotations

import codecs
import io
import math
import pickletools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np


@dataclass(frozen=True)
class Global:
    """A name from the list that stands for itself: a data type, a class whose objects are of no interest here."""

    name: str


class Stateful:
    """An object that a pickle may give a state, which nothing here uses."""


class Opaque(Stateful):
    """An object of a known class whose content nothing here uses."""


class Attributes(dict):
    """An object that is nothing but its attributes."""


@dataclass
class NumpyType:
    """A NumPy dtype by its code without byte order, such as f8."""

    code: str
    order: str = "="

    def dtype(self) -> np.dtype:
        return np.dtype(self.order.replace("|", "") + self.code)


@dataclass
class NumpyArray:
    """A NumPy array as its parts, which were checked to fit together. One dimension of none until it is given its state."""

    shape: tuple[int, ...] = (0,)
    kind: NumpyType | None = None
    data: bytes = b""

    def numbers(self) -> np.ndarray:
        """Its numbers, flat, in the order of the file; read only."""
        return np.frombuffer(self.data, self.kind.dtype()) if self.kind is not None else np.empty(0)


class Refused(ValueError):
    """What a file holds that is not read. The text is the middle of a sentence."""


def require(holds: bool, problem: str) -> None:
    """Raise ``Refused`` unless it holds."""
    if not holds:
        raise Refused(problem)


def counts(values: Any) -> tuple[int, ...]:
    """``values`` if they can be a shape; Refused otherwise."""
    proper = isinstance(values, tuple) and len(values) <= 64 and all(type(value) is int and 0 <= value < 2**63 for value in values)
    require(proper, "a tensor without a proper shape")
    return values


def short(value: Any) -> str:
    """A value as it may stand in a sentence."""
    text = str(value) if isinstance(value, str | tuple) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}…"


# What the names that every list has stand for


def _numpy_type(code: Any, *_: Any) -> NumpyType:
    is_number = isinstance(code, str) and re.fullmatch(r"\?|[biufc]\d{1,2}", code)
    require(bool(is_number), f"a NumPy type that is no number ({short(code)})")
    return NumpyType(code)


def _raw(data: Any) -> Any:
    """Bytes as Python 2 wrote them, a text, and as protocol 5 does, a bytearray."""
    return data.encode("latin1") if isinstance(data, str) else bytes(data) if isinstance(data, bytearray) else data


def _numpy_number(kind: Any, data: Any = None) -> float | int | bool | complex:
    data = _raw(data)
    require(isinstance(kind, NumpyType) and isinstance(data, bytes), "a NumPy scalar that is no number")
    dtype = kind.dtype()
    require(len(data) == dtype.itemsize, f"a NumPy number of {len(data)} bytes where {dtype.itemsize} belong")
    return np.frombuffer(data, dtype)[0].item()


def _numpy_array(*_: Any) -> NumpyArray:
    return NumpyArray()


def _numpy_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> NumpyArray:
    require(order in ("C", "F"), "a NumPy array in an unknown form")
    return NumpyArray(*_checked_array((1, shape, kind, order == "F", data)))


def _checked_array(state: Any) -> tuple[tuple[int, ...], NumpyType, bytes]:
    """(shape, type, bytes) of an array of numbers, as many as it declares."""
    require(isinstance(state, tuple) and len(state) == 5, "a NumPy array in an unknown form")
    _, shape, kind, _, data = state
    data = _raw(data)
    require(isinstance(kind, NumpyType) and isinstance(data, bytes), "a NumPy array of objects")
    shape = counts(shape)
    require(
        math.prod(shape) * kind.dtype().itemsize == len(data),
        f"a NumPy array of the declared shape {short(shape)} in {len(data)} bytes",
    )
    return shape, kind, data


def as_bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """What ``_codecs.encode`` and ``bytes`` are called with where a pickle means bytes."""
    if isinstance(text, bytes):
        return text
    require(isinstance(text, str) and encoding in ("latin1", "latin-1", "utf-8", "utf8", "ascii"), "bytes in an unknown encoding")
    return text.encode(encoding)


def as_key(value: Any) -> Any:
    """A key of a dictionary or a member of a set: plain values, and flat tuples of them."""
    plain = (str, bytes, int, float, complex, type(None), Global)
    require(
        isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(part, plain) for part in value)),
        f"a dictionary with a {type(value).__name__} as a key",
    )
    return value


def as_set(members: Any = ()) -> set[Any]:
    return {as_key(member) for member in members}


# NumPy's modules have moved with version 2.
_NUMPY = ("numpy.core", "numpy._core")
_NUMPY_CODES = {
    name: np.dtype(name).str[1:]
    for kind, sizes in {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64), "complex": (64, 128), "bool": ("",)}.items()
    for name in (f"{kind}{size}" for size in sizes)
}
Known = Mapping[str, Callable[..., Any] | None]
"""{name: what stands in for it; None: the name stands for itself and nothing can be made of it}."""
PLAIN: Known = {
    "_codecs.encode": as_bytes,
    "builtins.bytes": as_bytes,
    "numpy.dtype": _numpy_type,
    "numpy.ndarray": None,
    **{f"{module}.multiarray.scalar": _numpy_number for module in _NUMPY},
    **{f"{module}.multiarray._reconstruct": _numpy_array for module in _NUMPY},
    **{f"{module}.numeric._frombuffer": _numpy_buffer for module in _NUMPY},
    **{f"numpy.dtypes.{name.title().replace('Ui', 'UI')}DType": partial(NumpyType, code) for name, code in _NUMPY_CODES.items()},
    **dict.fromkeys(f"numpy.{name}" for name in (*_NUMPY_CODES, "bool_")),
}
"""Numbers and arrays of NumPy, and bytes as older protocols write them."""

_ARGUMENTS = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Instructions that put their own argument on the stack."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_INSTRUCTIONS = {opcode.code: (opcode.name, opcode.arg) for opcode in pickletools.opcodes}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


def _instructions(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each instruction, without end; the stream is left behind the last one that was asked for."""
    while True:
        code = stream.read(1).decode("latin1")
        if code not in _INSTRUCTIONS:
            raise ValueError(f"{code!r} is no pickle instruction" if code else "the pickle has no end")
        name, kind = _INSTRUCTIONS[code]
        if name == "STRING":  # pickletools takes no bytes beyond ASCII, which arrays of Python 2 have
            line = stream.readline().strip()
            if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
                raise ValueError("a text lacks its quotes")
            yield name, codecs.escape_decode(line[1:-1])[0].decode("latin1")
        else:
            yield name, None if kind is None else kind.reader(stream)


class Machine:
    """The stack machine. ``known`` lists the names that a pickle may use; ``load`` makes something of a persistent id, None: refuses it."""

    def __init__(self, known: Known, load: Callable[[Any], Any] | None = None) -> None:
        self.known, self.load = known, load
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO | bytes) -> Any:
        """The object that the pickle at the start of ``stream`` describes; a file is left behind its last byte."""
        for name, argument in _instructions(io.BytesIO(stream) if isinstance(stream, bytes) else stream):
            if name in _ARGUMENTS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name == "STOP":
                return self.stack.pop()
            else:
                step = getattr(self, f"_op_{name.lower()}", None)
                require(step is not None, f"the pickle instruction {name}")
                step(argument)
        raise AssertionError("instructions have no end")

    def _popped(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _op_proto(self, _: Any) -> None: ...

    _op_frame = _op_proto

    def _op_mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _op_pop(self, _: Any) -> None:
        self.stack.pop()

    def _op_pop_mark(self, _: Any) -> None:
        self._popped()

    def _op_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _op_binget = _op_long_binget = _op_get

    def _op_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_tuple1(self, _: Any) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _op_tuple2(self, _: Any) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _op_tuple3(self, _: Any) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _op_tuple(self, _: Any) -> None:
        items = self._popped()
        self.stack.append(tuple(items))

    def _op_list(self, _: Any) -> None:
        items = self._popped()
        self.stack.append(items)

    def _op_dict(self, _: Any) -> None:
        items = self._popped()
        self.stack.append({})
        self._set(items)

    def _op_frozenset(self, _: Any) -> None:
        items = self._popped()
        self.stack.append(as_set(items))

    def _op_append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _op_appends(self, _: Any) -> None:
        items = self._popped()
        self._extend(items)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        require(isinstance(target, list | Opaque), f"entries added to a {type(target).__name__}")
        if isinstance(target, list):
            target.extend(items)

    def _op_additems(self, _: Any) -> None:
        items = self._popped()
        require(isinstance(self.stack[-1], set), f"members added to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(as_key, items))

    def _op_setitem(self, _: Any) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set(items)

    def _op_setitems(self, _: Any) -> None:
        items = self._popped()
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        require(isinstance(target, dict | Opaque) and len(items) % 2 == 0, f"entries set in a {type(target).__name__}")
        if isinstance(target, dict):
            for index in range(0, len(items), 2):
                target[as_key(items[index])] = items[index + 1]

    def _op_global(self, name: str) -> None:
        self._name(*name.split(" ", 1))

    def _op_stack_global(self, _: Any) -> None:
        module, name = self.stack[-2:]
        del self.stack[-2:]
        self._name(module, name)

    def _name(self, module: Any, name: Any = None) -> None:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        require(full in self.known, full if len(full) <= 120 else f"{full[:120]}…")
        self.stack.append(Global(full))

    def _op_reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        made = self.stack.pop()
        require(isinstance(made, Global) and isinstance(arguments, tuple), f"a call of a {type(made).__name__}")
        build = self.known[made.name]
        require(build is not None, f"a call of {made.name}")
        self.stack.append(build(*arguments))

    _op_newobj = _op_reduce

    def _op_build(self, _: Any) -> None:
        """Give an object its state. Of an OrderedDict that is its attributes, which nothing here uses."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, NumpyType):
            require(isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"), "a NumPy type without a byte order")
            require(all(part is None or isinstance(part, int) for part in state[2:]), "a NumPy type with fields")
            target.order = state[1]
        elif isinstance(target, NumpyArray):
            target.shape, target.kind, target.data = _checked_array(state)
        elif isinstance(target, Attributes):
            require(isinstance(state, dict), "attributes that are no dictionary")
            target.update(state)
        else:
            require(isinstance(target, dict | Stateful), f"a state given to a {type(target).__name__}")

    def _op_binpersid(self, _: Any) -> None:
        require(self.load is not None, "a tensor where settings should be")
        self.stack.append(self.load(self.stack.pop()))
