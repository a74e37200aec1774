"""Parquet files with the bytes of images in a column, as Hugging Face's ``datasets`` writes them, read in place.

A column of images is ``image`` (or the only one of its kind): a struct with ``bytes`` and perhaps ``path``, or plain binary. Labels are the
column ``label``, numbers or texts; the names of numbered classes stand in the file's own metadata, which ``datasets`` writes there.

Parquet compresses a column in row groups, so that a row alone cannot be fetched: a row drawn at random costs the rows of its group up to
it. A second row of the same group in a row reads the group whole and keeps it, which makes reading in order as cheap as it can be.
"""

import json
import os
import re
import threading
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from massl_fast.data.source import ShardedSource
from massl_fast.extras import needs

SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet", re.IGNORECASE)
"""How ``datasets`` names the files of a split."""


class ParquetSource(ShardedSource):
    """Rows of Parquet files; an image's name is its file's and the number of its row."""

    def __init__(
        self,
        path: str,
        shards: Sequence[str],
        names: Sequence[str],
        positions: np.ndarray,
        groups: Sequence[np.ndarray],
        column: str,
        labels: Sequence[int] | None,
        classes: Sequence[str],
        notes: Iterable[str] = (),
    ) -> None:
        super().__init__(path, shards, names, positions, labels, classes, notes)  # positions: shard, row
        self._groups, self._column = list(groups), column

    def read(self, i: int) -> bytes:
        shard, row = self._positions[i].tolist()
        group = int(np.searchsorted(self._groups[shard], row, "right")) - 1
        offset, here = row - int(self._groups[shard][group]), (shard, group)
        state = self._open.__dict__  # a reader of Arrow belongs to one thread
        try:
            if state.get("held", (None,))[0] == here:
                column, at = state["held"][1], offset
            elif state.get("last") == here:
                column, at = self._file(shard).read_row_group(group, columns=[self._column]).column(0).combine_chunks(), offset
                state["held"] = here, column
            else:
                batches = self._file(shard).iter_batches(offset + 1, row_groups=[group], columns=[self._column])
                column, at = next(iter(batches)).column(0), offset
            state["last"] = here
            value = column[at].as_py()
        except Exception as error:  # Arrow's own errors, of damaged pages, are of many kinds.
            raise OSError(f"{self.shards[shard]}, row {row}: {' '.join(str(error).split())[:200] or type(error).__name__}") from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise OSError(f"{self.shards[shard]}, row {row} holds no bytes of an image")
        return data

    def _file(self, shard: int) -> Any:
        """The file, kept open by each thread until it needs another one."""
        state = self._open.__dict__
        if state.get("open", (None,))[0] != shard:
            state["open"] = shard, _parquet().ParquetFile(self.shards[shard], memory_map=True)
        return state["open"][1]

    def _forget(self) -> None:
        self._open = threading.local()


def open_parquet(path: str, shards: Sequence[str]) -> ParquetSource:
    """Opens the files ``shards``, which ``path`` names. Raises ValueError where one cannot be read or holds no images."""
    splits = {match[1]: None for shard in shards if (match := SPLIT.fullmatch(os.path.basename(shard)))}
    if len(splits) > 1:
        raise ValueError(
            f"{path} holds Parquet files of {len(splits)} splits, {', '.join(splits)}. Name one of them, "
            f"for instance {os.path.join(path, next(iter(splits)))}-*.parquet."
        )
    names: list[str] = []
    notes: list[str] = []
    labels: list = []
    positions, groups = [], []
    image, classes = "", ()
    common = os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards])
    for number, shard in enumerate(shards):
        file = _opened(shard)
        image = image or _image_column(file, shard)
        if image not in file.schema_arrow.names:
            raise ValueError(f"{shard} has no column {image}, which {shards[0]} has. Name files of one data set.")
        if "label" in file.schema_arrow.names:
            labels += file.read(columns=["label"]).column(0).to_pylist()
        classes = classes or _class_names(file.schema_arrow.metadata)
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        groups.append(np.cumsum([0, *sizes[:-1]], dtype=np.int64))
        short = os.path.relpath(shard, common).replace(os.sep, "/")
        names += [f"{short}/{row}" for row in range(sum(sizes))]
        positions += [(number, row) for row in range(sum(sizes))]
    if not names:
        raise ValueError(f"There are no rows in {path}.")
    numbers, classes = _labels(labels, len(names), classes, notes)
    whole = any(field.name == image and str(field.type).startswith("struct") for field in file.schema_arrow)
    column = f"{image}.bytes" if whole else image
    return ParquetSource(path, shards, names, np.array(positions, np.int64), groups, column, numbers, classes, notes)


def _parquet() -> ModuleType:
    return needs("pyarrow.parquet", "reading Parquet files", "parquet")


def _opened(shard: str) -> Any:
    try:
        return _parquet().ParquetFile(shard, memory_map=True)
    except (OSError, ValueError) as error:
        if "massl-fast[parquet]" in str(error):
            raise
        raise ValueError(f"{shard} cannot be read as Parquet: {' '.join(str(error).split())[:200]}.") from None


def _image_column(file: Any, shard: str) -> str:
    found = [field.name for field in file.schema_arrow if _holds_images(field.type)]
    if "image" in found:
        return "image"
    if len(found) != 1:
        there_are = ", ".join(f"{field.name} ({field.type})" for field in file.schema_arrow)[:300]
        raise ValueError(
            f"{shard} has {'several columns' if found else 'no column'} of images (binary, or a struct with bytes) and none called "
            f"image; its columns are {there_are}."
        )
    return found[0]


def _holds_images(kind: Any) -> bool:
    if str(kind).startswith("struct"):
        return kind.get_field_index("bytes") >= 0 and str(kind.field("bytes").type) in ("binary", "large_binary")
    return str(kind) in ("binary", "large_binary")


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """Names of the classes from what ``datasets`` writes into a file's metadata, JSON; empty where it is not there."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _labels(labels: list, rows: int, classes: tuple[str, ...], notes: list[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    """Numbers and names of the classes; unlabelled where a row has no label, or the -1 that stands for none."""
    missing = rows - len(labels) + sum(label is None or label == -1 for label in labels)
    if missing:
        if missing < rows:
            notes.append(f"{missing} of {rows} images have no label: all of them are taken as unlabelled.")
        return None, ()
    if all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        if min(labels) < 0 or (classes and max(labels) >= len(classes)):
            raise ValueError(f"Labels lie between {min(labels)} and {max(labels)}; {len(classes) or 'numbered'} classes count from 0.")
        return labels, classes or tuple(map(str, range(max(labels) + 1)))
    if all(isinstance(label, str) for label in labels):
        distinct = tuple(sorted(set(labels)))
        position = {name: n for n, name in enumerate(distinct)}
        return [position[label] for label in labels], distinct
    notes.append(f"Labels are of the kind {type(labels[0]).__name__}, neither whole numbers nor texts: the images are taken as unlabelled.")
    return None, ()
