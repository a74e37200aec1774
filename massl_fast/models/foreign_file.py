"""Files that ``torch.save`` wrote elsewhere, read as data: no code of theirs runs.

``plain_pickle`` runs the pickles inside; ``GLOBALS`` lists what a checkpoint may name: tensors, whose values are read when they are used
so that optimizer states cost nothing, and what the field's scripts keep beside them.

Both forms are read: the zip archive of PyTorch 1.6 and later, and the older sequence of pickles.
"""

from __future__ import annotations

import contextlib
import math
import posixpath
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from massl_fast.models.plain_pickle import (
    PLAIN,
    Attributes,
    Global,
    Known,
    Machine,
    Opaque,
    Refused,
    Stateful,
    as_bytes,
    as_key,
    as_set,
    counts,
    require,
    short,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


class Settings(Attributes):
    """An argparse namespace."""


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor(Stateful):
    """Where the values of a tensor lie in the file; ``ForeignFile.tensor`` reads them."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _stored_tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: torch.dtype | None = None) -> StoredTensor:
    """ValueError where the tensor reaches beyond its storage."""
    require(isinstance(storage, Storage), "a tensor without a storage")
    shape, strides, (offset,) = counts(shape), counts(strides), counts((offset,))
    require(len(shape) == len(strides), "a tensor without a proper shape")
    dtype = dtype or storage.dtype
    available = storage.numel * storage.dtype.itemsize // dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    empty = 0 in shape
    require(
        empty or (last < available and math.prod(shape) <= max(available, 1)),
        f"a tensor of the declared shape {short(shape)}, for which its storage of {available} numbers is too small",
    )
    return StoredTensor(storage, dtype, offset, shape, strides)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = False, _hooks: Any = None, metadata: Any = None
) -> StoredTensor:
    require(not metadata, "a tensor that is conjugated or negated")
    return _stored_tensor(storage, offset, shape, strides)


def _tensor_of_type(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor:
    require(not metadata, "a tensor that is conjugated or negated")
    require(isinstance(dtype, Global) and dtype.name in TENSOR_TYPES, "a tensor of an unknown data type")
    return _stored_tensor(storage, offset, shape, strides, TENSOR_TYPES[dtype.name])


def _parameter(tensor: Any, _grad: Any = False, _hooks: Any = None, _state: Any = None) -> StoredTensor:
    require(isinstance(tensor, StoredTensor), "a parameter without a tensor")
    return tensor


def _dictionary(content: Any = (), *_: Any) -> dict[Any, Any]:
    """OrderedDict, Counter and defaultdict; the factory of the last is left aside."""
    if isinstance(content, Global):
        return {}
    pairs = content.items() if isinstance(content, dict) else content
    return {as_key(key): value for key, value in pairs}


def _path(*parts: Any) -> str:
    require(all(isinstance(part, str) for part in parts), "a path that is no text")
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
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_OMEGACONF = (
    *("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata"),
    *(f"nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path", "Bytes", "Enum")),
)
_LIGHTNING = ("pytorch_lightning.utilities.parsing", "lightning_fabric.utilities.data", "lightning.fabric.utilities.data")

GLOBALS: Known = {
    **PLAIN,
    **dict.fromkeys(TENSOR_TYPES),
    **dict.fromkeys(STORAGE_TYPES),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": lambda values=(): counts(tuple(values)),
    "torch.device": _text,
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": _dictionary,
    "builtins.bytearray": as_bytes,
    "builtins.set": as_set,
    "builtins.frozenset": as_set,
    "builtins.complex": lambda real=0.0, imaginary=0.0: complex(float(real), float(imaginary)),
    "builtins.slice": _opaque,
    "builtins.range": _opaque,
    **dict.fromkeys(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")),
    "argparse.Namespace": lambda: Settings(),
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    # Settings of solo-learn and of whatever else keeps its own in the checkpoint; they are not looked into.
    **{f"omegaconf.{name}": _opaque for name in _OMEGACONF},
    "typing.Any": None,
    **{f"{module}.AttributeDict": _dictionary for module in _LIGHTNING},
}
"""What a file may name, and what stands in for it."""


def _described_storage(reference: Any) -> Storage:
    """A storage by its persistent id: ("storage", type, key, location, numel), in older files with a view at the end."""
    require(
        isinstance(reference, tuple) and len(reference) in (5, 6) and reference[0] in ("storage", b"storage"), "a reference to no tensor"
    )
    kind, key, numel = reference[1], reference[2], reference[4]
    require(isinstance(kind, Global) and kind.name in STORAGE_TYPES, "a storage of an unknown type")
    require(isinstance(key, str) and type(numel) is int and numel >= 0, "a storage without a name or a size")
    require(len(reference) == 5 or reference[5] is None, "a storage that is a view of another, as PyTorch before 0.4 wrote")
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
        require(all(record.compress_type == zipfile.ZIP_STORED for record in records.values()), "compressed records")
        programs = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        require(len(programs) == 1, f"{len(programs)} records data.pkl where one belongs")
        self.folder = programs[0].removesuffix("data.pkl")
        require(f"{self.folder}constants.pkl" not in records, "a TorchScript program")
        order = f"{self.folder}byteorder"
        require(order not in records or self.archive.read(order).strip() == b"little", "numbers of a big-endian machine")

        def load_storage(reference: Any) -> Storage:
            storage = _described_storage(reference)
            record = records.get(f"{self.folder}data/{storage.key}")
            require(record is not None, f"a tensor whose record data/{storage.key[:40]} is missing")
            needed = storage.numel * storage.dtype.itemsize
            require(needed <= record.file_size <= self.size, f"a tensor of {needed} bytes in a record of {record.file_size}")
            return storage

        return Machine(GLOBALS, load_storage).run(self.archive.read(programs[0]))

    def _open_sequence(self) -> Any:
        require(Machine(GLOBALS).run(self.stream) == LEGACY_MAGIC, "something else than a checkpoint of PyTorch")
        require(Machine(GLOBALS).run(self.stream) == LEGACY_PROTOCOL, "another protocol than PyTorch's")
        system = Machine(GLOBALS).run(self.stream)
        require(isinstance(system, dict) and system.get("little_endian") is not False, "numbers of a big-endian machine")
        declared: dict[str, Storage] = {}

        def load_storage(reference: Any) -> Storage:
            storage = _described_storage(reference)
            needed = storage.numel * storage.dtype.itemsize
            require(needed <= self.size, f"a tensor of {needed} bytes in a file of {self.size}")
            return declared.setdefault(storage.key, storage)

        content = Machine(GLOBALS, load_storage).run(self.stream)
        keys = Machine(GLOBALS).run(self.stream)
        require(isinstance(keys, list) and set(map(as_key, keys)) == declared.keys(), "other tensors than it names")
        for key in keys:
            (numel,) = struct.unpack("<q", self.stream.read(8))
            require(numel == declared[key].numel, f"a tensor of {numel} numbers where it declares {declared[key].numel}")
            place, length = self.stream.tell(), numel * declared[key].dtype.itemsize
            require(place + length <= self.size, "fewer bytes than its tensors need")
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
        require(read == len(data), "fewer bytes than its tensors need")
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
