"""What a source is: labelled or unlabelled encoded images by number; ``sources.open_source`` opens one.

A source holds millions of names in two arrays rather than in Python objects, so that handing it to many worker processes neither
copies nor touches them one by one.
"""

import copy
import hashlib
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np


class Source:
    """Labelled or unlabelled encoded images, numbered from 0.

    ``path`` as it was given; ``classes`` the class names, empty when unlabelled; ``notes`` sentences on what was left out or
    found odd, to be shown to the user. Subclasses add ``read``.
    """

    def __init__(
        self,
        path: str,
        names: Sequence[str],
        labels: Sequence[int] | np.ndarray | None,
        classes: Sequence[str],
        notes: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.classes = tuple(classes)
        self.notes = tuple(notes)
        encoded = [os.fsencode(name) for name in names]
        self._names = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._labels = None if labels is None else np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, i: int) -> str:
        """The image's name: unique within the source, the same on every machine."""
        end = self._ends[i]
        begin = self._ends[i - 1] if i else 0
        return os.fsdecode(self._names[begin:end].tobytes())

    def label(self, i: int) -> int | None:
        """The position of the image's class in ``classes``; None when the source is unlabelled."""
        return None if self._labels is None else int(self._labels[i])

    def read(self, i: int) -> bytes:
        """The image as it is stored. Raises OSError when it cannot be read."""
        raise NotImplementedError

    def files(self) -> Iterator[str]:
        """Paths of the files that hold the images."""
        raise NotImplementedError

    def names_checksum(self) -> str:
        """CRC-32 of all names in their order, 8 hexadecimal digits: the same wherever the images lie."""
        return f"{zlib.crc32(self._names.data, zlib.crc32(self._ends.data)):08x}"

    def stamp(self) -> str:
        """A hash of names, labels, and the sizes and times of change of the files: what tells that the images are the same as before."""
        found = hashlib.sha256(repr((self.classes, len(self))).encode())
        found.update(self._names.tobytes())
        found.update(self._ends.tobytes())
        found.update(b"" if self._labels is None else self._labels.tobytes())
        for path in self.files():
            try:
                status = os.stat(path)
                found.update(f"{status.st_size} {status.st_mtime_ns};".encode())
            except OSError:
                found.update(b"gone;")
        return found.hexdigest()

    def relabel(self, classes: Sequence[str]) -> None:
        """Number the labels by ``classes``, which may be more; ValueError where one of this source's is not among them."""
        unknown = sorted(set(self.classes) - set(classes))
        if unknown:
            raise ValueError(
                f"{self.path} has {len(unknown)} classes that the other images do not have, for instance {unknown[0]!r}. "
                "Training and test images must be labelled with the same names."
            )
        if self._labels is not None and self.classes:
            position = {name: i for i, name in enumerate(classes)}
            self._labels = np.array([position[name] for name in self.classes], np.int32)[self._labels]
            self.classes = tuple(classes)

    def without(self, names: Collection[str]) -> "Source":
        """The same source less the images of these names. Raises ValueError when none is left."""
        unwanted = frozenset(names)
        if not unwanted:
            return self
        kept = [i for i in range(len(self)) if self.name(i) not in unwanted]
        missing = len(unwanted) - (len(self) - len(kept))
        if not kept:
            raise ValueError(f"All {len(self)} images in {self.path} are named in the list of bad files: none is left.")
        chosen = copy.copy(self)
        Source.__init__(
            chosen,
            self.path,
            [self.name(i) for i in kept],
            None if self._labels is None else self._labels[kept],
            self.classes,
            (
                *self.notes,
                f"{len(self) - len(kept)} images named in the list of bad files are left out"
                + (f"; {missing} names in it do not occur here." if missing else "."),
            ),
        )
        chosen._keep(kept)
        return chosen

    def _keep(self, kept: list[int]) -> None:
        """Reduces what a subclass holds for each image."""


class ShardedSource(Source):
    """Images that lie many to a file. ``shards``: the files; ``positions`` int64 [len, n]: each image's shard, then where it lies there.

    Open files are in ``_open``, and no copy takes them along, in this process or another.
    """

    _open: Any

    def __init__(
        self,
        path: str,
        shards: Sequence[str],
        names: Sequence[str],
        positions: np.ndarray,
        labels: Sequence[int] | None,
        classes: Sequence[str],
        notes: Iterable[str] = (),
    ) -> None:
        super().__init__(path, names, labels, classes, notes)
        self.shards, self._positions = tuple(shards), positions
        self._forget()

    def _forget(self) -> None:
        """Begins anew with no file open."""
        raise NotImplementedError

    def files(self) -> Iterator[str]:
        return iter(self.shards)

    def _keep(self, kept: list[int]) -> None:
        self._positions = self._positions[kept]
        self._forget()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._forget()
