"""The two files of a checkpoint, and the checksums by which a damaged bit is found wherever it lies.

``state.json`` begins with the checksum of all its bytes behind that. It holds one of each tensor in ``state.safetensors`` and one of that
file's header (names, formats, shapes, places). CRC-32 finds every single flipped bit and every damaged run of up to 32 bits; of damage
beyond that it misses one in 2³². It guards against disks and networks, not against people, who can write a checksum as well as a weight.

Checkpoints of format 1 carry none and are read as they are; ``lacks_checksums`` is for telling so.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

FORMAT = 2
READABLE_FORMATS = (1, 2)
FILES = ("state.json", "state.safetensors")
_SEAL = b'{\n "checksum": "%s",'
_SEAL_BYTES = len(_SEAL % bytes(8))


class DamagedCheckpoint(ValueError):
    """Bytes of a checkpoint are not those that were written, or not there. The message names the file and, where it is one, the tensor."""


def write_files(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write both files into an existing folder. ``tensors``: contiguous, on the CPU. OSError or SafetensorError where the disk refuses."""
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / "state.safetensors")
    sealed = {"format": FORMAT, **state, "checksums": {"header": _hex(_header_of(folder / "state.safetensors")), "tensors": sums}}
    # Without its opening brace, for which the seal stands.
    body = json.dumps(sealed, indent=1).encode()[1:]
    (folder / "state.json").write_bytes(_SEAL % _hex(body).encode() + body)


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a contiguous CPU tensor's bytes, 8 hexadecimal digits."""
    return _hex(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def _hex(content) -> str:
    return f"{zlib.crc32(content):08x}"


def read_state(path: Path) -> dict[str, Any]:
    """What is in ``state.json``. ValueError says what is missing or damaged."""
    path = Path(path)
    for name in FILES:
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"{path} is not a checkpoint of massl-fast: it has no {name}.")
    content = (path / "state.json").read_bytes()
    try:
        state = json.loads(content.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, f"state.json: {error}") from None
    # Looked at first: where bytes changed, what the format reads as says nothing.
    sealed = content.startswith(_SEAL[: _SEAL.index(b"%")])
    if sealed and content[:_SEAL_BYTES] != _SEAL % _hex(content[_SEAL_BYTES:]).encode():
        raise _damaged(path, "state.json does not have the checksum that it begins with")
    if not isinstance(state, dict) or state.get("format") not in READABLE_FORMATS:
        found = state.get("format") if isinstance(state, dict) else state
        raise ValueError(
            f"The checkpoint {path} has format {found!r}; this version reads formats {' and '.join(map(str, READABLE_FORMATS))}."
        )
    if not sealed and not lacks_checksums(state):
        raise _damaged(path, "state.json does not begin with its checksum")
    return state


def lacks_checksums(state: dict[str, Any]) -> bool:
    return state["format"] == 1


def shapes_of(path: Path) -> dict[str, Size]:
    """Names and shapes of a checkpoint's tensors; ValueError where the file is cut off or its header damaged."""
    try:
        with safe_open(Path(path) / "state.safetensors", framework="pt") as tensors:
            return {name: Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def read_tensors(path: Path, state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each (name, tensor) under ``prefix``, on the CPU, its bytes compared with the checksum in ``state`` (of ``read_state``).

    One tensor at a time. DamagedCheckpoint names the first that differs.
    """
    file = Path(path) / "state.safetensors"
    sums = None if lacks_checksums(state) else state["checksums"]["tensors"]
    try:
        if sums is not None and _hex(_header_of(file)) != state["checksums"]["header"]:
            raise _damaged(path, "the header of state.safetensors does not have its checksum")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    tensor = tensors.get_tensor(name)
                    if sums is not None and checksum(tensor) != sums.get(name):
                        raise _damaged(path, f"{name} in state.safetensors does not have its checksum")
                    yield name, tensor
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def damage_of(path: Path) -> str | None:
    """What is missing from a checkpoint folder or damaged in it, or None. Reads every byte of it."""
    for name in FILES:
        if not (path / name).is_file():
            return f"it has no {name}"
    try:
        for _ in read_tensors(path, read_state(path)):
            pass
    except ValueError as error:
        return str(error)
    return None


def _header_of(file: Path) -> bytes:
    """The header of a safetensors file: 8 bytes that say how long the JSON behind them is, and that."""
    with file.open("rb") as stream:
        length = stream.read(8)
        # A damaged length may be any number; no header is longer than its file.
        return length + stream.read(min(int.from_bytes(length, "little"), file.stat().st_size))


def _damaged(path: Path, reason: Exception | str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"The checkpoint {path} is damaged ({reason}). Use an earlier one.")
