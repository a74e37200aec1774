"""Files that ``torch.save`` wrote elsewhere, read as data: no code of theirs runs.

A pickle is a program for a small stack machine. This module runs that program with a machine of its own, which builds numbers, texts,
lists, dictionaries and descriptions of tensors and can do nothing else: it imports nothing, and each global that a file names is looked up
in ``GLOBALS``, the one list of what is known. What is not on the list is refused by its name. The values of a tensor are read when they are
used, so that optimizer states cost nothing.

Both forms are read: the zip archive of PyTorch 1.6 and later, and the older sequence of pickles.
"""

from __future__ import annotations

import contextlib
import math
import pickletools
import posixpath
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class Global:
    """A name from the list that stands for itself: a type of storage, a data type, a class whose objects are of no interest here."""

    name: str


class Settings(dict):
    """An argparse namespace."""


class Opaque:
    """An object of a known class whose content nothing here uses."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """Where the values of a tensor lie in the file; ``ForeignFile.tensor`` reads them."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class NumpyType:
    """A NumPy dtype by its code without byte order, such as f8."""

    code: str
    order: str = "="

    def dtype(self) -> np.dtype:
        return np.dtype(self.order.replace("|", "") + self.code)


class NumpyArray:
    """A NumPy array that is still to be given its numbers; they are checked and not kept."""


class Refused(ValueError):
    """What a file holds that is not read. The text is the middle of a sentence."""


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise Refused(problem)


def _counts(values: Any) -> tuple[int, ...]:
    proper = isinstance(values, tuple) and len(values) <= 64 and all(type(value) is int and 0 <= value < 2**63 for value in values)
    _require(proper, "a tensor without a proper shape")
    return values


def _stored_tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: torch.dtype | None = None) -> StoredTensor:
    """ValueError where the tensor reaches beyond its storage."""
    _require(isinstance(storage, Storage), "a tensor without a storage")
    shape, strides, (offset,) = _counts(shape), _counts(strides), _counts((offset,))
    _require(len(shape) == len(strides), "a tensor without a proper shape")
    dtype = dtype or storage.dtype
    available = storage.numel * storage.dtype.itemsize // dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    empty = 0 in shape
    _require(
        empty or (last < available and math.prod(shape) <= max(available, 1)),
        f"a tensor of the declared shape {_short(shape)}, for which its storage of {available} numbers is too small",
    )
    return StoredTensor(storage, dtype, offset, shape, strides)


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, str | tuple) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}…"


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = False, _hooks: Any = None, metadata: Any = None
) -> StoredTensor:
    _require(not metadata, "a tensor that is conjugated or negated")
    return _stored_tensor(storage, offset, shape, strides)


def _tensor_of_type(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor:
    _require(not metadata, "a tensor that is conjugated or negated")
    _require(isinstance(dtype, Global) and dtype.name in TENSOR_TYPES, "a tensor of an unknown data type")
    return _stored_tensor(storage, offset, shape, strides, TENSOR_TYPES[dtype.name])


def _parameter(tensor: Any, _grad: Any = False, _hooks: Any = None, _state: Any = None) -> StoredTensor:
    _require(isinstance(tensor, StoredTensor), "a parameter without a tensor")
    return tensor


def _numpy_type(code: Any, *_: Any) -> NumpyType:
    is_number = isinstance(code, str) and re.fullmatch(r"\?|[biufc]\d{1,2}", code)
    _require(bool(is_number), f"a NumPy type that is no number ({_short(code)})")
    return NumpyType(code)


def _numpy_number(kind: Any, data: Any = None) -> float | int | bool | complex:
    _require(isinstance(kind, NumpyType) and isinstance(data, bytes), "a NumPy scalar that is no number")
    dtype = kind.dtype()
    _require(len(data) == dtype.itemsize, f"a NumPy number of {len(data)} bytes where {dtype.itemsize} belong")
    return np.frombuffer(data, dtype)[0].item()


def _numpy_array(*_: Any) -> NumpyArray:
    return NumpyArray()


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    if isinstance(text, bytes):
        return text
    _require(isinstance(text, str) and encoding in ("latin1", "latin-1", "utf-8", "utf8", "ascii"), "bytes in an unknown encoding")
    return text.encode(encoding)


def _dictionary(content: Any = (), *_: Any) -> dict[Any, Any]:
    """OrderedDict, Counter and defaultdict; the factory of the last is left aside."""
    if isinstance(content, Global):
        return {}
    pairs = content.items() if isinstance(content, dict) else content
    return {_key(key): value for key, value in pairs}


def _key(value: Any) -> Any:
    """A key of a dictionary or a member of a set: plain values, and flat tuples of them."""
    plain = (str, bytes, int, float, complex, type(None), Global)
    _require(
        isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(part, plain) for part in value)),
        f"a dictionary with a {type(value).__name__} as a key",
    )
    return value


def _members(members: Any = ()) -> set[Any]:
    return {_key(member) for member in members}


def _path(*parts: Any) -> str:
    _require(all(isinstance(part, str) for part in parts), "a path that is no text")
    return posixpath.join("", *parts)


def _text(value: Any = "", *_: Any) -> str:
    return value if isinstance(value, str) else type(value).__name__


def _opaque(*_: Any) -> Opaque:
    return Opaque()


TENSOR_TYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool", "complex64", "complex128")
}
STORAGE_TYPES = {
    f"torch.{name}Storage": TENSOR_TYPES[f"torch.{dtype}"]
    for name, dtype in {
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Float": "float32",
        "Double": "float64",
        "Byte": "uint8",
        "Char": "int8",
        "Short": "int16",
        "Int": "int32",
        "Long": "int64",
        "Bool": "bool",
        "ComplexFloat": "complex64",
        "ComplexDouble": "complex128",
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}
# NumPy's module of scalars has moved with version 2.
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMPY_CODES = {
    name: np.dtype(name).str[1:]
    for kind, sizes in {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64), "complex": (64, 128), "bool": ("",)}.items()
    for name in (f"{kind}{size}" for size in sizes)
}
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_OMEGACONF = (
    *("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata"),
    *(f"nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path", "Bytes", "Enum")),
)
_LIGHTNING = ("pytorch_lightning.utilities.parsing", "lightning_fabric.utilities.data", "lightning.fabric.utilities.data")

GLOBALS: dict[str, Callable[..., Any] | None] = {
    # None: the name stands for itself and nothing can be made of it.
    **dict.fromkeys(TENSOR_TYPES),
    **dict.fromkeys(STORAGE_TYPES),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": lambda values=(): _counts(tuple(values)),
    "torch.device": _text,
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": _dictionary,
    "_codecs.encode": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.set": _members,
    "builtins.frozenset": _members,
    "builtins.complex": lambda real=0.0, imaginary=0.0: complex(float(real), float(imaginary)),
    "builtins.slice": _opaque,
    "builtins.range": _opaque,
    **dict.fromkeys(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")),
    "argparse.Namespace": lambda: Settings(),
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    "numpy.dtype": _numpy_type,
    "numpy.ndarray": None,
    **{f"{module}.scalar": _numpy_number for module in _NUMPY},
    **{f"{module}._reconstruct": _numpy_array for module in _NUMPY},
    **{f"numpy.dtypes.{name.title().replace('Ui', 'UI')}DType": partial(NumpyType, code) for name, code in _NUMPY_CODES.items()},
    **dict.fromkeys(f"numpy.{name}" for name in (*_NUMPY_CODES, "bool_")),
    # Settings of solo-learn and of whatever else keeps its own in the checkpoint; they are not looked into.
    **{f"omegaconf.{name}": _opaque for name in _OMEGACONF},
    "typing.Any": None,
    **{f"{module}.AttributeDict": _dictionary for module in _LIGHTNING},
}
"""What a file may name, and what stands in for it."""

_ARGUMENTS = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
"""Instructions that put their own argument on the stack."""
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


class _Machine:
    """The stack machine. ``load_storage`` turns a persistent id into a ``Storage``."""

    def __init__(self, load_storage: Callable[[Any], Storage] | None = None) -> None:
        self.load_storage = load_storage
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO | bytes) -> Any:
        """The object that the pickle at the start of ``stream`` describes; a file is left behind its last byte."""
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
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
                _require(step is not None, f"the pickle instruction {name}")
                step(argument)
        raise Refused("a pickle without an end")

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
        self.stack.append(_members(items))

    def _op_append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _op_appends(self, _: Any) -> None:
        items = self._popped()
        self._extend(items)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        _require(isinstance(target, list | Opaque), f"entries added to a {type(target).__name__}")
        if isinstance(target, list):
            target.extend(items)

    def _op_additems(self, _: Any) -> None:
        items = self._popped()
        _require(isinstance(self.stack[-1], set), f"members added to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(map(_key, items))

    def _op_setitem(self, _: Any) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set(items)

    def _op_setitems(self, _: Any) -> None:
        items = self._popped()
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        _require(isinstance(target, dict | Opaque) and len(items) % 2 == 0, f"entries set in a {type(target).__name__}")
        if isinstance(target, dict):
            for index in range(0, len(items), 2):
                target[_key(items[index])] = items[index + 1]

    def _op_global(self, name: str) -> None:
        self._name(*name.split(" ", 1))

    def _op_stack_global(self, _: Any) -> None:
        module, name = self.stack[-2:]
        del self.stack[-2:]
        self._name(module, name)

    def _name(self, module: Any, name: Any = None) -> None:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        _require(full in GLOBALS, full if len(full) <= 120 else f"{full[:120]}…")
        self.stack.append(Global(full))

    def _op_reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        made = self.stack.pop()
        _require(isinstance(made, Global) and isinstance(arguments, tuple), f"a call of a {type(made).__name__}")
        build = GLOBALS[made.name]
        _require(build is not None, f"a call of {made.name}")
        self.stack.append(build(*arguments))

    _op_newobj = _op_reduce

    def _op_build(self, _: Any) -> None:
        """Give an object its state. Of an OrderedDict that is its attributes, which nothing here uses."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, NumpyType):
            _require(isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"), "a NumPy type without a byte order")
            _require(all(part is None or isinstance(part, int) for part in state[2:]), "a NumPy type with fields")
            target.order = state[1]
        elif isinstance(target, NumpyArray):
            _check_array(state)
        elif isinstance(target, Settings):
            _require(isinstance(state, dict), "an argparse namespace whose state is no dictionary")
            target.update(state)
        else:
            _require(isinstance(target, dict | Opaque | StoredTensor), f"a state given to a {type(target).__name__}")

    def _op_binpersid(self, _: Any) -> None:
        _require(self.load_storage is not None, "a tensor where settings should be")
        self.stack.append(self.load_storage(self.stack.pop()))


def _check_array(state: Any) -> None:
    """A NumPy array holds numbers, as many as it declares."""
    _require(isinstance(state, tuple) and len(state) == 5, "a NumPy array in an unknown form")
    _, shape, kind, _, data = state
    _require(isinstance(kind, NumpyType) and isinstance(data, bytes), "a NumPy array of objects")
    shape = _counts(shape)
    _require(
        math.prod(shape) * kind.dtype().itemsize == len(data),
        f"a NumPy array of the declared shape {_short(shape)} in {len(data)} bytes",
    )


def _described_storage(reference: Any) -> Storage:
    """From the persistent id: ("storage", type, key, location, numel), in older files with a view at the end."""
    _require(
        isinstance(reference, tuple) and len(reference) in (5, 6) and reference[0] in ("storage", b"storage"), "a reference to no tensor"
    )
    kind, key, numel = reference[1], reference[2], reference[4]
    _require(isinstance(kind, Global) and kind.name in STORAGE_TYPES, "a storage of an unknown type")
    _require(isinstance(key, str) and type(numel) is int and numel >= 0, "a storage without a name or a size")
    _require(len(reference) == 5 or reference[5] is None, "a storage that is a view of another, as PyTorch before 0.4 wrote")
    return Storage(key, STORAGE_TYPES[kind.name], numel)


class ForeignFile:
    """A file of ``torch.save``, opened: ``content`` is what it holds, ``tensor`` reads the values of a ``StoredTensor`` in it.

    Raises ValueError, in a sentence that names the file and the culprit, for what is not on the list and for a file that is damaged.
    To be used in a ``with`` statement.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.stream = file.open("rb")
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror or error}.") from None
        self.archive: zipfile.ZipFile | None = None
        self.places: dict[str, int] = {}
        try:
            with _sentences(file):
                self.size = file.stat().st_size
                is_archive = self.stream.read(2) == b"PK"
                self.stream.seek(0)
                self.content = self._open_archive() if is_archive else self._open_sequence()
        except BaseException:
            self.stream.close()
            raise

    def __enter__(self) -> ForeignFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stream.close()

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The values, on the CPU."""
        with _sentences(self.file):
            data = self._bytes_of(stored.storage)
            flat = torch.frombuffer(data, dtype=stored.dtype) if len(data) else torch.empty(0, dtype=stored.dtype)
            return flat.as_strided(stored.shape, stored.strides, stored.offset)

    def _open_archive(self) -> Any:
        self.archive = zipfile.ZipFile(self.stream)
        records = {record.filename: record for record in self.archive.infolist()}
        _require(all(record.compress_type == zipfile.ZIP_STORED for record in records.values()), "compressed records")
        programs = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        _require(len(programs) == 1, f"{len(programs)} records data.pkl where one belongs")
        self.folder = programs[0].removesuffix("data.pkl")
        _require(f"{self.folder}constants.pkl" not in records, "a TorchScript program")
        order = f"{self.folder}byteorder"
        _require(order not in records or self.archive.read(order).strip() == b"little", "numbers of a big-endian machine")

        def load_storage(reference: Any) -> Storage:
            storage = _described_storage(reference)
            record = records.get(f"{self.folder}data/{storage.key}")
            _require(record is not None, f"a tensor whose record data/{storage.key[:40]} is missing")
            needed = storage.numel * storage.dtype.itemsize
            _require(needed <= record.file_size <= self.size, f"a tensor of {needed} bytes in a record of {record.file_size}")
            return storage

        return _Machine(load_storage).run(self.archive.read(programs[0]))

    def _open_sequence(self) -> Any:
        _require(_Machine().run(self.stream) == LEGACY_MAGIC, "something else than a checkpoint of PyTorch")
        _require(_Machine().run(self.stream) == LEGACY_PROTOCOL, "another protocol than PyTorch's")
        system = _Machine().run(self.stream)
        _require(isinstance(system, dict) and system.get("little_endian") is not False, "numbers of a big-endian machine")
        declared: dict[str, Storage] = {}

        def load_storage(reference: Any) -> Storage:
            storage = _described_storage(reference)
            needed = storage.numel * storage.dtype.itemsize
            _require(needed <= self.size, f"a tensor of {needed} bytes in a file of {self.size}")
            return declared.setdefault(storage.key, storage)

        content = _Machine(load_storage).run(self.stream)
        keys = _Machine().run(self.stream)
        _require(isinstance(keys, list) and set(map(_key, keys)) == declared.keys(), "other tensors than it names")
        for key in keys:
            (numel,) = struct.unpack("<q", self.stream.read(8))
            _require(numel == declared[key].numel, f"a tensor of {numel} numbers where it declares {declared[key].numel}")
            place, length = self.stream.tell(), numel * declared[key].dtype.itemsize
            _require(place + length <= self.size, "fewer bytes than its tensors need")
            self.places[key] = place
            self.stream.seek(place + length)
        return content

    def _bytes_of(self, storage: Storage) -> bytearray:
        data = bytearray(storage.numel * storage.dtype.itemsize)
        if self.archive is None:
            self.stream.seek(self.places[storage.key])
            read = self.stream.readinto(data)
        else:
            with self.archive.open(f"{self.folder}data/{storage.key}") as record:
                read = record.readinto(data)
                while 0 < read < len(data):
                    more = record.readinto(memoryview(data)[read:])
                    read = read + more if more else -1
                # The checksum is compared at the record's end.
                record.read(1)
        _require(read == len(data), "fewer bytes than its tensors need")
        return data


@contextlib.contextmanager
def _sentences(file: Path) -> Iterator[None]:
    """Turns whatever bytes without sense lead to into one ValueError that names the file."""
    try:
        yield
    except Refused as refused:
        raise ValueError(
            f"{file} holds {refused}, which is not read: a file may hold tensors, numbers (NumPy's, too), texts, paths, lists, "
            "dictionaries and argparse namespaces, and nothing that would run code. Where you trust it, save its state dict alone and give "
            "that."
        ) from None
    except Exception as error:  # bytes that are no checkpoint fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"{file} cannot be read as a PyTorch checkpoint ({reason}).") from None


def tensors_of(content: Any) -> dict[str, StoredTensor] | None:
    """The tensors of a state dict, or None if this is none."""
    if not isinstance(content, dict):
        return None
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, StoredTensor)} or None
